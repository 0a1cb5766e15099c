"""`--output` of `vlm-bridge caption`: a file that is written line by line, and continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from vlm_bridge.captioning.results_file import ResultsFile
from vlm_bridge.errors import DataError, UsageError

ROWS: list[dict[str, Any]] = [
    {"image": 'a, "b".jpg', "caption": "A dog, and a cat.", "score": -0.5},
    {"image": "two\nlines\t\udcff.jpg", "caption": 'It says "é".', "score": -1.25},
    {"image": "broken.jpg", "error": "it is empty"},
    {"image": "nothing.jpg", "caption": "", "score": -2.0},
]


def written(path: Path, rows: list[dict[str, Any]]) -> bytes:
    results = ResultsFile(path)
    for row in rows:
        results.add(row)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_cut_anywhere_is_continued(tmp_path: Path, suffix: str) -> None:
    """Captioned images are done; a failed image and a half-written line are made again."""
    path = tmp_path / "new" / f"captions{suffix}"
    whole = written(path, ROWS)
    assert whole.count(b"\n") == len(ROWS) + (suffix == ".csv")
    good = sorted(line for line in whole.split(b"\n") if b"broken" not in line)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        results = ResultsFile(path)
        for row in ROWS:
            if row["image"] not in results:
                results.add(row)
        lines = path.read_bytes().split(b"\n")
        assert sorted(line for line in lines if b"broken" not in line) == good
        assert sum(b"broken" in line for line in lines) == 1


def test_both_forms_are_read_by_anybody(tmp_path: Path) -> None:
    written(tmp_path / "captions.csv", ROWS[:1] + ROWS[2:])
    with (tmp_path / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ['a, "b".jpg', "broken.jpg", "nothing.jpg"]
    assert rows[0]["caption"] == "A dog, and a cat." and float(rows[0]["score"]) == -0.5
    assert rows[1]["error"] == "it is empty" and rows[1]["caption"] == ""
    lines = written(tmp_path / "captions.jsonl", ROWS[2:]).splitlines()
    assert [json.loads(line) for line in lines] == ROWS[2:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", "image,caption\na.jpg,mine\n"),
        ("captions.csv", "words without a line break"),
        ("captions.csv", "image,caption,score,error\na.jpg,mine\nb.jpg,mine,,\n"),
        ("captions.jsonl", '{"image_path": "a.jpg", "caption": "mine"}\n'),
        ("captions.jsonl", "words"),
        ("captions.jsonl", "[]\n"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r":[12] is no line .* choose another --output"):
        ResultsFile(tmp_path / name)
    assert (tmp_path / name).read_text() == content
    with pytest.raises(UsageError, match="must end with"):
        ResultsFile(tmp_path / "captions.txt")


def test_a_spreadsheet_may_save_it(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(b"\xef\xbb\xbf" + written(path, ROWS[:1]).replace(b"\n", b"\r\n"))
    assert ROWS[0]["image"] in ResultsFile(path)
