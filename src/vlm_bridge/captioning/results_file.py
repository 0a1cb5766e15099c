"""Captions in a CSV or JSON Lines file that grows image by image and is continued."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_bridge.errors import DataError, UsageError, on_one_line
from vlm_bridge.files import append_line, write_atomically
from vlm_bridge.parsing import parse_json

COLUMNS = ("image", "caption", "score", "error")
HEADER = ",".join(COLUMNS)
# Names of files need not be UTF-8.
ENCODING: Any = ("utf-8", "surrogateescape")


class ResultsFile:
    """A file with a line for each image: its caption and score, or the error.

    An earlier file is continued. Images that have a caption there are done; lines of failed images,
    which are tried again, and a half-written last line are removed.

    Attributes:
        done: names of images that have a caption, as written.

    Raises:
        UsageError: the name does not end with .csv or .jsonl.
        DataError: the file holds something else.
    """

    def __init__(self, path: Path):
        self.path = path
        self.is_csv = path.suffix.lower() == ".csv"
        if not self.is_csv and path.suffix.lower() != ".jsonl":
            raise UsageError(f"{path} must end with .csv or .jsonl (--output)")
        content = path.read_bytes() if path.exists() else b""
        *lines, cut = content.decode(*ENCODING).removeprefix("\ufeff").split("\n")
        start = HEADER if self.is_csv else '{"image": '
        if (lines or not self.is_csv) and self._parse(cut):  # only its line break is missing
            lines.append(cut)
        elif not lines and not start.startswith(cut[: len(start)]):
            raise self._foreign(1)
        kept = [HEADER] if self.is_csv else []
        self.done: set[str] = set()
        for number, line in enumerate(lines, 1):
            if self.is_csv and number == 1 and line.rstrip() == HEADER:
                continue
            if (row := self._parse(line)) is None or (self.is_csv and number == 1):
                raise self._foreign(number)
            if row.get("error") is None:
                self.done.add(row["image"])
                kept.append(line)
        mended = "".join(f"{line}\n" for line in kept).encode(*ENCODING)
        path.parent.mkdir(parents=True, exist_ok=True)
        if mended != content:
            write_atomically(path, mended)

    def __contains__(self, image: object) -> bool:
        return self._shown(str(image)) in self.done

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row with an `image`, and its `caption` or an `error`. Raises OSError."""
        shown = {n: self._shown(v) if isinstance(v, str) else v for n, v in row.items()}
        line = json.dumps(shown, ensure_ascii=False) + "\n"
        if self.is_csv:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow(map(shown.get, COLUMNS))
            line = text.getvalue()
        append_line(self.path, line.encode(*ENCODING))

    def _shown(self, text: str) -> str:
        """Return text as the file has it: a row of CSV stays one line."""
        return on_one_line(text) if self.is_csv else text

    def _parse(self, line: str) -> dict[str, Any] | None:
        """Return a line as a row, or None if it is none."""
        try:
            if not self.is_csv:
                row = parse_json(line)
                is_row = isinstance(row, dict) and isinstance(row.get("image"), str)
                return row if is_row and ("caption" in row or "error" in row) else None
            values = next(csv.reader([line]), [])
        except (ValueError, csv.Error):
            return None
        row = {name: value or None for name, value in zip(COLUMNS, values, strict=False)}
        return row if len(values) == len(COLUMNS) else None

    def _foreign(self, number: int) -> DataError:
        return DataError(
            f"{self.path}:{number} is no line that this command writes: choose another --output, "
            "or delete the file"
        )
