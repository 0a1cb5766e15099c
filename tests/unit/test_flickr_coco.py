"""Flickr8k, Flickr30k and COCO in the files and folders that people have them in."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources.flickr_coco import Coco, Flickr8k, Flickr30k
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError

NAMES = [f"{1000092795 + n}.jpg" for n in range(20)]


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = random.Random(name).randbytes(12 * 8 * 3)
        Image.frombytes("RGB", (12, 8), pixels).save(folder / name)


def write_karpathy(path: Path, splits: dict[str, str]) -> Path:
    images = [
        {"filename": n, "split": s, "sentences": [{"raw": f"Raw {k} of {n}."} for k in range(2)]}
        for n, s in splits.items()
    ]
    path.write_text(json.dumps({"images": images, "dataset": "any"}))
    return path


def test_flickr8k_follows_the_official_lists(tmp_path: Path) -> None:
    write_images(tmp_path / "Images", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    rows = [f"{image}.jpg#{n}\tcaption {n} of {image} ." for image in (1, 2, 3, 5) for n in (0, 1)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("2.jpg\n4.jpg\n6.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("1.jpg\n")
    source = Flickr8k(tmp_path)
    assert [(item.image_id, item.split, item.captions) for item in source.items()] == [
        ("2", "train", ["caption 0 of 2 .", "caption 1 of 2 ."]),
        ("1", "val", ["caption 0 of 1 .", "caption 1 of 1 ."]),
    ]
    assert {item.id: item.reason for item in source.rejected} == {
        "Flickr8k.token.txt:7": "its image '5.jpg' is missing",
        "3.jpg": "it is in no split list",
    }


@pytest.mark.parametrize("folder", ["Images", "Images/Images", "Flicker8k_Dataset", "."])
def test_flickr8k_without_its_lists(tmp_path: Path, folder: str) -> None:
    write_images(tmp_path / folder, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    rows = [f"{n}.jpg,caption {k} of {n} ." for n in (1, 2, 3, 9) for k in (0, 1)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))  # as on Kaggle
    source = Flickr8k(tmp_path)
    splits = {item.image_id: item.split for item in source.items()}
    assert splits == {"1": None, "2": None, "3": None} and source.split_rule is None
    splits = {"1.jpg": "train", "2.jpg": "val", "3.jpg": "test"}
    write_karpathy(tmp_path / "dataset_flickr8k.json", splits)
    assert [item.split for item in source.items()] == ["train", "val", "test"]
    assert source.split_rule == "Karpathy's splits (dataset_flickr8k.json)"


@pytest.fixture
def flickr30k(tmp_path: Path) -> Path:
    """Twenty images in the folder of the authors' archive; no captions yet."""
    write_images(tmp_path / "flickr30k" / "flickr30k-images", *NAMES)
    return tmp_path / "flickr30k"


def test_captions_without_splits_are_split_by_hash(flickr30k: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not flickr30k"):
        Flickr30k(flickr30k).items()
    lines = [f"{name}#{n}\tWording {n} of {name[:-4]} .\n" for name in NAMES for n in range(5)]
    (flickr30k / "results_20130124.token").write_text("".join(lines))
    manifest = transform(Flickr30k(flickr30k), tmp_path / "out")
    assert manifest["split_rule"].startswith("hash of (seed, image id)")
    assert "non-commercial" in manifest["licence_note"] and not manifest["rejected"]
    assert sum(counts["captions"] for counts in manifest["counts"].values()) == 100
    image = CaptionFolder.open(tmp_path / "out").split("train")[0]
    assert image.captions[3] == f"Wording 3 of {image.original_id}."


def test_the_table_with_raw_captions_has_the_splits_too(flickr30k: Path) -> None:
    splits = ["train"] * 18 + ["val", "test"]
    captions = json.dumps([f'Two "young" guys, number {n}.' for n in range(5)])
    with (flickr30k / "flickr_annotations_30k.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for index, (name, split) in enumerate(zip(NAMES, splits, strict=True)):
            rows.writerow([captions, "[0, 1, 2, 3, 4]", split, name, index])
    source = Flickr30k(flickr30k)
    items = source.items()
    assert [item.split for item in items] == splits
    assert items[0].captions[4] == 'Two "young" guys, number 4.'
    assert source.split_rule == "Karpathy's splits (flickr_annotations_30k.csv)"


def test_the_barred_table_is_read_but_for_its_broken_lines(tmp_path: Path) -> None:
    root = tmp_path / "flickr30k_images"  # as on Kaggle, beside a folder of its own name
    write_images(root / "flickr30k_images", *NAMES[:3])
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {n}| A man , in {name} | outside ." for name in NAMES[:3] for n in range(5)]
    lines += [f"{NAMES[2]}| 5   A dog runs across the grass .", "nonsense"]
    (root / "results.csv").write_text("\n".join(lines) + "\n")
    source = Flickr30k(tmp_path)
    captions = [item.captions for item in source.items()]
    assert captions == [[f"A man , in {name} | outside ."] * 5 for name in NAMES[:3]]
    assert [entry.id for entry in source.rejected] == ["results.csv:17", "results.csv:18"]
    assert "2 cells instead of 3 (image_name|" in source.rejected[0].reason


def test_the_table_of_the_copies_on_kaggle_is_read_as_csv(tmp_path: Path) -> None:
    write_images(tmp_path / "flickr30k_images", *NAMES)
    rows = ["\ufeffimage_name,comment_number,comment"]
    rows += [f'{name},"0"," Two ""young"" guys , with a dog ."' for name in NAMES]
    rows += [f'{name},"1", A man walks .' for name in NAMES]
    rows += [f'{NAMES[0]},"2", A man , walking .', ',"0","No image ."', "\n"]
    (tmp_path / "captions.txt").write_text("\n".join(rows), encoding="utf-8")
    source = Flickr30k(tmp_path)
    captions = [' Two "young" guys , with a dog .', "A man walks ."]
    assert [item.captions for item in source.items()] == [captions] * len(NAMES)
    assert [item.id for item in source.rejected] == ["captions.txt:42", "captions.txt:43"]


def write_annotations(root: Path, part: str, year: int, captions: dict[int, list[str]]) -> None:
    prefix = f"COCO_{part}2014_" if year == 2014 else ""
    pairs = [(coco_id, text) for coco_id, texts in captions.items() for text in texts]
    content = {
        "images": [{"id": n, "file_name": f"{prefix}{n:012d}.jpg"} for n in captions],
        "annotations": [{"image_id": coco_id, "caption": text} for coco_id, text in pairs],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"captions_{part}{year}.json").write_text(json.dumps(content))


@pytest.fixture
def coco2017(tmp_path: Path) -> Path:
    """Six training and three validation images of 2017 with two captions each."""
    root = tmp_path / "coco"
    for part, ids in (("train", range(1, 7)), ("val", range(7, 10))):
        write_annotations(root, part, 2017, {n: [f"Image {n}.", f"Number {n}"] for n in ids})
        write_images(root / f"{part}2017", *(f"{n:012d}.jpg" for n in ids))
    return root


def test_coco_decides_train_and_val_and_test_is_empty(coco2017: Path, tmp_path: Path) -> None:
    manifest = transform(Coco(coco2017), tmp_path / "out")
    assert [counts["images"] for counts in manifest["counts"].values()] == [6, 3, 0]
    assert manifest["split_rule"].startswith("COCO 2017's own train and val; test is empty")
    assert "CC BY 4.0" in manifest["licence_note"] and not manifest["rejected"]
    image = CaptionFolder.open(tmp_path / "out").split("val")[0]
    assert image.original_id == "000000000007" and image.captions == ("Image 7.", "Number 7.")


@pytest.mark.parametrize("name", ["images/train2014/train2014/COCO_train2014_", "images/", ""])
def test_the_year_2014_in_its_folders(tmp_path: Path, name: str) -> None:
    write_annotations(tmp_path, "train", 2014, {9: ["A meal."]})
    path = tmp_path / f"{name}000000000009.jpg"
    write_images(path.parent, path.name)
    source = Coco(tmp_path)
    (item,) = source.items()
    assert (item.image_id, item.split) == ("000000000009", "train")
    assert "2014" in str(source.split_rule)


def test_karpathy_names_2014_and_the_images_of_2017_are_found(coco2017: Path) -> None:
    splits = dict(enumerate(("train", "restval", "val", "test"), start=1)) | {7: "test"}
    named = {f"COCO_val2014_{n:012d}.jpg": split for n, split in splits.items()}
    karpathy = write_karpathy(coco2017 / "dataset_coco.json", named)
    source = Coco(coco2017)
    items = source.items()
    assert [item.split for item in items] == ["train", "train", "val", "test", "test"]
    assert source.split_rule == "Karpathy's splits (dataset_coco.json), restval in train"
    assert items[4].image == coco2017 / "val2017" / "000000000007.jpg"
    without = Coco(coco2017, restval=False)
    assert len(without.items()) == 4 and "restval left out" in str(without.split_rule)
    assert {item.split for item in Coco(coco2017, year=2017).items()} == {"train", "val"}
    elsewhere = karpathy.rename(coco2017.parent / "splits.json")
    assert len(Coco(coco2017, captions_file=elsewhere).items()) == 5


def test_missing_images_and_captions_are_skipped(coco2017: Path) -> None:
    (coco2017 / "train2017" / "000000000003.jpg").unlink()
    write_annotations(coco2017, "val", 2017, {7: [], 8: ["Eight."]})
    path = coco2017 / "annotations" / "captions_val2017.json"
    more = '"annotations": [{"image_id": 99, "id": 4711, "caption": "Of nothing."}, '
    path.write_text(path.read_text().replace('"annotations": [', more))
    source = Coco(coco2017)
    assert len(source.items()) == 6
    assert {entry.id: entry.reason for entry in source.rejected} == {
        "captions_train2017.json: image 3": "its image '000000000003.jpg' is missing",
        "captions_val2017.json: image 99": "its image '99 (not listed)' is missing",
    }


def test_the_newest_year_is_read_unless_one_is_named(coco2017: Path) -> None:
    path = coco2017 / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text().replace('"file_name"', '"name"'))  # found by their ids
    write_annotations(coco2017, "val", 2014, {2: ["Two."]})
    assert len(Coco(coco2017).items()) == 9
    assert [item.image_id for item in Coco(coco2017, year=2014).items()] == ["000000000002"]


def test_folders_without_coco_or_its_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not COCO.*vlm-data download coco"):
        Coco(tmp_path).items()
    write_annotations(tmp_path, "train", 2017, {1: ["One."]})
    with pytest.raises(DataError, match=r"no image in .*'000000000001.jpg' is missing"):
        Coco(tmp_path).items()
