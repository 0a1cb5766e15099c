"""Flickr30k, COCO and Conceptual Captions by command, from inputs in exactly the published layouts."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def jpeg(index: int) -> bytes:
    field = Image.frombytes(
        "RGB",
        (2, 2),
        bytes((index * step + shift) % 256 for step in (7, 31, 57, 101) for shift in (0, 80, 160)),
    )
    buffer = io.BytesIO()
    field.resize((48, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def sentences(index: int) -> list[dict[str, Any]]:
    return [
        {"tokens": [], "raw": f"Thing {index} , wording {n} .", "imgid": index, "sentid": n}
        for n in range(5)
    ]


def write_pictures(folder: Path, names: dict[int, str]) -> None:
    folder.mkdir(parents=True)
    for index, name in names.items():
        (folder / name).write_bytes(jpeg(index))


def write_flickr30k(root: Path) -> None:
    """Pictures, the authors' captions and Karpathy's splits: 24 train, 4 val, 4 test."""
    names = {index: f"{1000092795 + index}.jpg" for index in range(32)}
    write_pictures(root / "flickr30k-images", names)
    captions = [
        f"{name}#{n}\tThing {index} , wording {n} .\n"
        for index, name in names.items()
        for n in range(5)
    ]
    (root / "results_20130124.token").write_text("".join(captions))
    splits = ["train"] * 24 + ["val"] * 4 + ["test"] * 4
    images = [
        {
            "sentids": [0],
            "imgid": index,
            "sentences": sentences(index),
            "split": split,
            "filename": names[index],
        }
        for index, split in enumerate(splits)
    ]
    (root / "dataset_flickr30k.json").write_text(
        json.dumps({"images": images, "dataset": "flickr30k"})
    )


def write_coco(root: Path) -> None:
    """Pictures and captions of 2017 and Karpathy's splits, which name the files of 2014: 24 train, 4 val, 4 test."""
    write_pictures(root / "train2017", {index: f"{index:012d}.jpg" for index in range(28)})
    write_pictures(root / "val2017", {index: f"{index:012d}.jpg" for index in range(28, 32)})
    (root / "annotations").mkdir()
    for part, ids in (("train", range(28)), ("val", range(28, 32))):
        annotations = [
            {"image_id": index, "id": index * 5 + n, "caption": sentence["raw"]}
            for index in ids
            for n, sentence in enumerate(sentences(index))
        ]
        images = [{"id": index, "file_name": f"{index:012d}.jpg"} for index in ids]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    images = [
        {
            "filepath": "val2014", "filename": f"COCO_val2014_{index:012d}.jpg", "cocoid": index, "imgid": index,
            "sentids": [0], "sentences": sentences(index), "split": split,
        }
        for index, split in enumerate(["train"] * 20 + ["restval"] * 4 + ["val"] * 4 + ["test"] * 4)
    ]  # fmt: skip
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def write_conceptual(root: Path) -> None:
    """img2dataset's output for training and validation; the last training shard is cut off in its third sample."""
    for part, shard, indices in (
        ("train", 0, range(0, 20)), ("train", 1, range(20, 30)), ("validation", 0, range(4)),
    ):  # fmt: skip
        (root / part).mkdir(parents=True, exist_ok=True)
        path = root / part / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for key, index in (
                (f"{index:09d}", index + (100 if part == "validation" else 0)) for index in indices
            ):
                metadata = {
                    "key": key,
                    "status": "success",
                    "url": f"http://example.com/{key}",
                    "caption": "?",
                }
                for extension, content in (
                    ("jpg", jpeg(index)), ("json", json.dumps(metadata).encode()), ("txt", f"thing {index}".encode()),
                ):  # fmt: skip
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (root / part / f"{shard:05d}_stats.json").write_text('{"count": 20, "successes": 20}')
        (root / part / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    cut = root / "train" / "00001.tar"
    with tarfile.open(cut) as tar:
        third = tar.getmember("000000022.jpg")
    with cut.open("r+b") as file:
        file.truncate(third.offset_data + third.size // 2)


DATASETS = {
    "flickr30k": (
        write_flickr30k,
        {"train": 24, "val": 4, "test": 4},
        "Karpathy's splits (dataset_flickr30k.json)",
    ),
    "coco": (
        write_coco,
        {"train": 24, "val": 4, "test": 4},
        "Karpathy's splits (dataset_coco.json), restval in train",
    ),
    "conceptual": (write_conceptual, {"train": 22, "val": 4, "test": 0}, "the dataset's own parts"),
}


@pytest.fixture(params=DATASETS)
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of a dataset that lies in datasets/NAME of the current folder."""
    monkeypatch.chdir(tmp_path)
    DATASETS[request.param][0](tmp_path / "datasets" / request.param)
    yield request.param


def test_from_the_published_layout_to_the_first_batch(run_here: Run, source: str) -> None:
    _, counts, rule = DATASETS[source]
    given = ("--source", source, "--input-dir", f"datasets/{source}")

    explored = run_here("data", "explore-dataset", *given, "--json", "--samples", 3)
    assert explored.returncode == 0, explored.stderr
    statistics = json.loads(explored.stdout)
    assert statistics["images"] == sum(counts.values()) and not statistics["unreadable"]
    assert statistics["picture_width"]["max"] == 48
    with Image.open(f"runs/explore/{source}.png") as grid:
        assert grid.format == "PNG"

    outlook = json.loads(run_here("data", "transform", *given, "--dry-run", "--json").stdout)
    assert outlook["images"] == counts and outlook["split_rule"].startswith(rule)

    out = f"data/{source}"
    done = run_here("data", "transform", *given, "--output-dir", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "licence: " in done.stdout
    manifest = CaptionFolder.open(out).manifest
    assert {split: count["images"] for split, count in manifest["counts"].items()} == counts
    assert manifest["split_rule"].startswith(rule)
    rejected = {entry["id"] for entry in manifest["rejected"]}
    assert rejected == ({"train/00001.tar"} if source == "conceptual" else set())

    inspected = run_here("data", "inspect-loader", "--data-dir", out, "--all", "--json")
    assert inspected.returncode == 0, inspected.stderr
    result = json.loads(inspected.stdout)
    assert result["pictures_decoded"] == sum(counts.values()) and not result["broken"]
