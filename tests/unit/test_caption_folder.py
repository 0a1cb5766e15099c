"""Folders that `transform` made and that other tools prepared, and samples that are skipped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from logs import log_lines
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import (
    CAPTIONS_NAME,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    CaptionFolder,
    open_data_folder,
    readable_split,
)
from vlm_bridge.data_pipeline.explore import folder_items
from vlm_bridge.data_pipeline.features import check_images
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped, inside
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError
from vlm_bridge.training_strategy.data import usable_images

FORMAT = {"format": "vlm-bridge caption folder", "format_version": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    transform(Scenes(3, 2, 0), root)
    return root


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "folder"))


def test_images_come_with_all_their_captions_in_file_order(made: Path) -> None:
    path = made / "train" / CAPTIONS_NAME
    lines = path.read_text().splitlines()
    for order in (lines, lines[::2] + lines[1::2]):  # those of an image need not be neighbors
        path.write_text("\n".join(order) + "\n")
        folder = CaptionFolder.open(made)
        images = folder.split("train")
        assert [image.original_id for image in images] == [f"train-{n:06}" for n in range(3)]
        assert all(image.path.is_file() and len(image.captions) == 2 for image in images)
    with pytest.raises(DataError, match=r"no test images \(it has: train, val\)"):
        folder.split("test")


def test_the_fingerprint_sees_every_change(made: Path) -> None:
    folder = CaptionFolder.open(made)
    assert folder.compute_fingerprint() == folder.fingerprint
    path = made / "val" / CAPTIONS_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    assert folder.compute_fingerprint() == folder.fingerprint, "order does not matter"
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert folder.compute_fingerprint() != folder.fingerprint
    path.write_text("\n".join(lines) + "\n")
    image = made / "val" / "images" / Path(json.loads(lines[0])["image_path"]).name
    image.write_bytes(image.read_bytes() + b"\0")
    assert folder.compute_fingerprint() != folder.fingerprint


def test_other_folders_are_refused_with_the_command_that_makes_one(
    made: Path, tmp_path: Path
) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="make one with `vlm-data transform"):
            CaptionFolder.open(path)
    (made / MANIFEST_NAME).unlink()
    (made / UNFINISHED_NAME).mkdir()
    with pytest.raises(DataError, match="continue it with the same `vlm-data transform`"):
        CaptionFolder.open(made)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({**FORMAT, "format_version": 99}), "format_version"),
        (json.dumps({**FORMAT, "counts": {"train": 3}, "fingerprint": ""}), "counts.train"),
    ],
)
def test_damaged_manifests(made: Path, manifest: str, message: str) -> None:
    (made / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(DataError, match=message):
        CaptionFolder.open(made)


LINES = {
    b"": "not a JSON object",
    b"{": "not a JSON object",
    b"[]": "needs the texts image_path, caption",
    b'{"caption": "\xff"}': "not UTF-8 text",
    b'{"image_path": "images/x.jpg", "caption": 3}': "needs the texts image_path, caption",
    b'{"image_path": "images/x.jpg", "caption": " "}': "an empty caption",
    b'{"image_path": "images/x.jpg", "caption": "A."}': r"image .* is missing",
    b'{"image_path": "../x.jpg", "caption": "A."}': r"image path .* stay inside",
    b'{"image_path": "/etc/passwd", "caption": "A."}': r"image path .* must be relative",
    b'{"image_path": "images/x.jpg", "caption": "\\ud800"}': "needs the texts",
    b'{"image_path": "images/link.jpg", "caption": "A."}': r"image .* leads out",
    b'{"image_path": "%s", "caption": "A."}' % (b"x" * 300): "image path of 300 characters",
    b'{"image_path": "images/x.jpg", "caption": "%s"}'
    % (b"word " * 9999): "a caption of 49,995 characters",
}


@pytest.mark.parametrize(
    "name", ["/a", "../a", "a/../../b", "a\\..\\..\\b", "C:\\a", "C:a", "\\\\host\\a", "a\0", " "]
)
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="stay inside"):
        inside(tmp_path, name)


# Folders that the dinov2-gemma project prepared: no manifest, nothing checked.

NAMES = {"train": range(4), "val": range(4, 6), "test": range(6, 7)}


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (number * 9, 200, 30)).save(path, "JPEG", quality=95)


def write_split(folder: Path, ids: Mapping[str, int]) -> None:
    lines = []
    for name, number in ids.items():
        write_image(folder / "images" / f"{name}.jpg", number)
        record = {"image_path": f"images/{name}.jpg", "caption": f"Scene {number}."}
        lines.append(json.dumps({**record, "original_id": name}))
    (folder / CAPTIONS_NAME).write_text("\n".join(lines) + "\n")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    root = tmp_path / "data" / "groundcap"
    for split, numbers in NAMES.items():
        write_split(root / split, {f"tt{number:07}_frame": number for number in numbers})
    write_image(tmp_path / "outside.jpg", 0)
    (root / "train" / "images" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    return root


def test_a_folder_of_other_tools_is_read_and_not_written(prepared: Path) -> None:
    before = sorted(prepared.rglob("*"))
    folder = open_data_folder(prepared)
    assert folder.splits == ["train", "val", "test"]
    images, skipped = readable_split(folder, "train")
    expected = [f"tt{number:07}_frame" for number in range(4)]
    assert [image.original_id for image in images] == expected
    assert images[0].captions == ("Scene 0.",) and not len(skipped)
    assert folder.compute_fingerprint() == folder.fingerprint
    with pytest.raises(DataError, match="another --output-dir"):
        transform(Scenes(3, 2, 0), prepared)
    assert sorted(prepared.rglob("*")) == before


def test_its_fingerprint_is_of_the_content_alone(prepared: Path, tmp_path: Path) -> None:
    fingerprint = CaptionFolder.open(prepared).fingerprint
    elsewhere = tmp_path / "another machine"
    shutil.copytree(prepared, elsewhere, copy_function=shutil.copyfile)  # other times
    (elsewhere / "train" / "images" / ".DS_Store").write_bytes(b"left by a file manager")
    assert CaptionFolder.open(elsewhere).fingerprint == fingerprint
    path = prepared / "val" / CAPTIONS_NAME
    path.write_text(path.read_text().replace("Scene 4.", "Another scene."))
    changed = open_data_folder(prepared).fingerprint
    write_image(prepared / "train" / "images" / "one more.jpg", 20)
    assert len({fingerprint, changed, open_data_folder(prepared).fingerprint}) == 3


@pytest.mark.parametrize(("line", "reason"), LINES.items())
def test_lines_that_cannot_be_used_are_skipped_with_a_reason(
    prepared: Path, line: bytes, reason: str
) -> None:
    with (prepared / "train" / CAPTIONS_NAME).open("ab") as file:
        file.write(line + b"\n")
    folder = open_data_folder(prepared)
    assert folder.manifest["counts"]["train"] == {"images": 4}
    assert folder.compute_fingerprint() == folder.fingerprint
    recipe = Recipe(max_bad_samples=0.2, feature_cache="off")
    lines = log_lines()
    assert len(usable_images(folder, "train", recipe)) == 4
    assert "skipped 1 of 5 train captions" in lines[0]
    assert re.search(f"{CAPTIONS_NAME}:5: {reason}", lines[0])
    with pytest.raises(DataError, match=r"1 of 5 train captions .* more than max_bad_samples=0.01"):
        usable_images(folder, "train", recipe.replace(max_bad_samples=0.01))
    with pytest.raises(DataError, match=f"captions.jsonl:5: {reason}"):
        folder.split("train")
    with pytest.raises(DataError, match="1 of 5 train samples cannot be used"):
        readable_split(folder, "train")
    skipped = []
    assert len(folder_items(folder, skipped)) == 7 and len(skipped) == 1


def test_captions_in_another_form_say_how_they_are_read(prepared: Path) -> None:
    (prepared / "train" / CAPTIONS_NAME).write_text('{"file_name": "a.jpg", "text": "A."}\n')
    message = r"none of the 1 lines .* needs the texts .*--source local --input-dir"
    with pytest.raises(DataError, match=message):
        open_data_folder(prepared)
    for split in NAMES:
        (prepared / split / CAPTIONS_NAME).write_bytes(b"")
    with pytest.raises(DataError, match=r"no caption folder .* with lines"):
        open_data_folder(prepared)


# Samples that cannot be read are skipped, counted and named; too many of them are an error.


@pytest.fixture
def folder(drawn_caption_folder: Path, tmp_path: Path) -> CaptionFolder:
    """A copy that a test may damage: 24 training images with two captions each."""
    return CaptionFolder.open(shutil.copytree(drawn_caption_folder, tmp_path / "data"))


def cut(folder: CaptionFolder, number: int) -> Path:
    path = folder.split("train")[number].path
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:400])
    return path


def read(folder: CaptionFolder, share: float) -> list[CaptionedImage]:
    return usable_images(folder, "train", Recipe(max_bad_samples=share, feature_cache="off"))


def test_damaged_images_are_skipped_and_named(folder: CaptionFolder) -> None:
    images = folder.split("train")
    assert read(folder, 0) == images
    broken = [cut(folder, 3), cut(folder, 7)]
    lines = log_lines()
    expected = [image for n, image in enumerate(images) if n not in (3, 7)]
    assert read(folder, 0.1) == expected
    assert len(lines) == 1 and lines[0].startswith("skipped 2 of 24 train images")
    assert all(str(path) in lines[0] for path in broken)
    for number in range(12):
        cut(folder, number)
    with pytest.raises(DataError, match=r"12 of 24 train images .* max_bad_samples=0.01") as caught:
        read(folder, 0.01)
    message = str(caught.value)
    assert message.count("train-") == 3 and "12 times" in message and "and 9 more" in message
    assert "\n" not in message


def test_the_outcome_is_remembered_until_an_image_is_touched(
    folder: CaptionFolder, tmp_path: Path
) -> None:
    path = cut(folder, 5)
    paths = [image.path for image in folder.split("train")]
    assert list(check_images(paths, tmp_path / "kept")) == [5]
    (remembered,) = (tmp_path / "kept").iterdir()
    remembered.write_text('[[6, "from memory"]]')
    assert check_images(paths, tmp_path / "kept") == {6: "from memory"}
    shutil.copy(str(paths[0]), path)
    assert check_images(paths, tmp_path / "kept") == {}


def test_a_cause_is_named_once_with_its_count() -> None:
    skipped = Skipped("rows", total=9)
    for number in range(5):
        skipped.add(f"a.csv:{number}", f"{number + 3} cells where the header has 2")
    skipped.add("a.csv:50", "not UTF-8 text")
    skipped.check(at_least=7)
    named = "5 times 3 cells where the header has 2: a.csv:0, a.csv:1, a.csv:2 and 2 more"
    with pytest.raises(DataError, match=f"6 of 9 rows .*{named}; a.csv:50: not UTF-8 text"):
        skipped.check(at_least=6)
