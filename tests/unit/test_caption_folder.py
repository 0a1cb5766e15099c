"""The on-disk format: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlm_bridge.data_pipeline.caption_folder import (
    CAPTIONS_NAME,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    CaptionFolder,
    inside,
    write_atomically,
)
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    transform(Scenes(3, 2, 0), root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "folder"))


def test_images_come_with_all_their_captions_in_file_order(root: Path) -> None:
    folder = CaptionFolder.open(root)
    assert folder.splits == ["train", "val"]
    images = folder.split("train")
    assert [image.original_id for image in images] == [
        "train-000000",
        "train-000001",
        "train-000002",
    ]
    assert all(image.path.is_file() and len(image.captions) == 2 for image in images)


def test_captions_of_an_image_need_not_be_neighbours(root: Path) -> None:
    path = root / "train" / CAPTIONS_NAME
    path.write_text(
        "\n".join(path.read_text().splitlines()[::2] + path.read_text().splitlines()[1::2]) + "\n"
    )
    images = CaptionFolder.open(root).split("train")
    assert [len(image.captions) for image in images] == [2, 2, 2]


def test_a_split_without_images_is_no_split(root: Path) -> None:
    with pytest.raises(DataError, match=r"no test images \(it has: train, val\)"):
        CaptionFolder.open(root).split("test")


def test_the_fingerprint_sees_every_change(root: Path) -> None:
    folder = CaptionFolder.open(root)
    assert folder.compute_fingerprint() == folder.fingerprint
    path = root / "val" / CAPTIONS_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    assert folder.compute_fingerprint() == folder.fingerprint, "order does not matter"
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert folder.compute_fingerprint() != folder.fingerprint
    path.write_text("\n".join(lines) + "\n")
    picture = folder.split("val")[0].path
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert folder.compute_fingerprint() != folder.fingerprint


def test_an_unfinished_folder_says_how_to_continue(root: Path) -> None:
    (root / MANIFEST_NAME).unlink()
    (root / UNFINISHED_NAME).mkdir()
    with pytest.raises(
        DataError, match="unfinished: continue it with the same `vlm-data transform`"
    ):
        CaptionFolder.open(root)


def test_what_is_no_caption_folder_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="vlm-data transform"):
            CaptionFolder.open(path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "damaged"),
        ("[]", "not the manifest"),
        (json.dumps({"format": "other"}), "not the manifest"),
        (
            json.dumps({"format": "vlm-bridge caption folder", "format_version": 99}),
            "format version 99",
        ),
        (
            json.dumps({"format": "vlm-bridge caption folder", "format_version": 1}),
            "lacks counts, fingerprint",
        ),
    ],
)
def test_damaged_manifests(root: Path, manifest: str, message: str) -> None:
    (root / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(DataError, match=message):
        CaptionFolder.open(root)


def test_a_missing_caption_file_is_found_on_opening(root: Path) -> None:
    (root / "val" / CAPTIONS_NAME).unlink()
    with pytest.raises(DataError, match=r"val/captions.jsonl is missing"):
        CaptionFolder.open(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"captions.jsonl:1: not a JSON object"),
        (b'{"caption": "\xff"}', r"captions.jsonl:1: not UTF-8"),
        (b"[]", r"captions.jsonl:1: needs the texts"),
        (
            b'{"image_path": "images/x.jpg", "caption": 3, "original_id": "x"}',
            r":1: needs the texts",
        ),
        (
            b'{"image_path": "images/x.jpg", "caption": "A.", "original_id": "x"}',
            r":1: image .* is missing",
        ),
        (
            b'{"image_path": "../x.jpg", "caption": "A.", "original_id": "x"}',
            r":1: image path .* inside",
        ),
        (
            b'{"image_path": "/x.jpg", "caption": "A.", "original_id": "x"}',
            r":1: image path .* inside",
        ),
    ],
)
def test_malformed_lines_name_file_and_line(root: Path, line: bytes, message: str) -> None:
    path = root / "train" / CAPTIONS_NAME
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(DataError, match=message):
        CaptionFolder.open(root).split("train")


@pytest.mark.parametrize(
    "name", ["/a", "../a", "a/../../b", "a\\..\\..\\b", "C:\\a", "C:a", "\\\\host\\a", "a\0", " "]
)
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="stay inside"):
        inside(tmp_path, name)


def test_writing_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]
