"""Folders that the dinov2-gemma project prepared: no manifest, nothing checked, and read all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from logs import log_lines
from vlm_bridge.data_pipeline import caption_folder
from vlm_bridge.data_pipeline.caption_folder import CAPTIONS_NAME, MANIFEST_NAME, CaptionFolder
from vlm_bridge.data_pipeline.data_folder import open_data_folder, readable_split
from vlm_bridge.data_pipeline.explore import folder_items
from vlm_bridge.data_pipeline.image_check import usable_images
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError

NAMES = {"train": range(4), "val": range(4, 6), "test": range(6, 7)}


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (number * 9, 200, 30)).save(path, "JPEG", quality=95)


def write_split(folder: Path, ids: Mapping[str, int]) -> None:
    """A split as the project writes it: an image and a line for each id."""
    lines = []
    for name, number in ids.items():
        write_image(folder / "images" / f"{name}.jpg", number)
        record = {
            "image_path": f"images/{name}.jpg",
            "caption": f"Scene {number}.",
            "original_id": name,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    (folder / CAPTIONS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_BRIDGE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data" / "groundcap"
    for split, numbers in NAMES.items():
        write_split(root / split, {f"tt{number:07}_frame": number for number in numbers})
    return root


@pytest.fixture
def read_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, where nothing can be written. Root may write anywhere, so permissions do not do it."""
    write = caption_folder.write_atomically

    def refuse(path: Path, content: bytes) -> None:
        if path.is_relative_to(root):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(caption_folder, "write_atomically", refuse)
    return root


def add_lines(root: Path, split: str, lines: Sequence[bytes]) -> None:
    with (root / split / CAPTIONS_NAME).open("ab") as file:
        file.writelines(line + b"\n" for line in lines)


def test_a_manifest_is_made_once_and_said_once(root: Path) -> None:
    said = log_lines()
    folder = open_data_folder(root)
    (line,) = said
    assert line == (
        f"{root} has no manifest.json: made {root / MANIFEST_NAME} "
        "(train 4 images, val 2 images, test 1 images)"
    )
    assert folder.splits == ["train", "val", "test"]
    images, skipped = readable_split(folder, "train")
    assert [image.original_id for image in images] == [
        f"tt{number:07}_frame" for number in range(4)
    ]
    assert images[0].captions == ("Scene 0.",) and not len(skipped)
    assert folder.compute_fingerprint() == folder.fingerprint
    again = open_data_folder(root)
    assert again.manifest == folder.manifest and len(said) == 1


def test_the_fingerprint_is_of_the_content_alone(root: Path, tmp_path: Path) -> None:
    fingerprint = CaptionFolder.open(root).fingerprint
    elsewhere = tmp_path / "another machine"
    shutil.copytree(root, elsewhere)
    (elsewhere / MANIFEST_NAME).unlink()
    (elsewhere / "train" / "images" / ".DS_Store").write_bytes(b"left by a file manager")
    for path in elsewhere.rglob("*.jpg"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert CaptionFolder.open(elsewhere).fingerprint == fingerprint
    (root / MANIFEST_NAME).unlink()
    assert CaptionFolder.open(root).fingerprint == fingerprint


def test_a_copy_with_its_manifest_needs_no_other(root: Path, tmp_path: Path) -> None:
    CaptionFolder.open(root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    said = log_lines()
    CaptionFolder.open(tmp_path / "copy")
    assert not said


def test_a_read_only_folder_has_its_manifest_in_the_cache(read_only: Path, tmp_path: Path) -> None:
    said = log_lines()
    first = open_data_folder(read_only)
    (made,) = (tmp_path / "cache" / "manifests").iterdir()
    assert f"has no manifest.json: made {made} (" in said[0]
    assert not (read_only / MANIFEST_NAME).exists()
    assert open_data_folder(read_only).fingerprint == first.fingerprint
    assert len(said) == 1


def test_where_nothing_can_be_written_it_is_read_all_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        del content
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(caption_folder, "write_atomically", refuse)
    said = log_lines()
    assert len(open_data_folder(root).split("train")) == 4
    assert "every start makes a manifest anew" in said[0]


@pytest.mark.parametrize("place", ["beside", "in the cache"])
def test_a_changed_folder_gets_another_manifest(
    place: str, root: Path, request: pytest.FixtureRequest
) -> None:
    if place == "in the cache":
        request.getfixturevalue("read_only")
    said = log_lines()
    first = open_data_folder(root)
    path = root / "val" / CAPTIONS_NAME
    path.write_text(path.read_text().replace("Scene 4.", "Another scene."))
    second = open_data_folder(root)
    assert f"{root} has changed since its manifest was made: made " in said[1]
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == second.compute_fingerprint()
    write_image(root / "train" / "images" / "one more.jpg", 20)
    assert open_data_folder(root).fingerprint != second.fingerprint
    assert len(said) == 3
    open_data_folder(root)
    assert len(said) == 3


def test_images_in_several_splits_are_read_and_said(root: Path) -> None:
    write_split(root / "train", {f"tt{number:07}_frame": number for number in range(7)})
    said = log_lines()
    folder = open_data_folder(root)
    line = f"2 val images and 1 test images of {root} are in train too: scores on them are too good"
    assert said[1:] == [line]
    assert [len(readable_split(folder, split)[0]) for split in NAMES] == [7, 2, 1]
    said.clear()
    open_data_folder(root)
    assert said == [line], "at every start"


def test_names_with_spaces_and_of_any_language_are_read(tmp_path: Path, root: Path) -> None:
    other = tmp_path / "données de film"
    names = {"a b": 1, "été 名前": 2, "it's 100%": 3}
    write_split(other / "train", names)
    write_split(other / "val", {"ключ": 4})
    images = CaptionFolder.open(other).split("train")
    assert [image.original_id for image in images] == list(names)
    assert all(image.path.is_file() for image in images)


LINES = {
    b"": "a blank line",
    b"{": "not a JSON object",
    b'{"caption": "A."}': "needs the texts image_path, caption",
    b'{"image_path": "images/tt0000000_frame.jpg", "caption": " "}': "an empty caption",
    b'{"image_path": "images/gone.jpg", "caption": "A.", "original_id": "gone"}': "is missing",
    b'{"image_path": "/etc/passwd", "caption": "A.", "original_id": "x"}': "must be relative",
    b"\xff": "not UTF-8 text",
}


@pytest.mark.parametrize("line", LINES)
def test_lines_that_cannot_be_used_are_skipped_with_a_reason(root: Path, line: bytes) -> None:
    add_lines(root, "train", [line])
    folder = open_data_folder(root)
    assert folder.manifest["counts"]["train"] == {"images": 4, "captions": 4}
    assert folder.compute_fingerprint() == folder.fingerprint
    said = log_lines()
    images = usable_images(folder, "train", max_bad_share=0.2)
    assert len(images) == 4
    assert "skipped 1 of 5 train captions" in said[0]
    assert f"{CAPTIONS_NAME}:5: " in said[0] and LINES[line] in said[0]
    with pytest.raises(
        DataError, match=r"1 of 5 train captions cannot be used, more than max_bad_samples=0.01"
    ):
        usable_images(folder, "train", max_bad_share=0.01)
    with pytest.raises(DataError, match="1 of 5 train samples cannot be used"):
        readable_split(folder, "train")
    skipped = []
    assert len(folder_items(folder, skipped)) == 7
    assert len(skipped) == 1


def test_an_image_without_an_id_has_its_file_name(root: Path) -> None:
    write_image(root / "val" / "images" / "new.jpg", 9)
    add_lines(root, "val", [b'{"image_path": "images/new.jpg", "caption": "A.", "original_id": 7}'])
    assert CaptionFolder.open(root).split("val")[-1].original_id == "new"


def test_captions_in_another_form_say_how_they_are_read(root: Path) -> None:
    (root / "train" / CAPTIONS_NAME).write_text('{"file_name": "a.jpg", "text": "A."}\n')
    with pytest.raises(
        DataError, match=r"none of the 1 lines .* needs the texts .*--source local --input-dir"
    ):
        open_data_folder(root)


def test_a_folder_whose_caption_files_are_empty_is_none(root: Path) -> None:
    for split in NAMES:
        (root / split / CAPTIONS_NAME).write_bytes(b"")
    with pytest.raises(DataError, match=r"captions.jsonl files in .* have no lines"):
        open_data_folder(root)


def test_transform_leaves_such_a_folder_alone(root: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="other tools prepared: train on it"):
            transform(Scenes(3, 2, 0), root)
        open_data_folder(root)
