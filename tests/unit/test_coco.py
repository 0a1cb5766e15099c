"""COCO in its own layouts: years, folders and names of pictures, and the splits of COCO and of Karpathy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.sources.coco import Coco
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError


def add_picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade * 9 % 256, 90, 200 - shade)).save(path)


def write_annotations(root: Path, part: str, year: int, captions: dict[int, list[str]]) -> None:
    prefix = f"COCO_{part}2014_" if year == 2014 else ""
    records = [(coco_id, text) for coco_id, texts in captions.items() for text in texts]
    content = {
        "info": {"description": f"COCO {year} Dataset", "year": year},
        "licenses": [{"id": 4, "name": "Attribution License"}],
        "images": [
            {
                "id": coco_id,
                "file_name": f"{prefix}{coco_id:012d}.jpg",
                "license": 4,
                "height": 8,
                "width": 12,
            }
            for coco_id in captions
        ],
        "annotations": [
            {"image_id": coco_id, "id": number, "caption": text}
            for number, (coco_id, text) in enumerate(records)
        ],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"captions_{part}{year}.json").write_text(json.dumps(content))


def karpathy_image(coco_id: int, split: str, folder: str = "val2014") -> dict[str, Any]:
    return {
        "filepath": folder,
        "sentids": [coco_id * 5],
        "filename": f"COCO_{folder}_{coco_id:012d}.jpg",
        "imgid": coco_id,
        "split": split,
        "sentences": [
            {
                "tokens": ["a", "thing"],
                "raw": f"Thing number {coco_id}.",
                "imgid": coco_id,
                "sentid": coco_id * 5,
            }
        ],
        "cocoid": coco_id,
    }


def write_karpathy(path: Path, images: list[dict[str, Any]], dataset: str = "coco") -> Path:
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


@pytest.fixture
def coco2017(tmp_path: Path) -> Path:
    """Six training and three validation pictures of 2017 with two captions each."""
    root = tmp_path / "coco"
    for part, ids in (("train", range(1, 7)), ("val", range(7, 10))):
        write_annotations(root, part, 2017, {n: [f"Picture {n}.", f"Number {n}"] for n in ids})
        for n in ids:
            add_picture(root / f"{part}2017" / f"{n:012d}.jpg", n)
    return root


def test_coco_decides_train_and_val_and_test_is_empty(coco2017: Path, tmp_path: Path) -> None:
    manifest = transform(Coco(coco2017), tmp_path / "out")
    assert {split: counts["images"] for split, counts in manifest["counts"].items()} == {
        "train": 6, "val": 3, "test": 0,
    }  # fmt: skip
    assert (
        manifest["split_rule"].startswith("COCO 2017's own")
        and "test is empty" in manifest["split_rule"]
    )
    assert "CC BY 4.0" in manifest["licence_note"] and not manifest["rejected"]
    image = CaptionFolder.open(tmp_path / "out").split("val")[0]
    assert image.original_id == "000000000007" and image.captions == ("Picture 7.", "Number 7.")


@pytest.mark.parametrize(
    "folder",
    ["train2014/COCO_train2014_", "images/train2014/train2014/COCO_train2014_", "images/", ""],
)
def test_the_year_2014_in_its_folders(tmp_path: Path, folder: str) -> None:
    write_annotations(tmp_path, "train", 2014, {9: ["A meal."]})
    add_picture(tmp_path / f"{folder}000000000009.jpg", 9)
    source = Coco(tmp_path)
    (item,) = source.items()
    assert (item.image_id, item.split) == ("000000000009", "train")
    assert source.split_rule is not None and "2014" in source.split_rule


def test_the_newest_year_is_read_unless_one_is_named(coco2017: Path) -> None:
    write_annotations(coco2017, "val", 2014, {2: ["Two."]})
    assert len(Coco(coco2017).items()) == 9
    (item,) = Coco(coco2017, year=2014).items()
    assert (item.image_id, item.split) == ("000000000002", "val")
    with pytest.raises(DataError, match=r"neither annotations/captions_train2015\.json"):
        Coco(coco2017, year=2015).items()


def test_karpathy_names_2014_and_the_pictures_of_2017_are_found(coco2017: Path) -> None:
    images = [
        karpathy_image(n, split)
        for n, split in enumerate(["train", "restval", "val", "test"], start=1)
    ]
    images.append(karpathy_image(7, "test"))
    write_karpathy(coco2017 / "dataset_coco.json", images)
    source = Coco(coco2017)
    splits = {item.image_id: item.split for item in source.items()}
    assert list(splits.values()) == ["train", "train", "val", "test", "test"]
    assert source.split_rule == "Karpathy's splits (dataset_coco.json), restval in train"
    assert source.items()[4].path == coco2017 / "val2017" / "000000000007.jpg"

    without = Coco(coco2017, restval=False)
    assert [item.split for item in without.items()] == ["train", "val", "test", "test"]
    assert [(entry.id, entry.reason) for entry in without.rejected] == [
        ("restval", "1 images left out (--no-restval)")
    ]
    assert "restval left out" in str(without.split_rule)
    assert {item.split for item in Coco(coco2017, year=2017).items()} == {"train", "val"}


def test_karpathys_file_may_lie_elsewhere(coco2017: Path, tmp_path: Path) -> None:
    elsewhere = write_karpathy(tmp_path / "splits.json", [karpathy_image(1, "test")])
    options = {"input_dir": coco2017, "captions_file": elsewhere}
    assert [item.split for item in make_source("coco", **options).items()] == ["test"]
    with pytest.raises(DataError, match=r"no such caption file: .*none\.json"):
        make_source("coco", input_dir=coco2017, captions_file=tmp_path / "none.json")


def test_missing_pictures_and_captions_are_set_aside(coco2017: Path) -> None:
    (coco2017 / "train2017" / "000000000003.jpg").unlink()
    write_annotations(coco2017, "val", 2017, {7: [], 8: ["Eight."]})
    source = Coco(coco2017)
    assert len(source.items()) == 6
    assert {entry.id: entry.reason for entry in source.rejected} == {
        "000000000003": "its image is missing",
        "000000000007": "it has no caption",
    }


def test_an_annotation_of_an_unlisted_image_is_one_skipped_caption(coco2017: Path) -> None:
    path = coco2017 / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"image_id": 99, "id": 4711, "caption": "Of nothing."})
    path.write_text(json.dumps(content))
    source = Coco(coco2017)
    assert len(source.items()) == 9
    assert [(entry.id, entry.reason) for entry in source.rejected] == [
        ("captions_val2017.json: annotation 4711", "its image 99 is not among the images listed")
    ]


def test_linked_images_need_to_be_allowed(coco2017: Path, tmp_path: Path) -> None:
    (coco2017 / "train2017").rename(tmp_path / "elsewhere")
    (coco2017 / "train2017").symlink_to(tmp_path / "elsewhere")
    source = Coco(coco2017)
    assert len(source.items()) == 3
    assert [r.id for r in source.rejected if "--follow-links" in r.reason] == ["train2017"]
    assert len(Coco(coco2017, follow_links=True).items()) == 9
    link = tmp_path / "link"
    link.symlink_to(coco2017)
    assert len(Coco(link).items()) == 3


BROKEN_ANNOTATIONS = {
    "no JSON": "{",
    "no images": json.dumps({"annotations": []}),
    "a list": "[]",
    "a number as caption": json.dumps(
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 1, "caption": 5}]}
    ),
}


@pytest.mark.parametrize("case", BROKEN_ANNOTATIONS)
def test_damaged_annotations_are_named(coco2017: Path, case: str) -> None:
    (coco2017 / "annotations" / "captions_val2017.json").write_text(BROKEN_ANNOTATIONS[case])
    with pytest.raises(DataError, match=r"captions_val2017\.json is damaged"):
        Coco(coco2017).items()


BROKEN_KARPATHY = {
    "no JSON": ("{", "is damaged"),
    "no images": ("{}", "no list of images"),
    "no sentences": (json.dumps({"images": [{"filename": "a", "split": "val"}]}), "image 0 lacks"),
    "unknown split": (
        json.dumps({"images": [karpathy_image(1, "devel")]}),
        "unknown split 'devel'",
    ),
    "a number as text": (
        json.dumps({"images": [karpathy_image(1, "val") | {"filename": 3}]}),
        "3 is no image of COCO",
    ),
}


@pytest.mark.parametrize("case", BROKEN_KARPATHY)
def test_damaged_split_files_are_named(coco2017: Path, case: str) -> None:
    content, message = BROKEN_KARPATHY[case]
    (coco2017 / "dataset_coco.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Coco(coco2017).items()


def test_what_is_not_coco_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not COCO.*vlm-data download coco"):
        Coco(tmp_path).items()
    write_annotations(tmp_path, "train", 2017, {1: ["One."]})
    with pytest.raises(DataError, match=r"none of the 1 captioned images.*train2017, val2017"):
        Coco(tmp_path).items()
