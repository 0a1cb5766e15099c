"""Flickr30k in the caption files and the folders that people have it in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.sources.flickr import Flickr30k
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError

NAMES = [f"{1000092795 + n}.jpg" for n in range(20)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures in the folder of the authors' archive; no captions yet."""
    write_pictures(tmp_path / "flickr30k" / "flickr30k-images")
    return tmp_path / "flickr30k"


def write_pictures(folder: Path, names: list[str] = NAMES) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        Image.new("RGB", (12, 8), (index * 12, 80, 255 - index * 9)).save(folder / name)


def write_token_file(path: Path, names: list[str] = NAMES) -> None:
    lines = [
        f"{name}#{n}\tPicture {name[:-4]} , wording {n} .\n" for name in names for n in range(5)
    ]
    path.write_text("".join(lines), encoding="utf-8")


def karpathy_image(name: str, split: str) -> dict[str, Any]:
    sentences = [
        {"tokens": ["a"], "raw": f"Raw {name[:-4]} .", "imgid": 0, "sentid": n} for n in range(5)
    ]
    return {
        "sentids": [0, 1, 2, 3, 4],
        "imgid": 0,
        "sentences": sentences,
        "split": split,
        "filename": name,
    }


def write_karpathy(path: Path, splits: list[str]) -> None:
    images = [karpathy_image(name, split) for name, split in zip(NAMES, splits, strict=False)]
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))


def write_annotations(path: Path, splits: list[str]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for index, (name, split) in enumerate(zip(NAMES, splits, strict=False)):
            captions = [f'Two "young" guys, number {n}.' for n in range(5)]
            table.writerow([json.dumps(captions), "[0, 1, 2, 3, 4]", split, name, index])


def test_the_datasets_own_captions_are_split_by_hash(pictures: Path, tmp_path: Path) -> None:
    write_token_file(pictures / "results_20130124.token")
    manifest = transform(Flickr30k(pictures), tmp_path / "out")
    assert manifest["split_rule"].startswith("hash of (seed, image id)")
    assert "non-commercial" in manifest["licence_note"] and not manifest["rejected"]
    assert sum(counts["captions"] for counts in manifest["counts"].values()) == 100
    images = {
        image.original_id: image for image in CaptionFolder.open(tmp_path / "out").split("train")
    }
    some = next(iter(images))
    assert images[some].captions[3] == f"Picture {some}, wording 3."


def test_karpathys_splits_are_official(pictures: Path, tmp_path: Path) -> None:
    write_token_file(pictures / "results_20130124.token")
    write_karpathy(pictures / "dataset_flickr30k.json", ["train"] * 14 + ["val"] * 2 + ["test"] * 3)
    manifest = transform(Flickr30k(pictures), tmp_path / "out", val_fraction=0.5)
    assert [counts["images"] for counts in manifest["counts"].values()] == [14, 2, 3]
    assert manifest["split_rule"] == "Karpathy's splits (dataset_flickr30k.json)"
    assert manifest["rejected"] == [
        {"id": NAMES[19][:-4], "reason": "it is not in dataset_flickr30k.json"}
    ]


def test_the_table_with_raw_captions_has_the_splits_too(pictures: Path) -> None:
    write_annotations(pictures / "flickr_annotations_30k.csv", ["train"] * 18 + ["val", "test"])
    source = Flickr30k(pictures)
    items = source.items()
    assert [item.split for item in items[-3:]] == ["train", "val", "test"]
    assert items[0].captions[4] == 'Two "young" guys, number 4.'
    assert source.split_rule == "Karpathy's splits (flickr_annotations_30k.csv)"


def test_the_barred_table_is_read_but_for_its_broken_lines(tmp_path: Path) -> None:
    # As on Kaggle: the table lies beside a folder of its own folder's name.
    root = tmp_path / "archive"
    write_pictures(root / "flickr30k_images" / "flickr30k_images", [*NAMES[:2], "2199200615.jpg"])
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {n}| A man , in {name} | outside ." for name in NAMES[:2] for n in range(5)]
    lines += [f"2199200615.jpg| {n}| A dog ." for n in range(4)]
    lines += ["2199200615.jpg| 4   A dog runs across the grass .", "nonsense"]
    (root / "flickr30k_images" / "results.csv").write_text("\n".join(lines) + "\n")
    source = Flickr30k(root)
    items = {item.image_id: item for item in source.items()}
    assert [len(item.captions) for item in items.values()] == [5, 5, 4]
    assert items[NAMES[0][:-4]].captions[0] == f"A man , in {NAMES[0]} | outside ."
    assert [(entry.id, entry.reason) for entry in source.rejected] == [
        (f"results.csv:{line}", f"{cells} cells instead of 3 (image_name|comment_number|comment)")
        for line, cells in ((16, 2), (17, 1))
    ]
    assert source.split_rule is None


@pytest.mark.parametrize("folder", ["Images", "flickr30k_images"])
@pytest.mark.parametrize("header", ["image,caption", "\ufeffimage_name,comment_number,comment"])
def test_the_table_of_the_copies_on_kaggle_is_read_as_csv(
    tmp_path: Path, folder: str, header: str
) -> None:
    write_pictures(tmp_path / folder)
    number = '"0",' if "number" in header else ""
    rows = [f'{name},{number}" Two ""young"" guys , with a dog ."' for name in NAMES]
    rows += [f"{name},{number} A man walks ." for name in NAMES]
    rows += [f"{NAMES[0]},{number} A man , walking .", f',{number}"No image ."', ""]
    (tmp_path / "captions.txt").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    source = Flickr30k(tmp_path)
    items = source.items()
    assert [item.image_id for item in items] == [name[:-4] for name in NAMES]
    assert items[0].captions == [' Two "young" guys , with a dog .', "A man walks ."]
    assert [item.id for item in source.rejected] == ["captions.txt:42", "captions.txt:43"]
    assert (
        "in double quotes" in source.rejected[0].reason and "no image" in source.rejected[1].reason
    )
    manifest = transform(source, tmp_path / "out")
    assert sum(counts["captions"] for counts in manifest["counts"].values()) == 40


@pytest.mark.parametrize(
    "folder", ["flickr30k-images", "flickr30k_images", "Images", "images", "."]
)
def test_folders_of_pictures(tmp_path: Path, folder: str) -> None:
    if folder == ".":
        for index, name in enumerate(NAMES):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name)
    else:
        write_pictures(tmp_path / folder)
    write_token_file(tmp_path / "results_20130124.token")
    assert len(Flickr30k(tmp_path).items()) == 20


def test_missing_and_extra_pictures_are_set_aside(pictures: Path) -> None:
    write_token_file(pictures / "results_20130124.token", [*NAMES[:18], "../../../secret.jpg"])
    (pictures / "flickr30k-images" / NAMES[0]).unlink()
    source = Flickr30k(pictures)
    assert len(source.items()) == 17
    assert {entry.id: entry.reason for entry in source.rejected} == {
        NAMES[0][:-4]: "its image is missing",
        "secret": "image path '../../../secret.jpg' must be relative and stay inside "
        f"{pictures / 'flickr30k-images'}",
        NAMES[18][:-4]: "it is not in results_20130124.token",
        NAMES[19][:-4]: "it is not in results_20130124.token",
    }


def test_a_caption_file_may_lie_elsewhere(pictures: Path, tmp_path: Path) -> None:
    write_annotations(tmp_path / "mine.csv", ["val"] * 20)
    options = {"input_dir": pictures, "captions_file": tmp_path / "mine.csv"}
    assert {item.split for item in make_source("flickr30k", **options).items()} == {"val"}
    with pytest.raises(DataError, match="no such caption file"):
        make_source("flickr30k", input_dir=pictures, captions_file=tmp_path / "none.token")


def test_what_cannot_be_read_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is not flickr30k: it has none of dataset_flickr30k\.json"
    ):
        Flickr30k(pictures).items()
    (pictures / "results_20130124.token").write_text("1.jpg A man.\n")
    with pytest.raises(DataError, match=r"results_20130124\.token:1: the header must"):
        Flickr30k(pictures).items()
    write_token_file(pictures / "results_20130124.token", ["other.jpg"])
    with pytest.raises(DataError, match="none of the 1 images"):
        Flickr30k(pictures).items()
    (tmp_path / "none").mkdir()
    write_token_file(tmp_path / "none" / "results_20130124.token")
    with pytest.raises(DataError, match="no folder of images"):
        Flickr30k(tmp_path / "none").items()
