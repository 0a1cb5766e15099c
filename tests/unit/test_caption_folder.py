"""Folders that `transform` made and that other tools prepared, and samples that are skipped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

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
from vlm_bridge.data_pipeline.samples import Skipped, inside
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError
from vlm_bridge.training_strategy.data import usable_images

FORMAT = {"format": "vlm-bridge caption folder", "format_version": 1}
IDS = [f"train-{number:02}" for number in range(24)]


@pytest.fixture
def made(drawn_caption_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage: 24 training images with two captions each."""
    return Path(shutil.copytree(drawn_caption_folder, tmp_path / "data"))


@pytest.fixture
def prepared(made: Path, tmp_path: Path) -> Path:
    """The same as the dinov2-gemma project prepares it, without a manifest."""
    (made / MANIFEST_NAME).unlink()
    shutil.copy(made / "val/images/val-00.jpg", tmp_path / "outside.jpg")
    (made / "train/images/link.jpg").symlink_to(tmp_path / "outside.jpg")
    return made


def test_images_come_with_all_their_captions_in_file_order(made: Path) -> None:
    path = made / "train" / CAPTIONS_NAME
    lines = path.read_text().splitlines()
    for order in (lines, lines[::2] + lines[1::2]):  # those of an image need not be neighbors
        path.write_text("\n".join(order) + "\n")
        images = CaptionFolder.open(made).split("train")
        assert [image.original_id for image in images] == IDS
        assert all(image.path.is_file() and len(image.captions) == 2 for image in images)


def test_the_fingerprint_sees_every_change(made: Path) -> None:
    folder, path = CaptionFolder.open(made), made / "val" / CAPTIONS_NAME
    lines = path.read_text().splitlines(keepends=True)
    for changed, is_equal in ((lines[::-1], True), (lines[:-1], False), (lines, True)):
        path.write_text("".join(changed))  # order does not matter
        assert (folder.compute_fingerprint() == folder.fingerprint) == is_equal
    image = made / "val/images/val-00.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert folder.compute_fingerprint() != folder.fingerprint


def test_other_folders_are_refused_with_a_command(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make one with `vlm-data transform"):
        CaptionFolder.open(tmp_path)
    (made / MANIFEST_NAME).unlink()
    (made / UNFINISHED_NAME).mkdir()
    with pytest.raises(DataError, match="continue it with the same `vlm-data transform`"):
        CaptionFolder.open(made)
    for manifest, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({**FORMAT, "format_version": 99}), "format_version"),
        (json.dumps({**FORMAT, "counts": {"train": 3}, "fingerprint": ""}), "counts.train"),
    ):
        (made / MANIFEST_NAME).write_text(manifest)
        with pytest.raises(DataError, match=message):
            CaptionFolder.open(made)


def test_a_folder_of_other_tools_is_read_and_not_written(prepared: Path) -> None:
    before = sorted(prepared.rglob("*"))
    folder = open_data_folder(prepared)
    assert folder.splits == ["train", "val", "test"]
    images, skipped = readable_split(folder, "train")
    assert [image.original_id for image in images] == IDS and not len(skipped)
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
    path.write_text(path.read_text().replace("red", "pink"))
    changed = open_data_folder(prepared).fingerprint
    shutil.copy(tmp_path / "outside.jpg", prepared / "train/images/more.jpg")
    assert len({fingerprint, changed, open_data_folder(prepared).fingerprint}) == 3


LINES = {
    b"": "not a JSON object",
    b"{": "not a JSON object",
    b"[]": "needs the texts image_path, caption",
    b'{"caption": "\xff"}': "not UTF-8 text",
    b'{"image_path": "images/x.jpg", "caption": 3}': "needs the texts image_path, caption",
    b'{"image_path": "images/x.jpg", "caption": "\\ud800"}': "needs the texts",
    b'{"image_path": "images/x.jpg", "caption": " "}': "an empty caption",
    b'{"image_path": "images/x.jpg", "caption": "A."}': r"image .* is missing",
    b'{"image_path": "images/link.jpg", "caption": "A."}': r"image .* leads out",
    b'{"image_path": "../x.jpg", "caption": "A."}': r"image path .* stay inside",
    b'{"image_path": "%s", "caption": "A."}' % (b"x" * 300): "image path of 300 characters",
    b'{"image_path": "x.jpg", "caption": "%s"}' % (b"word " * 9999): "a caption of 49,995 char",
}


@pytest.mark.parametrize(("line", "reason"), LINES.items())
def test_unusable_lines_are_skipped(prepared: Path, line: bytes, reason: str) -> None:
    with (prepared / "train" / CAPTIONS_NAME).open("ab") as file:
        file.write(line + b"\n")
    folder = open_data_folder(prepared)
    assert folder.manifest["counts"]["train"] == {"images": 24}
    recipe = Recipe(max_bad_samples=0.03, feature_cache="off")
    logged = log_lines()
    assert len(usable_images(folder, "train", recipe)) == 24
    assert re.search(f"skipped 1 of 49 train captions.*{CAPTIONS_NAME}:49: {reason}", logged[0])
    with pytest.raises(DataError, match=r"1 of 49 train captions .* than max_bad_samples=0.01"):
        usable_images(folder, "train", recipe.replace(max_bad_samples=0.01))
    with pytest.raises(DataError, match=f"captions.jsonl:49: {reason}"):
        folder.split("train")
    with pytest.raises(DataError, match="1 of 49 train samples cannot be used"):
        readable_split(folder, "train")
    skipped = []
    assert len(folder_items(folder, skipped)) == 40 and len(skipped) == 1


def test_names_that_leave_their_folder_are_refused(tmp_path: Path) -> None:
    names = ["/a", "../a", "a/../../b", "a\\..\\..\\b", "C:\\a", "C:a", "\\\\host\\a", "a\0", " "]
    for name in names:
        with pytest.raises(ValueError, match="stay inside"):
            inside(tmp_path, name)


def test_captions_in_another_form_say_how_they_are_read(prepared: Path) -> None:
    (prepared / "train" / CAPTIONS_NAME).write_text('{"file_name": "a.jpg", "text": "A."}\n')
    message = r"none of the 1 lines .* needs the texts .*--source local --input-dir"
    with pytest.raises(DataError, match=message):
        open_data_folder(prepared)


def cut(root: Path, number: int) -> Path:
    path = root / f"train/images/train-{number:02}.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return path


def test_damaged_images_are_skipped_and_named(made: Path, tmp_path: Path) -> None:
    folder = CaptionFolder.open(made)
    recipe = Recipe(max_bad_samples=0, feature_cache=str(tmp_path / "features"))
    images = usable_images(folder, "train", recipe)
    assert images == folder.split("train")
    broken = [cut(made, 3), cut(made, 7)]
    logged = log_lines()
    usable = usable_images(folder, "train", recipe.replace(max_bad_samples=0.1))
    assert usable == [image for n, image in enumerate(images) if n not in (3, 7)]
    assert len(logged) == 1 and logged[0].startswith("skipped 2 of 24 train images")
    assert all(str(path) in logged[0] for path in broken)
    with pytest.raises(DataError, match=r"2 of 24 train images .* max_bad_samples=0"):
        usable_images(folder, "train", recipe)
    # Without a cache, training finds them as it reads them.
    assert usable_images(folder, "train", recipe.replace(feature_cache="off")) == images


def test_the_outcome_is_remembered_until_an_image_is_touched(made: Path, tmp_path: Path) -> None:
    path = cut(made, 5)
    paths = [image.path for image in CaptionFolder.open(made).split("train")]
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
    with pytest.raises(DataError, match=f"^6 of 9 rows .*{named}; a.csv:50: not UTF-8 text.*$"):
        skipped.check(at_least=6)
