"""Conceptual Captions in img2dataset's shards: whole samples are read, everything else is accounted for."""

from __future__ import annotations

import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from shards import Members, jpeg, write_tar
from vlm_bridge.data_pipeline import shards as shards_module
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.shards import read_shard
from vlm_bridge.data_pipeline.sources import iter_pictures, make_source
from vlm_bridge.data_pipeline.sources.conceptual import Conceptual
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError, UsageError


def sample(index: int, *, key: str | None = None, picture: bytes | None = None) -> Members:
    """The members of one sample as img2dataset writes them: jpg, json, txt."""
    key = key or f"{index:09d}"
    metadata = {
        "caption": f"person {index} , on the beach", "url": f"http://example.com/{index}.jpg", "key": key,
        "status": "success", "error_message": None, "width": 24, "height": 24, "original_width": 24,
        "original_height": 24, "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip
    return [
        (f"{key}.jpg", jpeg(index) if picture is None else picture),
        (f"{key}.json", json.dumps(metadata, indent=4).encode()),
        (f"{key}.txt", metadata["caption"].encode()),
    ]


def write_shards(root: Path, shards: int = 2, each: int = 20) -> Path:
    """Write shards with what img2dataset puts beside them."""
    for number in range(shards):
        indices = range(number * each, (number + 1) * each)
        write_tar(root / f"{number:05d}.tar", [member for n in indices for member in sample(n)])
        (root / f"{number:05d}_stats.json").write_text('{"count": 20, "successes": 20}')
        (root / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return root


def cut(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.truncate(at)


def test_samples_of_all_shards_become_a_caption_folder(tmp_path: Path) -> None:
    manifest = transform(
        Conceptual(write_shards(tmp_path / "cc")), tmp_path / "out", val_fraction=0.2
    )
    assert sum(counts["images"] for counts in manifest["counts"].values()) == 40
    assert manifest["rejected"] == [] and manifest["near_duplicates"] is None
    assert manifest["split_rule"].startswith("hash of (seed, image id), 0.2 val and 0.01 test")
    assert "Google LLC" in manifest["licence_note"]
    image = CaptionFolder.open(tmp_path / "out").split("train")[0]
    assert image.captions == (f"Person {int(image.original_id)}, on the beach.",)
    assert image.path.read_bytes() == jpeg(int(image.original_id))


def test_a_small_set_gets_validation_images(tmp_path: Path) -> None:
    """Fifty rows of the training part, and no validation part: a recipe trains on them as they come."""
    root = tmp_path / "cc"
    write_tar(root / "train" / "00000.tar", [member for n in range(50) for member in sample(n)])
    manifest = transform(Conceptual(root), tmp_path / "out")
    assert [counts["images"] for counts in manifest["counts"].values()] == [40, 5, 5]
    assert "exactly 0.1 val and 0.1 test" in manifest["split_rule"]
    asked = transform(Conceptual(root), tmp_path / "asked", val_fraction=0.2, test_fraction=0)
    assert asked["split_rule"].startswith("hash of (seed, image id), 0.2 val and 0 test")
    write_tar(root / "val" / "00000.tar", [member for n in range(3) for member in sample(n + 50)])
    official = transform(Conceptual(root), tmp_path / "official")
    assert [counts["images"] for counts in official["counts"].values()] == [50, 3, 0]
    assert official["split_rule"].startswith("the dataset's own parts")


def test_a_tar_cut_off_at_any_byte_gives_its_whole_samples(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [member for n in range(4) for member in sample(n)])
    with tarfile.open(whole) as tar:
        ends = {
            m.name[:9]: m.offset_data + m.size for m in tar.getmembers()
        }  # of each sample's last member
    content = whole.read_bytes()
    archive_end = max(ends.values()) // 512 * 512 + 512
    part = tmp_path / "part.tar"
    for length in range(0, archive_end + 512, 256):
        part.write_bytes(content[:length])
        shard = read_shard(part)
        samples = [sample.key for sample in shard.samples]
        expected = [key for key, end in ends.items() if end <= length]
        # Cut at the header of the last .txt, the sample is usable all the same: its .json holds the caption.
        assert samples == expected or samples == list(ends)[: len(expected) + 1]
        assert len(shard.skipped) == (0 if length >= archive_end + 512 else 1)
        assert all("cut off or damaged" in reason and not name for name, reason in shard.skipped)


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [member for n in range(4) for member in sample(n)])
    with tarfile.open(path) as tar:
        header = tar.getmember("000000002.jpg").offset
    with path.open("r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 512)
    shard = read_shard(path)
    assert [sample.key for sample in shard.samples] == ["000000000", "000000001"]
    assert f"at byte {header:,}" in shard.skipped[0][1]


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    write_shards(tmp_path / "cc", shards=1)
    (tmp_path / "cc" / "00007.tar").write_bytes(content)
    source = Conceptual(tmp_path / "cc")
    assert len(source.items()) == 20
    assert [entry.id for entry in source.rejected] == ["00007.tar"]


def test_members_that_lead_out_and_odd_ones_are_rejected(tmp_path: Path) -> None:
    members = [
        *sample(0),
        ("../000000009.jpg", jpeg(9)),
        ("/etc/000000008.txt", b"x"),
        ("C:\\x.jpg", b"x"),
    ]
    path = write_tar(tmp_path / "cc" / "00000.tar", members + sample(1, key="./000000001"))
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "000000002.jpg"), (tarfile.LNKTYPE, "000000003.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = Conceptual(tmp_path / "cc")
    assert [item.image_id for item in source.items()] == ["000000000", "000000001"]
    assert {entry.id: entry.reason for entry in source.rejected} == {
        "00000.tar:../000000009.jpg": "its name leads out of the shard",
        "00000.tar:/etc/000000008.txt": "its name leads out of the shard",
        "00000.tar:C:\\x.jpg": "its name leads out of the shard",
        "00000.tar:000000002.jpg": "a link, device or sparse file",
        "00000.tar:000000003.jpg": "a link, device or sparse file",
    }


def test_incomplete_samples_are_rejected_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "MAX_IMAGE_BYTES", 5000)
    failed = json.dumps(
        {"status": "failed_to_download", "url": "http://example.com/3", "caption": "c"}
    )
    members = [
        *sample(0)[1:],  # no picture
        ("000000001.jpg", jpeg(1)),  # no caption
        ("000000002.jpg", jpeg(2)), ("000000002.txt", b" \n"),
        ("000000003.jpg", jpeg(3)), ("000000003.json", failed.encode()), ("000000003.txt", b"c"),
        *sample(4, picture=bytes(6000)),
        ("000000005.jpg", jpeg(5)), ("000000005.txt", b"\xff\xfe"),
        ("000000006.jpg", jpeg(6)), ("000000006.png", jpeg(6)), ("000000006.txt", b"two"),
        ("000000007.png", jpeg(7)), ("000000007.json", b"{damaged"), ("000000007.txt", b"a caption"),
        *sample(8), *sample(8),
        ("000000010.jpg", jpeg(10)), ("000000010.json", b'{"caption": "only in json"}'),
        *sample(9, picture=b"no picture"),
    ]  # fmt: skip
    write_tar(tmp_path / "cc" / "00000.tar", members)
    manifest = transform(
        Conceptual(tmp_path / "cc"), tmp_path / "out", val_fraction=0, test_fraction=0
    )
    reasons = {
        entry["id"].removeprefix("00000.tar:"): entry["reason"] for entry in manifest["rejected"]
    }
    assert reasons == {
        "000000000": "it has no image (from http://example.com/0.jpg)",
        "000000001": "it has no caption",
        "000000002": "it has no caption",
        "000000003": "img2dataset status failed_to_download (from http://example.com/3)",
        "000000004": "its .jpg has 0 MB (from http://example.com/4.jpg)",
        "000000005": "its caption is not UTF-8 text",
        "000000006": "it has several images (000000006.jpg, 000000006.png)",
        "000000008": "it has several .jpg (from http://example.com/8.jpg)",
        "000000009": "it is no image, or a damaged one",
    }
    images = CaptionFolder.open(tmp_path / "out").split("train")
    assert [image.original_id for image in images] == ["000000007", "000000010"]


def test_parts_come_from_names_and_keys_may_repeat_in_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "cc" / "train" / "00000.tar", [*sample(0), *sample(1)])
    write_tar(tmp_path / "cc" / "train" / "00001.tar", sample(1))
    write_tar(tmp_path / "cc" / "cc3m-validation-0000.tar", sample(0))
    source = Conceptual(tmp_path / "cc")
    assert {item.image_id: item.split for item in source.items()} == {
        "000000000": "val", "train/000000000": "train", "train/000000001": "train",
    }  # fmt: skip
    assert source.split_rule is not None and "names of the shards" in source.split_rule
    assert [entry.id for entry in source.rejected] == ["train/00001.tar:000000001"]
    write_tar(tmp_path / "cc" / "00005.tar", sample(7))
    assert {item.split for item in source.items()} == {
        "train",
        "val",
        None,
    } and source.split_rule is None


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    noise = bytes(range(256)) * 4000  # 1 MB
    write_tar(
        tmp_path / "cc" / "00000.tar",
        [member for n in range(40) for member in sample(n, picture=noise)],
    )
    tracemalloc.start()
    items = Conceptual(tmp_path / "cc").items()
    assert sum(
        len(picture) for picture in iter_pictures(items) if isinstance(picture, bytes)
    ) == 40 * len(noise)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(noise)


def test_a_shard_that_shrinks_or_goes_is_named(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "cc", shards=1)
    items = Conceptual(root).items()
    cut(root / "00000.tar", 3000)
    with pytest.raises(DataError, match=r"00000\.tar.* its shard became shorter"):
        list(iter_pictures(items))
    (root / "00000.tar").unlink()
    with pytest.raises(DataError, match="its shard cannot be read"):
        list(iter_pictures(items))


def test_a_list_of_urls_says_how_to_get_shards(tmp_path: Path) -> None:
    table = tmp_path / "my cc" / "Train_GCC-training.tsv"
    table.parent.mkdir()
    table.write_text("a very typical bus station\thttp://example.com/1.jpg\n")
    for given in (table, table.parent):
        with pytest.raises(
            UsageError, match=r"lists images by URL.*img2dataset --url_list"
        ) as caught:
            make_source("conceptual", input_dir=given).items()
        assert "\n" not in str(caught.value)


def test_folders_without_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shard \(\*\.tar\)"):
        Conceptual(tmp_path).items()
    write_tar(tmp_path / "00000.tar", [("readme.md", b"text")])
    with pytest.raises(DataError, match=r"no whole sample in the 1 shards.*it has no image"):
        Conceptual(tmp_path).items()
