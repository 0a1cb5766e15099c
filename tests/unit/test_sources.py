"""A folder of one's own images, and sources by their names."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from vlm_bridge.data_pipeline.samples import SkippedSample
from vlm_bridge.data_pipeline.sources import find_source, make_source
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.errors import DataError, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images (sources look at names only)."""
    return touch(tmp_path, "a.jpg", "b.png", "sub/c.jpg")


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
def test_caption_files_are_found_and_say_the_same(images: Path, name: str) -> None:
    (images / name).write_bytes(CAPTION_FILES[name].encode())
    elsewhere = images.with_name(f"mine-{name}")
    for given in (None, elsewhere):
        source = LocalFolder(images, given)
        captions = {item.image_id: item.captions for item in source.items()}
        assert captions == {"a": ["A dog.", 'A "wet", happy dog.'], "sub/c": ["A cat."]}
        assert source.rejected == [SkippedSample("b.png", "it has no caption")]
        if given is None:
            (images / name).rename(elsewhere)


def test_text_files_beside_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "sub/b.jpg", "c.jpg")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "sub" / "b.txt").write_text("three")
    source = LocalFolder(tmp_path)
    assert [item.captions for item in source.items()] == [["one", "two"], ["three"]]
    assert source.rejected == [SkippedSample("c.jpg", "it has no caption")]


def test_splits_from_a_column_and_from_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "train/c.jpg", "validation/d.jpg")
    for name, line in (("train", "c.jpg"), ("validation", "d.jpg")):
        record = json.dumps({"file_name": line, "text": "x"})
        (tmp_path / name / "metadata.jsonl").write_text(record)
    found = {item.image_id: item.split for item in LocalFolder(tmp_path).items()}
    assert found == {"train/c": "train", "validation/d": "val"}
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,x,\na.jpg,x,dev\nb.jpg,y,\n")
    assert [item.split for item in LocalFolder(tmp_path).items()] == ["val", None]


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_a_folder_that_is_a_split_decides(tmp_path: Path, name: str) -> None:
    names = ("train/a.jpg", "images/test/b.jpg", "dev/c.jpg", "other/d.jpg")
    touch(tmp_path, *names)
    lines = [json.dumps({"file_name": file, "text": "x"}) for file in names]
    (tmp_path / name).write_text("\n".join(lines))
    assert [item.split for item in LocalFolder(tmp_path).items()] == ["train", "test", "val", None]


def test_a_split_that_contradicts_the_folder_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "test/a.jpg")
    (tmp_path / "captions.csv").write_text("image,caption,split\ntest/a.jpg,x,train\n")
    message = r"captions.csv:2: .* several splits \(test before, train here\)"
    with pytest.raises(DataError, match=message):
        LocalFolder(tmp_path).items()


def test_captions_of_missing_images_are_skipped_up_to_a_share(tmp_path: Path) -> None:
    touch(tmp_path, *(f"dog_{n}.jpg" for n in range(10)))

    def read(missing: int) -> LocalFolder:
        names = [f"dog_{n}.jpg" for n in range(10)] + [f"dogs-{n}.jpg" for n in range(missing)]
        (tmp_path / "captions.tsv").write_text("".join(f"{name}\tx\n" * 5 for name in names))
        source = LocalFolder(tmp_path)
        assert len(source.items()) == 10
        return source

    first = SkippedSample("captions.tsv:51", "its image 'dogs-0.jpg' is missing")
    assert read(missing=2).rejected[0] == first
    with pytest.raises(DataError, match=r"3 of 13 captioned images .* 'dogs-0.jpg' is missing"):
        read(missing=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"image,caption\na.jpg,caf\xe9\n", r"captions.csv:2: not UTF-8"),
        ("captions.jsonl", b'{"image": "a.jpg", "caption": "caf\xe9"}\n', r"captions.jsonl:1: not UTF-8"),
        ("captions.tsv", b"../a.jpg\tA dog.\n", r"captions.tsv:1: its image .* is missing"),
        ("captions.tsv", b"b.png A cat.\n", r"captions.tsv:1: the header must name"),
        ("captions.csv", b"a.jpg,A dog.\n", r"captions.csv:1: the header must name"),
        ("captions.csv", b"image,caption\na.jpg,A dog, wet.\n", r"captions.csv:2: 3 cells"),
        ("captions.csv", b"image,caption,split\na.jpg,A dog.,fold1\n", r"captions.csv:2: unknown split"),
        ("captions.csv", b"image,caption,split\na.jpg,x,train\na.jpg,y,test\n", r"csv:3: .* several splits"),
        ("captions.jsonl", b'{"image": "a.jpg"}\n', r"captions.jsonl:1: has no caption"),
        ("captions.jsonl", b'{"caption": "A dog."}\n', r"captions.jsonl:1: names no image"),
        ("captions.jsonl", b"{'a': 1}\n", r"captions.jsonl:1: not a JSON object"),
        ("captions.csv", b"", r"empty"),
    ],
)  # fmt: skip
def test_malformed_files_name_lines(images: Path, name: str, content: bytes, message: str) -> None:
    (images / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        LocalFolder(images).items()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (unicodedata.normalize("NFD", "caf\u00e9.jpg"), "caf\u00e9.jpg"),
        ("IMG_1.JPG", "img_1.jpg"),
        ("sub/a.jpg", "sub\\a.jpg"),
        ("images/a.jpg", "a.jpg"),
        ("anywhere/below/a.jpg", "a.jpg"),
        ("v1.0.png", "v1.0"),
        ("Images/a b.jpg", "A B#3"),
    ],
)
def test_names_in_another_spelling_find_their_image(tmp_path: Path, file: str, name: str) -> None:
    touch(tmp_path, file)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    assert [item.image for item in LocalFolder(tmp_path).items()] == [tmp_path / file]


def test_a_name_that_fits_several_files_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "b.jpg")
    (tmp_path / "captions.tsv").write_text("a\tA dog.\nb\tA cat.\n")
    source = LocalFolder(tmp_path)
    assert [item.image_id for item in source.items()] == ["b"]
    assert "fits several files (a.jpg, a.png)" in source.rejected[0].reason
    (tmp_path / "captions.tsv").write_text("a.jpg\tA dog.\na.png\tA cat.\nb\tA cow.\n")
    assert [item.image_id for item in source.items()] == ["a.jpg", "a.png", "b"]


def test_names_are_those_beside_their_caption_file(tmp_path: Path) -> None:
    for split in ("train", "test"):
        touch(tmp_path, f"{split}/images/A.JPG")
        (tmp_path / split / "metadata.csv").write_text("file_name,text\na.jpg,x\n")
    found = [item.image_id for item in LocalFolder(tmp_path).items()]
    assert found == ["test/images/A", "train/images/A"]


def test_links_that_lead_out_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    root, elsewhere = touch(tmp_path / "root", "a.jpg"), touch(tmp_path / "elsewhere", "b.jpg")
    (root / "b.jpg").symlink_to(elsewhere / "b.jpg")
    (root / "more").symlink_to(elsewhere)
    (root / "c.jpg").symlink_to(root / "a.jpg")
    (root / "captions.tsv").write_text("a.jpg\tx\nb.jpg\ty\nmore/b.jpg\tz\nc.jpg\tw\n")
    source = LocalFolder(root)
    assert [item.image_id for item in source.items()] == ["a", "c"]
    assert [r.id for r in source.rejected if "--follow-links" in r.reason] == ["more", "b.jpg"]
    assert len(LocalFolder(root, follow_links=True).items()) == 4
    (tmp_path / "link").symlink_to(root)
    assert len(LocalFolder(tmp_path / "link").items()) == 2
    (root / "captions.tsv").write_text("b.jpg\ty\n")
    with pytest.raises(DataError, match="give --follow-links"):
        LocalFolder(root).items()


def test_a_caption_folder_made_inside_is_not_taken_for_images(images: Path) -> None:
    (images / "captions.tsv").write_text("a.jpg\tA dog.\nb.png\tx\nsub/c.jpg\ty\n")
    touch(images, "out/.unfinished/x", "out/d.jpg", "made/train/images/e.jpg")
    (images / "made" / "manifest.json").write_text('{"format": "vlm-bridge caption folder"}')
    source = LocalFolder(images)
    assert len(source.items()) == 3 and not source.rejected


def test_no_caption_file_or_several(images: Path) -> None:
    for names, message in (((), "no caption file"), (("captions.csv", "captions.tsv"), "several")):
        with pytest.raises(DataError, match=message):
            LocalFolder(touch(images, *names)).items()


def test_sources_by_name(tmp_path: Path) -> None:
    assert make_source("scenes", num_train=1, num_val=2, num_test=3).items()[-1].split == "test"
    for name, message in (("flickr9k", "unknown source"), ("local", "--input-dir")):
        with pytest.raises(UsageError, match=message):
            make_source(name)
    with pytest.raises(DataError, match="no such folder"):
        make_source("local", input_dir=tmp_path / "missing")
    with pytest.raises(DataError, match="no such caption file"):
        make_source("coco", input_dir=tmp_path, captions_file=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("Flickr8k.token.txt", "flickr8k"),
        ("annotations/captions_val2017.json", "coco"),
        ("dataset_flickr30k.json", "flickr30k"),
        ("results.csv", "flickr30k"),
        ("captions.txt", "local"),
        ("metadata.parquet", "local"),
        ("train/metadata.jsonl", "local"),
        ("train/00000.tar", "conceptual"),
    ],
)
def test_the_source_of_a_folder_is_found_out(tmp_path: Path, file: str, source: str) -> None:
    touch(tmp_path, file)
    assert find_source(input_dir=tmp_path) == (source, file)


def test_the_source_of_other_inputs(tmp_path: Path) -> None:
    assert find_source()[0] == "groundcap"
    assert find_source(captions_file=tmp_path / "mine.csv")[0] == "local"
    assert find_source(tmp_path, tmp_path / "mine.json") == ("local", "mine.json")
    with pytest.raises(DataError, match=r"no captions found in .* --captions-file"):
        find_source(input_dir=touch(tmp_path, "images.tar"))
    with pytest.raises(DataError, match="no such folder"):
        find_source(input_dir=tmp_path / "none")
