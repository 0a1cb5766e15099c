"""Datasets in their own layouts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import get_args

import pytest

from vlm_bridge.cli.data import CaptionStyleName, SourceName, SplitByName
from vlm_bridge.data_pipeline.captions import CAPTION_STYLES
from vlm_bridge.data_pipeline.sources import (
    SOURCES,
    Rejected,
    find_source,
    make_source,
)
from vlm_bridge.data_pipeline.sources.flickr import Flickr8k
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.splits import SplitBy
from vlm_bridge.errors import DataError, UsageError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three pictures (sources look at names only)."""
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def captions_by_id(folder: Path, captions_file: Path | None = None) -> dict[str, list[str]]:
    return {item.image_id: item.captions for item in LocalFolder(folder, captions_file).items()}


EXPECTED = {"a": ["A dog.", 'A "wet", happy dog.'], "sub/c": ["A cat."]}
CAPTION_FILES = {
    "captions.csv": 'image,caption\na.jpg,A dog.\na.jpg,"A ""wet"", happy dog."\nsub/c.jpg,A cat.\n',
    "captions.tsv": 'a.jpg\tA dog.\na.jpg\tA "wet", happy dog.\nsub/c.jpg\tA cat.\n',
    "captions.txt": '\ufeffimage,caption\r\na.jpg,A dog.\r\na.jpg,"A ""wet"", happy dog."\r\n'
    "sub/c.jpg,A cat.\r\n",
    "captions.jsonl": '{"image": "a.jpg", "captions": ["A dog.", "A \\"wet\\", happy dog."]}\n'
    '\n{"image": "sub/c.jpg", "caption": "A cat."}\n',
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "A dog."}\n'
    '{"file_name": "a.jpg", "text": "A \\"wet\\", happy dog."}\n'
    '{"file_name": "sub/c.jpg", "text": "A cat."}\n',
    "metadata.csv": 'file_name;text\na.jpg;A dog.\na.jpg;"A ""wet"", happy dog."\nsub/c.jpg;A cat.\n',
}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_caption_files_are_found_and_say_the_same(pictures: Path, name: str) -> None:
    (pictures / name).write_bytes(CAPTION_FILES[name].encode())
    source = LocalFolder(pictures)
    assert {item.image_id: item.captions for item in source.items()} == EXPECTED
    assert [(r.id, r.reason) for r in source.rejected] == [("b.png", "it has no caption")]


def test_a_quoted_caption_may_hold_a_line_break(pictures: Path) -> None:
    (pictures / "captions.csv").write_text('image,caption\na.jpg,"A\ndog."\nb.png,A cat.\n')
    assert captions_by_id(pictures) == {"a": ["A\ndog."], "b": ["A cat."]}


def test_pictures_may_lie_in_an_images_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    (tmp_path / "captions.tsv").write_text("a.jpg\tA dog.\n")
    assert captions_by_id(tmp_path) == {"images/a": ["A dog."]}


def test_a_caption_file_elsewhere(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.tsv"
    elsewhere.write_text("a.jpg\tA dog.\n")
    assert captions_by_id(pictures, elsewhere) == {"a": ["A dog."]}


def test_equal_stems_keep_their_suffix(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "captions.tsv").write_text("a.jpg\tOne.\na.png\tTwo.\nb.jpg\tThree.\n")
    assert list(captions_by_id(tmp_path)) == ["a.jpg", "a.png", "b"]


def test_splits_from_a_column_and_from_folders(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "train/c.jpg", "validation/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, line in (("train", "c.jpg"), ("validation", "d.jpg")):
        record = json.dumps({"file_name": line, "text": "x"})
        (tmp_path / name / "metadata.jsonl").write_text(record)
    assert [(i.image_id, i.split) for i in LocalFolder(tmp_path).items()] == [
        ("train/c", "train"),
        ("validation/d", "val"),
    ]
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,x,dev\nb.jpg,y,\n")
    assert [item.split for item in LocalFolder(tmp_path).items()] == ["val", None]


def test_captions_of_missing_pictures_are_set_aside(pictures: Path) -> None:
    (pictures / "captions.tsv").write_text("a.jpg\tA dog.\nlost.jpg\tA cat.\n")
    source = LocalFolder(pictures)
    assert len(source.items()) == 1
    assert source.rejected[0] == Rejected("lost.jpg (captions.tsv:2)", "its image is missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"image,caption\na.jpg,caf\xe9\n", r"captions.csv:2: not UTF-8"),
        ("captions.jsonl", b'{"image": "a.jpg", "caption": "caf\xe9"}\n', r"captions.jsonl:1: not UTF-8"),
        ("captions.tsv", b"/etc/passwd\tA cat.\n", r"captions.tsv:1: image path .* inside"),
        ("captions.tsv", b"../a.jpg\tA dog.\n", r"captions.tsv:1: image path .* inside"),
        ("captions.tsv", b"sub\\..\\..\\a.jpg\tA dog.\n", r"captions.tsv:1: image path .* inside"),
        ("captions.tsv", b"C:\\a.jpg\tA dog.\n", r"captions.tsv:1: image path .* inside"),
        ("captions.tsv", b"b.png A cat.\n", r"captions.tsv:1: 1 cells instead of 2"),
        ("captions.csv", b"a.jpg,A dog.\n", r"captions.csv:1: the header must name"),
        ("captions.csv", b"image,caption\na.jpg,A dog, wet.\n", r"captions.csv:2: 3 cells"),
        ("captions.csv", b'image,caption\na.jpg,"A dog\n', r"captions.csv:2: a double quote opens here"),
        ("captions.csv", b"image,caption,split\na.jpg,A dog.,fold1\n", r"captions.csv:2: unknown split"),
        ("captions.csv", b"image,caption,split\na.jpg,x,train\na.jpg,y,test\n", r"csv:3: .* several splits"),
        ("captions.jsonl", b'{"image": "a.jpg"}\n', r"captions.jsonl:1: has no caption"),
        ("captions.jsonl", b'{"caption": "A dog."}\n', r"captions.jsonl:1: names no image"),
        ("captions.jsonl", b"[1]\n", r"captions.jsonl: entry 0: not a JSON object"),
        ("captions.json", b"{", r"captions.json is not JSON"),
        ("captions.json", b'{"a": 1}', r"captions.json is no caption file"),
        ("captions.jsonl", b"{'a': 1}\n", r"captions.jsonl:1: not a JSON object"),
        ("captions.csv", b"", r"empty"),
        ("captions.tsv", b"lost.jpg\tA dog.\n", r"1 of 1 images in the caption file are missing"),
    ],
)  # fmt: skip
def test_malformed_caption_files_name_file_and_line(
    pictures: Path, name: str, content: bytes, message: str
) -> None:
    (pictures / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        LocalFolder(pictures).items()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (unicodedata.normalize("NFD", "caf\u00e9.jpg"), "caf\u00e9.jpg"),
        ("IMG_1.JPG", "img_1.jpg"),
        ("sub/a.jpg", "sub\\a.jpg"),
        ("images/1000.jpg", "1000"),
        ("v1.0.png", "v1.0"),
        ("a.jpg", "a.jpg#0"),
        ("Images/a b.jpg", "A B#3"),
    ],
)
def test_names_in_another_spelling_find_their_image(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    assert [item.path for item in LocalFolder(tmp_path).items()] == [tmp_path / file]


def test_a_name_that_fits_several_files_is_skipped(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "captions.tsv").write_text("a\tA dog.\nb\tA cat.\n")
    source = LocalFolder(tmp_path)
    assert [item.image_id for item in source.items()] == ["b"]
    assert "fits several files (a.jpg, a.png)" in source.rejected[0].reason


def test_many_missing_images_are_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    for n in range(10):
        (tmp_path / f"dog_{n}.jpg").touch()

    def read(missing: int) -> int:
        names = [f"dog_{n}.jpg" for n in range(10)] + [f"dogs-{n}.jpg" for n in range(missing)]
        (tmp_path / "captions.tsv").write_text("".join(f"{name}\tx\n" for name in names))
        return len(LocalFolder(tmp_path).items())

    assert read(missing=2) == 10
    with pytest.raises(
        DataError, match=r"3 of 13 images .* dogs-0.jpg \(captions.tsv:11\), .* dog_0.jpg"
    ):
        read(missing=3)


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_a_folder_that_is_a_split_decides(tmp_path: Path, name: str) -> None:
    names = ("train/a.jpg", "images/test/b.jpg", "dev/c.jpg", "other/d.jpg")
    for file in names:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    lines = [json.dumps({"file_name": file, "text": "x"}) for file in names]
    (tmp_path / name).write_text("\n".join(lines))
    assert [item.split for item in LocalFolder(tmp_path).items()] == ["train", "test", "val", None]


def test_a_split_that_contradicts_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.jpg").touch()
    (tmp_path / "captions.csv").write_text("image,caption,split\ntest/a.jpg,x,train\n")
    with pytest.raises(DataError, match=r"test by its folder test, train by captions.csv:2"):
        LocalFolder(tmp_path).items()
    (tmp_path / "captions.csv").rename(tmp_path / "test" / "captions.csv")
    with pytest.raises(DataError, match=r"captions.csv:2: .* several splits"):
        LocalFolder(tmp_path).items()


def test_links_that_lead_out_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    (root / "a.jpg").touch()
    (elsewhere / "b.jpg").touch()
    (root / "b.jpg").symlink_to(elsewhere / "b.jpg")
    (root / "more").symlink_to(elsewhere)
    (root / "c.jpg").symlink_to(root / "a.jpg")
    (root / "captions.tsv").write_text("a.jpg\tx\nb.jpg\ty\nmore/b.jpg\tz\nc.jpg\tw\n")
    source = LocalFolder(root)
    assert [item.image_id for item in source.items()] == ["a", "c"]
    assert [r.id for r in source.rejected if "--follow-links" in r.reason] == ["b.jpg", "more"]
    assert len(LocalFolder(root, follow_links=True).items()) == 4
    (tmp_path / "link").symlink_to(root)
    assert len(LocalFolder(tmp_path / "link").items()) == 2


def test_a_link_to_a_folder_within_is_another_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "images").symlink_to(tmp_path / "photos")
    (tmp_path / "captions.tsv").write_text("a.jpg\tx\n")
    source = LocalFolder(tmp_path)
    assert [item.captions for item in source.items()] == [["x"]] and not source.rejected


def test_images_that_are_all_linked_say_how_to_read_them(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "x" / "a.jpg").touch()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "x")
    (tmp_path / "root" / "captions.tsv").write_text("a.jpg\tx\n")
    with pytest.raises(DataError, match="give --follow-links"):
        LocalFolder(tmp_path / "root").items()


def test_a_caption_folder_made_inside_is_not_taken_for_images(pictures: Path) -> None:
    (pictures / "captions.tsv").write_text("a.jpg\tA dog.\nb.png\tx\nsub/c.jpg\ty\n")
    (pictures / "out" / ".unfinished").mkdir(parents=True)
    (pictures / "out" / "d.jpg").touch()
    source = LocalFolder(pictures)
    assert len(source.items()) == 3 and not source.rejected


def test_no_caption_file_or_several(pictures: Path) -> None:
    with pytest.raises(DataError, match="no caption file"):
        LocalFolder(pictures).items()
    for name in ("captions.csv", "captions.tsv"):
        (pictures / name).touch()
    with pytest.raises(DataError, match="several caption files"):
        LocalFolder(pictures).items()


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    (tmp_path / "Images").mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        (tmp_path / "Images" / name).touch()
    captions = [
        f"{image}.jpg#{n}\tcaption {n} of {image} ." for image in (1, 2, 3, 5) for n in (0, 1)
    ]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(captions) + "\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("2.jpg\n4.jpg\n6.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("1.jpg\n")
    return tmp_path


def test_flickr8k_follows_the_official_lists(flickr: Path) -> None:
    source = Flickr8k(flickr)
    assert [(item.image_id, item.split) for item in source.items()] == [
        ("2", "train"),
        ("1", "val"),
    ]
    assert source.items()[0].captions == ["caption 0 of 2 .", "caption 1 of 2 ."]
    reasons = {item.id: item.reason for item in source.rejected}
    assert reasons.keys() == {"3", "4", "5", "6"}
    assert "no split list" in reasons["3"] and "no caption" in reasons["4"]
    assert reasons["5"] == reasons["6"] == "its image is missing"


def test_flickr8k_as_it_is_on_kaggle(flickr: Path) -> None:
    for name in ("Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"):
        (flickr / name).unlink()
    rows = [f"{n}.jpg,caption {k} of {n} ." for n in (1, 2, 3, 9) for k in (0, 1)]
    (flickr / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    source = Flickr8k(flickr)
    assert [(item.image_id, item.split) for item in source.items()] == [
        ("1", None),
        ("2", None),
        ("3", None),
    ]
    assert source.split_rule is None and source.rejected == [
        Rejected("4", "it is not in captions.txt"),
        Rejected("9", "its image is missing"),
    ]


def test_flickr8k_with_karpathys_splits(flickr: Path) -> None:
    for name in ("Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"):
        (flickr / name).unlink()
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"of {n}"}]}
        for n, split in ((1, "train"), (2, "val"), (3, "test"))
    ]
    (flickr / "dataset_flickr8k.json").write_text(
        json.dumps({"dataset": "flickr8k", "images": images})
    )
    source = Flickr8k(flickr)
    assert [item.split for item in source.items()] == ["train", "val", "test"]
    assert source.split_rule == "Karpathy's splits (dataset_flickr8k.json)"


def test_linked_images_of_flickr8k_say_how_to_read_them(flickr: Path, tmp_path: Path) -> None:
    (flickr / "Images").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (flickr / "Images").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(DataError, match=r"Images is a link that leads out .* --follow-links"):
        Flickr8k(flickr).items()
    assert len(Flickr8k(flickr, follow_links=True).items()) == 2


def test_damaged_lines_of_flickr8k_are_skipped_up_to_a_share(flickr: Path) -> None:
    token = flickr / "Flickr8k.token.txt"
    whole = token.read_bytes()
    token.write_bytes(b"../2.jpg#0\tx\n2.jpg#0 x\n2.jpg#1\t\xff\n" + whole)
    source = Flickr8k(flickr)
    assert len(source.items()) == 2
    reasons = [rejected.reason for rejected in source.rejected]
    assert "1 cells instead of 2 (image\tcaption)" in reasons and "not UTF-8 text" in reasons
    token.write_bytes(whole + b"2.jpg#0 x\n" * 3)
    with pytest.raises(DataError, match=r"3 of 11 rows of Flickr8k.token.txt cannot be used"):
        Flickr8k(flickr).items()
    token.unlink()
    with pytest.raises(DataError, match="is not flickr8k"):
        Flickr8k(flickr).items()


def test_an_image_in_two_lists_is_refused(flickr: Path) -> None:
    (flickr / "Flickr_8k.testImages.txt").write_text("2.jpg\n")
    with pytest.raises(
        DataError, match=r"testImages.txt:1: 2.jpg is listed twice \(also in train\)"
    ):
        Flickr8k(flickr).items()


def test_sources_by_name(tmp_path: Path) -> None:
    assert set(SOURCES) == {name.value for name in SourceName}
    assert set(CAPTION_STYLES) == {name.value for name in CaptionStyleName}
    assert set(get_args(SplitBy)) == {name.value for name in SplitByName}
    assert make_source("scenes", num_train=1, num_val=2, num_test=3).items()[-1].split == "test"
    with pytest.raises(UsageError, match="unknown source"):
        make_source("flickr9k")
    with pytest.raises(UsageError, match="--input-dir"):
        make_source("local")
    with pytest.raises(DataError, match="no such folder"):
        make_source("local", input_dir=tmp_path / "missing")


def test_the_source_of_a_folder_is_found_out(tmp_path: Path, flickr: Path) -> None:
    assert find_source()[0] == "groundcap"
    assert find_source(input_dir=flickr) == ("flickr8k", "Flickr8k.token.txt")
    folders = {
        "annotations/captions_val2017.json": "coco",
        "dataset_flickr30k.json": "flickr30k",
        "results.csv": "flickr30k",
        "captions.txt": "local",
        "metadata.parquet": "local",
        "train/metadata.jsonl": "local",
        "train/00000.tar": "conceptual",
    }
    for index, (file, source) in enumerate(folders.items()):
        path = tmp_path / str(index) / file
        path.parent.mkdir(parents=True)
        path.touch()
        assert find_source(input_dir=tmp_path / str(index)) == (source, file)
    (tmp_path / "4" / "images.tar").touch()
    assert find_source(input_dir=tmp_path / "4") == ("local", "metadata.parquet")
    assert find_source(captions_file=tmp_path / "mine.csv")[0] == "local"
    named = {"input_dir": tmp_path, "captions_file": tmp_path / "mine.json"}
    assert find_source(**named) == ("local", "mine.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot tell which dataset .* --source"):
        find_source(input_dir=tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        find_source(input_dir=tmp_path / "none")
