"""Caption files as people and programs write them: every form is read, and damage stays where it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import jpeg
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources.base import iter_pictures
from vlm_bridge.data_pipeline.sources.caption_forms import read_captions
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.errors import DataError

Captions = dict[str, tuple[str, ...]]


def read(path: Path, content: str | bytes) -> tuple[Captions, dict[str, str]]:
    """Captions by image, and the reason of each skipped row by "file:line"."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    bad = Skipped("rows")
    captions: Captions = {}
    for record in read_captions(path, bad):
        captions[record.image] = captions.get(record.image, ()) + record.captions
    return captions, {sample.where.rpartition("/")[2]: sample.reason for sample in bad.samples}


ROWS = [f"p{n}.jpg,a dog number {n}" for n in range(6)]


def table(*rows: str) -> str:
    return "\n".join(["image,caption", *rows]) + "\n"


def test_a_stray_quote_costs_its_row_alone(tmp_path: Path) -> None:
    captions, bad = read(
        tmp_path / "a.csv", table(*ROWS[:5], '"Stop" sign.jpg,x', 'p5.jpg,"Stop" sign', "p6.jpg,b")
    )
    assert list(captions) == ["p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg", "p4.jpg", "p6.jpg"]
    assert list(bad) == ["a.csv:7", "a.csv:8"] and "stray double quote" in bad["a.csv:8"]


@pytest.mark.parametrize("end", ['p5.jpg,a woman answers bye"', "p5.jpg,a dog"])
def test_a_quote_that_stays_open_swallows_no_rows(tmp_path: Path, end: str) -> None:
    rows = [ROWS[0], 'p1.jpg,"a man says hello', "and more,", *ROWS[2:5], end, "p6.jpg,the end"]
    captions, bad = read(tmp_path / "a.csv", table(*rows))
    assert list(captions) == ["p0.jpg", "p2.jpg", "p3.jpg", "p4.jpg", "p5.jpg", "p6.jpg"]
    assert list(bad) == ["a.csv:3"] and "opens here" in bad["a.csv:3"]


def test_a_quote_that_is_open_at_the_end_of_the_file_is_named_where_it_opens(
    tmp_path: Path,
) -> None:
    captions, bad = read(tmp_path / "a.csv", table(*ROWS[:2], 'p2.jpg,"a man', *["no row"] * 300))
    assert list(captions) == ["p0.jpg", "p1.jpg"]
    assert "opens here" in bad["a.csv:4"] and len(bad) == 301


def test_a_quoted_cell_may_hold_lines_blank_lines_and_commas(tmp_path: Path) -> None:
    captions, bad = read(tmp_path / "a.csv", table('p0.jpg,"one,\n\ntwo ""x"", three"', ROWS[1]))
    assert (
        captions == {"p0.jpg": ('one,\n\ntwo "x", three',), "p1.jpg": ("a dog number 1",)}
        and not bad
    )


def test_blanks_before_a_quote_and_empty_cells_at_the_end_are_read(tmp_path: Path) -> None:
    content = 'image, caption\np0.jpg, "a dog, fast"\np1.jpg,  a cat\np2.jpg,"x",,\n'
    captions, bad = read(tmp_path / "a.csv", content)
    assert (
        captions == {"p0.jpg": ("a dog, fast",), "p1.jpg": ("a cat",), "p2.jpg": ("x",)} and not bad
    )


@pytest.mark.parametrize("header", [[], ["image", "caption"]])
def test_tabs_with_and_without_a_header_say_the_same(tmp_path: Path, header: list[str]) -> None:
    texts = ['a "STOP" sign', '"Stop"', "two\nlines", "a dog"]
    with (tmp_path / "made.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([header] if header else [])
        writer.writerows((f"p{n}.jpg", text) for n, text in enumerate(texts))
    captions, bad = read(tmp_path / "a.tsv", (tmp_path / "made.tsv").read_bytes())
    assert captions == {f"p{n}.jpg": (text,) for n, text in enumerate(texts)} and not bad


def test_quotes_in_tabs_that_nobody_quoted_are_text(tmp_path: Path) -> None:
    lines = [
        'p0.jpg\t"Stop" says the sign',
        'p1.jpg\t"open',
        'p2.jpg\ta "wet", dog',
        "p3.jpg\tone\ttwo",
    ]
    captions, bad = read(tmp_path / "a.tsv", "\n".join(lines))
    assert [texts[0] for texts in captions.values()] == [
        '"Stop" says the sign', '"open', 'a "wet", dog', "one\ttwo",
    ]  # fmt: skip
    assert not bad


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("nan", ()),
        ("None", ()),
        ("NULL", ()),
        ('"  "', ()),
        ("", ()),
        ("nan bread", ("nan bread",)),
        ('"[\'a dog\', ""it\'s""]"', ("a dog", "it's")),
        ('"[""a dog"", ""a cat""]"', ("a dog", "a cat")),
        ("['a dog']", ("a dog",)),
        ("[]", ()),
        ("[SEP] a dog [MASK]", ("[SEP] a dog [MASK]",)),
    ],
)
def test_a_cell_is_a_caption_several_or_none(
    tmp_path: Path, cell: str, captions: tuple[str, ...]
) -> None:
    read_captions_, bad = read(tmp_path / "a.csv", table(f"p0.jpg,{cell}"))
    assert read_captions_ == {"p0.jpg": captions} and not bad


@pytest.mark.parametrize(
    "cell", ["\"['a dog' 'a cat']\"", "\"['a dog', 'it's']\"", '"[1, 2]"', "\"['a', 2]\""]
)
def test_a_list_that_is_damaged_is_no_caption(tmp_path: Path, cell: str) -> None:
    captions, bad = read(tmp_path / "a.csv", table(f"p0.jpg,{cell}"))
    assert not captions and "list" in bad["a.csv:2"]


def conversation(*answers: str) -> list[dict[str, str]]:
    turns = [
        ({"from": "human", "value": "<image>\nDescribe"}, {"from": "gpt", "value": text})
        for text in answers
    ]
    return [turn for pair in turns for turn in pair]


FORMS: dict[str, Any] = {
    "blip.json": [
        {"image": "p0.jpg", "caption": "a", "image_id": "coco_0"},
        {"image": "p1.jpg", "caption": ["b", "c"]},
    ],
    "llava.json": [
        {"id": 0, "image": "p0.jpg", "conversations": conversation("a")},
        {"id": 1, "image": "p1.jpg", "captions": ["b", None, "c"]},
    ],
    "coco.json": {
        "images": [{"id": 0, "file_name": "p0.jpg"}, {"id": "x", "file_name": "p1.jpg"}],
        "annotations": [
            {"id": 0, "image_id": 0, "caption": "a"},
            {"id": 1, "image_id": "x", "caption": "b"},
            {"id": 2, "image_id": "x", "caption": "c"},
        ],
    },
    "karpathy.json": {
        "dataset": "mine",
        "images": [
            {"filename": "p0.jpg", "split": "train", "sentences": [{"raw": "a"}]},
            {"filename": "p1.jpg", "split": "restval", "sentences": [{"raw": "b"}, {"raw": "c"}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_documents_of_json(tmp_path: Path, name: str) -> None:
    captions, bad = read(tmp_path / name, json.dumps(FORMS[name], indent=1))
    assert captions == {"p0.jpg": ("a",), "p1.jpg": ("b", "c")} and not bad


def test_lines_of_json_by_either_suffix(tmp_path: Path) -> None:
    lines = '{"image": "p0.jpg", "caption": "a"}\n{"image": "p1.jpg", "caption": NaN}\n[]\n'
    for name in ("a.json", "a.jsonl"):
        captions, bad = read(tmp_path / name, lines)
        assert captions == {"p0.jpg": ("a",), "p1.jpg": ()} and list(bad) == [f"{name}:3"]
    captions, _ = read(tmp_path / "b.jsonl", json.dumps(FORMS["blip.json"]))
    assert list(captions) == ["p0.jpg", "p1.jpg"]


def test_an_annotation_of_an_unlisted_image_is_skipped_with_its_id(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "p.jpg"}],
        "annotations": [
            {"id": n, "image_id": image, "caption": "a"} for n, image in ((10, 1), (11, 2))
        ],
    }
    captions, bad = read(tmp_path / "a.json", json.dumps(content))
    assert captions == {"p.jpg": ("a",)}
    assert (
        list(bad) == ["a.json: annotation 11"] and "image 2 is not" in bad["a.json: annotation 11"]
    )


def test_further_answers_of_a_conversation_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    record = {"image": "a.jpg", "conversations": conversation("a dog", "yes", "no")}
    (tmp_path / "captions.json").write_text(json.dumps([record]))
    source = LocalFolder(tmp_path)
    assert source.items()[0].captions == ["a dog"]
    assert source.rejected[0].reason == "2 further answers of its conversation"


def test_metadata_in_parquet_names_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = {"file_name": ["a.jpg", "a.jpg"], "text": ["one", None], "split": ["val", "val"]}
    pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    source = LocalFolder(tmp_path)
    assert [(item.image_id, item.captions, item.split) for item in source.items()] == [
        ("a", ["one"], "val")
    ]
    assert source.rejected[0].reason == "an empty caption"


def test_images_within_parquet_files_are_transformed(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    (root / "data").mkdir(parents=True)
    for part, numbers in (("train", range(3)), ("validation", range(3, 5))):
        rows = [
            {
                "image": {"bytes": jpeg(n), "path": f"{n}.jpg" if n % 2 else None},
                "captions": [f"one {n}", f"two {n}"],
            }
            for n in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"{part}-00000-of-00001.parquet")
    items = LocalFolder(root).items()
    assert [item.split for item in items] == ["train"] * 3 + ["val"] * 2
    assert list(iter_pictures(items)) == [jpeg(n) for n in range(5)]
    transform(LocalFolder(root), tmp_path / "out")
    images = CaptionFolder.open(tmp_path / "out").split("val")
    assert [image.captions for image in images] == [("one 3", "two 3"), ("one 4", "two 4")]


def test_text_files_beside_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("a", "one\ntwo\n"), ("sub/b", "three"), ("c", None)):
        (tmp_path / f"{name}.jpg").touch()
        if text:
            (tmp_path / f"{name}.txt").write_text(text)
    source = LocalFolder(tmp_path)
    assert {item.image_id: item.captions for item in source.items()} == {
        "a": ["one", "two"],
        "sub/b": ["three"],
    }
    assert [(r.id, r.reason) for r in source.rejected] == [("c.jpg", "it has no caption")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        (
            "a.json",
            '{"images": [], "annotations": [{"caption": 1}]}',
            "is damaged or no caption annotations",
        ),
        ("a.json", '{"images": [{"filename": 1}]}', "image 0 lacks filename"),
        ("a.parquet", "no parquet", "is damaged or no parquet file"),
        ("a.csv", b"\xff\xfei", "is damaged UTF-16: save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


def test_a_parquet_file_of_other_columns_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"needs an image column .* it has url, caption"):
        list(read_captions(tmp_path / "a.parquet", Skipped("rows")))
