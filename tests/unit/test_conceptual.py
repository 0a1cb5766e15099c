"""Conceptual Captions in img2dataset's shards: whole samples are read, losses have a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards import Members, jpeg, write_tar
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.sources.conceptual import Conceptual
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError


def sample(index: int, image: bytes | None = None) -> Members:
    """Return the members of one sample as img2dataset writes them: jpg, json, txt."""
    key, caption = f"{index:09d}", f"person {index} , on the beach"
    metadata = {"caption": caption, "key": key, "status": "success"}
    return [
        (f"{key}.jpg", jpeg(index) if image is None else image),
        (f"{key}.json", json.dumps(metadata, indent=4).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def samples(*indices: int) -> Members:
    return [member for n in indices for member in sample(n)]


def test_samples_of_all_shards_become_a_caption_folder(tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / "cc" / f"{number:05d}.tar"
        write_tar(path, samples(*range(number * 20, number * 20 + 20)))
        path.with_suffix(".parquet").write_bytes(b"PAR1")
    manifest = transform(Conceptual(tmp_path / "cc"), tmp_path / "out", val_fraction=0.2)
    assert sum(counts["images"] for counts in manifest["counts"].values()) == 40
    assert manifest["rejected"] == [] and manifest["near_duplicates"] is None
    assert manifest["split_rule"].startswith("hash of (seed, image id), 0.2 val and 0.01 test")
    assert "Google LLC" in manifest["licence_note"]
    image = CaptionFolder.open(tmp_path / "out").split("train")[0]
    assert image.captions == (f"Person {int(image.original_id)}, on the beach.",)
    assert image.path.read_bytes() == jpeg(int(image.original_id))


def test_incomplete_samples_are_rejected_with_their_reason(tmp_path: Path) -> None:
    members = [
        *sample(0)[1:],
        ("000000001.jpg", jpeg(1)), ("000000001.txt", b" \n"),
        ("000000002.jpg", jpeg(2)), ("000000002.json", b'{"caption": "only in json"}'),
        *sample(3, image=b"no image"),
    ]  # fmt: skip
    write_tar(tmp_path / "cc" / "00000.tar", members)
    source = Conceptual(tmp_path / "cc")
    manifest = transform(source, tmp_path / "out", val_fraction=0, test_fraction=0)
    skipped = {entry["id"].partition(":")[2]: entry["reason"] for entry in manifest["rejected"]}
    assert "it is no image" in skipped.pop("")
    assert skipped == {"000000000": "it has no image", "000000001": "it has no caption"}
    (image,) = CaptionFolder.open(tmp_path / "out").split("train")
    assert (image.original_id, image.captions) == ("000000002", ("Only in json.",))


def test_parts_come_from_names_and_keys_may_repeat_in_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "00000.tar", samples(0, 1))
    write_tar(tmp_path / "train" / "00001.tar", samples(1))
    write_tar(tmp_path / "cc3m-validation-0000.tar", samples(0))
    source = Conceptual(tmp_path)
    assert {item.image_id: item.split for item in source.items()} == {
        "000000000": "val", "train/000000000": "train", "train/000000001": "train",
    }  # fmt: skip
    assert "names of the shards" in str(source.split_rule)
    assert [entry.id for entry in source.rejected] == ["train/00001.tar:000000001"]
    write_tar(tmp_path / "00005.tar", samples(7))
    assert {item.split for item in source.items()} == {"train", "val", None}
    assert source.split_rule is None


def test_folders_without_shards_are_named(tmp_path: Path) -> None:
    (table := tmp_path / "Train_GCC-training.tsv").write_text("a station\thttp://a.com/1.jpg\n")
    for given in (table, tmp_path):
        with pytest.raises(DataError, match=r"no shard \(\*\.tar\).* download conceptual"):
            make_source("conceptual", input_dir=given).items()
    write_tar(tmp_path / "00000.tar", [("readme.md", b"text")])
    with pytest.raises(DataError, match=r"no whole sample in 1 shards.*it has no image"):
        Conceptual(tmp_path).items()
