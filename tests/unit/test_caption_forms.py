"""Caption files as people and programs write them: damage costs no other row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import jpeg
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources import iter_images
from vlm_bridge.data_pipeline.sources.caption_forms import read_captions
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError

Captions = dict[str, tuple[str, ...]]


def read(path: Path, content: str | bytes) -> tuple[Captions, dict[str, str]]:
    """Return captions by image, and the reason of each skipped row by "file:line"."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    skipped = Skipped("rows")
    captions: Captions = {}
    for record in read_captions(path, skipped):
        captions[record.image] = (*captions.get(record.image, ()), *record.captions)
    return captions, {sample.id.rpartition("/")[2]: sample.reason for sample in skipped.samples}


ROWS = [f"p{n}.jpg,a dog number {n}" for n in range(6)]


def table(*rows: str) -> str:
    return "\n".join(["image,caption", *rows]) + "\n"


def test_a_row_that_does_not_fit_costs_itself_alone(tmp_path: Path) -> None:
    rows = [*ROWS[:2], "p2.jpg,a dog, wet", 'p3.jpg,"Stop" sign', 'p4.jpg,a 5" pipe']
    captions, skipped = read(tmp_path / "a.csv", table(*rows))
    assert list(captions.values())[2:] == [("Stop sign",), ('a 5" pipe',)]
    assert len(captions) == 4 and "3 cells instead of 2" in skipped["a.csv:4"]


@pytest.mark.parametrize(
    "rows",
    [
        [*ROWS[2:4], 'p4.jpg,a woman answers bye"', ROWS[5]],
        [f"p{n}.jpg,{'a long caption ' * 20}" for n in range(1000)],
    ],
)
def test_a_quote_that_stays_open_swallows_no_rows(tmp_path: Path, rows: list[str]) -> None:
    content = table(ROWS[0], 'p1.jpg,"a man says hello', "and more,", *rows)
    with pytest.raises(DataError, match=r"a.csv:3: .*quote"):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (table('p0.jpg,"one,\n\ntwo ""x"", three"', ROWS[1]), ['one,\n\ntwo "x", three', "a dog number 1"]),
        ('image, caption\np0.jpg, "a dog, fast"\np1.jpg,  a cat\n', ["a dog, fast", "a cat"]),
        ("\n\nimage,caption\n\np0.jpg,x\n\n", ["x"]),
    ],
)  # fmt: skip
def test_tables_with_quotes_and_blanks(tmp_path: Path, content: str, expected: list[str]) -> None:
    captions, skipped = read(tmp_path / "a.csv", content)
    assert [texts[0] for texts in captions.values()] == expected and not skipped


@pytest.mark.parametrize("header", [[], [("image", "caption")]])
def test_tabs_with_and_without_a_header_say_the_same(tmp_path: Path, header: list) -> None:
    rows = [("p0.jpg", 'a "STOP" sign'), ("p1.jpg", '"Stop"'), ("p2.jpg", "a dog")]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([*header, *rows])
    captions, skipped = read(tmp_path / "a.tsv", file.getvalue())
    assert captions == {name: (text,) for name, text in rows} and not skipped


def test_quotes_in_tabs_that_nobody_quoted_are_text(tmp_path: Path) -> None:
    texts = ['"Stop" says the sign', '"open', 'a "wet", dog', "one\ttwo", '"open']
    lines = "\n".join(f"p{n}.jpg\t{text}" for n, text in enumerate(texts))
    captions, skipped = read(tmp_path / "a.tsv", lines)
    assert [found[0] for found in captions.values()] == texts and not skipped


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        *((cell, ()) for cell in ("nan", "None", '"  "', "", "[]")),
        ("nan bread", ("nan bread",)),
        ('"[\'a dog\', ""it\'s""]"', ("a dog", "it's")),
        ('"[""a dog"", ""a \\ud83d\\udc31""]"', ("a dog", "a \U0001f431")),
        ("['a dog']", ("a dog",)),
        ("[SEP] a dog [MASK]", ("[SEP] a dog [MASK]",)),
    ],
)
def test_captions_of_a_cell(tmp_path: Path, cell: str, captions: tuple[str, ...]) -> None:
    found, skipped = read(tmp_path / "a.csv", table(f"p0.jpg,{cell}"))
    assert found == {"p0.jpg": captions} and not skipped


def test_a_list_that_is_damaged_is_no_caption(tmp_path: Path) -> None:
    lists = ("['a dog' 'a cat']", "['a dog', 'it's']", "['a', 2]")
    captions, skipped = read(tmp_path / "a.csv", table(*(f'p0.jpg,"{cell}"' for cell in lists)))
    assert not captions and list(skipped) == ["a.csv:2", "a.csv:3", "a.csv:4"]


QUESTION = {"from": "human", "value": "<image>"}
ANSWERS = [{"from": "gpt", "value": answer} for answer in ("a", "yes", "no")]
TURNS = [turn for answer in ANSWERS for turn in (QUESTION, answer)]
FORMS: dict[str, Any] = {
    "blip.json": [
        {"image": "p0.jpg", "caption": "a", "image_id": "coco_0"},
        {"image": "p1.jpg", "caption": ["b", "c"]},
    ],
    "llava.json": [
        {"id": 0, "image": "p0.jpg", "conversations": TURNS},
        {"id": 1, "image": "p1.jpg", "captions": ["b", None, "c"]},
    ],
    "coco.json": {
        "images": [{"id": 0, "file_name": "p0.jpg"}, {"id": "x", "file_name": "p1.jpg"}],
        "annotations": [{"image_id": n, "caption": c} for n, c in ((0, "a"), ("x", "b"), ("x", "c"))],
    },
    "karpathy.json": {"images": [
        {"filename": "p0.jpg", "split": "train", "sentences": [{"raw": "a"}]},
        {"filename": "p1.jpg", "split": "restval", "sentences": [{"raw": "b"}, {"raw": "c"}]},
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_documents_of_json(tmp_path: Path, name: str) -> None:
    captions, skipped = read(tmp_path / name, json.dumps(FORMS[name], indent=1))
    assert captions == {"p0.jpg": ("a",), "p1.jpg": ("b", "c")} and not skipped


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lines_of_json_by_either_suffix(tmp_path: Path, name: str) -> None:
    lines = '{"image": "p0.jpg", "caption": "a"}\n{"image": "p1.jpg", "caption": NaN}\n[]\n'
    captions, skipped = read(tmp_path / name, lines)
    assert captions == {"p0.jpg": ("a",), "p1.jpg": ()} and list(skipped) == [f"{name}:3"]


def test_metadata_in_parquet_names_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = {"file_name": ["a.jpg", "a.jpg"], "text": ["one", None], "split": ["val", "val"]}
    pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    (item,) = LocalFolder(tmp_path).items()
    assert (item.image_id, item.captions, item.split) == ("a", ["one"], "val")
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"must name an image .* it has url, caption"):
        LocalFolder(tmp_path).items()


def test_images_within_parquet_files_are_transformed(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    root.mkdir()
    for part, numbers in (("train", range(3)), ("validation", range(3, 5))):
        images = [{"bytes": jpeg(n), "path": f"{n}.jpg" if n % 2 else None} for n in numbers]
        texts = [[f"one {n}", f"two {n}"] for n in numbers]
        table = pa.table({"image": images, "captions": texts})
        pq.write_table(table, root / f"{part}-00000-of-00001.parquet")
    items = LocalFolder(root).items()
    assert [item.split for item in items] == ["train"] * 3 + ["val"] * 2
    assert list(iter_images(items)) == [jpeg(n) for n in range(5)]
    transform(LocalFolder(root), tmp_path / "out")
    images = CaptionFolder.open(tmp_path / "out").split("val")
    assert [image.captions for image in images] == [("one 3", "two 3"), ("one 4", "two 4")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is damaged or no JSON"),
        ("a.json", '{"images": [], "annotations": [{"caption": 1}]}', "is damaged or no caption"),
        ("a.json", '{"images": [{"filename": 1}]}', "KeyError"),
        ("a.parquet", "no parquet", "is damaged or no parquet file"),
        ("a.csv", b"\xff\xfei\0m\0", "no UTF-8 text"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)
