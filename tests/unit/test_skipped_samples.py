"""Samples that cannot be read are skipped, counted and named; too many of them are an error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from logs import log_lines
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.features import check_images
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped
from vlm_bridge.errors import DataError
from vlm_bridge.training_strategy.data import usable_images


@pytest.fixture
def folder(drawn_caption_folder: Path, tmp_path: Path) -> CaptionFolder:
    """A copy that a test may damage: 24 training images with two captions each."""
    return CaptionFolder.open(shutil.copytree(drawn_caption_folder, tmp_path / "data"))


def cut(folder: CaptionFolder, number: int) -> Path:
    path = folder.split("train")[number].path
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:400])
    return path


def read(folder: CaptionFolder, share: float, listing_dir: Path) -> list[CaptionedImage]:
    recipe = Recipe(max_bad_samples=share, feature_cache="off")
    return usable_images(folder, "train", recipe, listing_dir)


def test_damaged_images_are_skipped_and_named(folder: CaptionFolder, tmp_path: Path) -> None:
    listing = tmp_path / "set_aside_train.jsonl"
    listing.write_text("of an earlier run")
    images = folder.split("train")
    assert read(folder, 0, tmp_path) == images and not listing.exists()
    broken = [cut(folder, 3), cut(folder, 7)]
    lines = log_lines()
    expected = [image for n, image in enumerate(images) if n not in (3, 7)]
    assert read(folder, 0.1, tmp_path) == expected
    assert len(lines) == 1 and lines[0].startswith("skipped 2 of 24 train images")
    listed = [json.loads(line)["where"] for line in listing.read_text().splitlines()]
    assert listed == list(map(str, broken))


def test_above_the_share_training_stops_with_the_list(
    folder: CaptionFolder, tmp_path: Path
) -> None:
    for number in range(12):
        cut(folder, number)
    with pytest.raises(DataError, match=r"12 of 24 train images .* max_bad_samples=0.01") as caught:
        read(folder, 0.01, tmp_path)
    message, listing = str(caught.value), tmp_path / "set_aside_train.jsonl"
    assert message.count("train-") == 3 and "12 times" in message and "and 9 more" in message
    assert str(listing) in message
    assert "\n" not in message and len(listing.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"caption": "word " * 100_000}, "500,000 characters"),
        ({"caption": " \t "}, "empty caption"),
        ({"caption": "\ud800"}, "needs the texts"),
        ({"image_path": "../../secret.jpg"}, "stay inside"),
        ({"image_path": "images/" + "x" * 300}, "too long"),
        ({"image_path": "images/lost.jpg"}, "missing"),
        ({"image_path": "images/link.jpg"}, "leads out"),
    ],
)
def test_captions_that_cannot_be_used_are_skipped_and_the_others_stay(
    folder: CaptionFolder, tmp_path: Path, record: dict[str, str], reason: str
) -> None:
    expected = folder.split("train")
    shutil.copy(str(expected[0].path), tmp_path / "outside.jpg")
    (folder.root / "train" / "images" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    whole = {"image_path": "images/train-00.jpg", "caption": "A.", "original_id": "x"}
    with (folder.root / "train" / "captions.jsonl").open("a") as file:
        file.write(json.dumps({**whole, **record}) + "\n")
    skipped = Skipped("train captions")
    assert folder.split("train", skipped) == expected
    assert (len(skipped), skipped.total) == (1, 49)
    sample = skipped.samples[0]
    assert "captions.jsonl:49" in sample.id and reason in sample.reason
    with pytest.raises(DataError, match=reason):
        folder.split("train")


@pytest.mark.parametrize(
    "caption", ["مرحبا بالعالم", "👩‍🚀 waves", "<b>bold</b> &amp; more", "a\0b"]
)
def test_text_of_any_script_is_read_as_it_is(folder: CaptionFolder, caption: str) -> None:
    record = {"image_path": "images/train-00.jpg", "caption": caption, "original_id": "x"}
    (folder.root / "train" / "captions.jsonl").write_text(json.dumps(record) + "\n")
    assert folder.split("train")[0].captions == (caption,)


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


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "pipe" in check_images([tmp_path / "pipe.jpg"])[0]


def test_a_cause_is_named_once_with_its_count() -> None:
    skipped = Skipped("rows", total=100)
    for number in range(20):
        skipped.add(f"a.csv:{number}", f"{number + 3} cells where the header has 2")
    skipped.add("a.csv:50", "not UTF-8 text")
    assert skipped.summary() == (
        "20 times 3 cells where the header has 2: a.csv:0, a.csv:1, a.csv:2 and 17 more; "
        "a.csv:50: not UTF-8 text"
    )
    Skipped("rows", 2, skipped.samples[:2]).check(at_least=3)
    with pytest.raises(DataError, match="3 of 9 rows"):
        Skipped("rows", 9, skipped.samples[:3]).check(at_least=3)
