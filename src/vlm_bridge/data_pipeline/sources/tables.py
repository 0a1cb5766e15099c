"""Read the rows of tables (CSV, or tabs) so that a damaged row costs no other row.

`csv` alone lets a stray quote swallow the lines behind it. Here each line is parsed by itself; a cell that opens a
quote goes on over the next lines only while these do not look like rows.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.sources.base import read_lines
from vlm_bridge.errors import DataError

IMAGE_FIELDS = (
    "image",
    "file_name",
    "filename",
    "image_path",
    "image_name",
    "name",
    "path",
    "file",
)
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "description", "comment", "raw")
OPEN_QUOTE = (
    "a double quote opens here and does not close before the next row: close it, or write it twice"
)
STRAY_QUOTE = "a stray double quote: put the whole cell in quotes and write those within it twice"
MAX_CELL_LINES = 100
"""Lines of a quoted cell: a quote that is open for longer was opened by mistake."""

IsImage = Callable[[str], bool]
"""Whether the dataset has an image of that name."""

_NUMBER_OF_CAPTION = re.compile(r"#\d+\s*$")


def read_table(
    path: Path, bad: BadSamples, is_image: IsImage
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file:line", cells by column) for every row; take the damaged rows as skipped.

    Commas, semicolons or tabs part the cells. A header names the columns; a table with tabs may have none, its columns
    are then image and caption. Where tabs part the cells, quotes that do not close are text.

    Args:
        bad: takes the damaged rows with the line where each begins.
        is_image: tells a row from a line of text within a quoted cell, besides the usual suffixes of images.

    Raises:
        DataError: the table is empty, or its header does not name an image and a caption column.
    """
    lines = read_lines(path, bad, keep_blank=True)
    where, first = next(((where, line) for where, line in lines if line.strip()), ("", ""))
    if bad.samples and bad.samples[-1].where.startswith(f"{path}:"):
        raise DataError(
            f"{bad.samples[-1].where}: {bad.samples[-1].reason}; save the file as UTF-8"
        )
    if not first:
        raise DataError(f"{path}: the caption file is empty")
    delimiter = _delimiter(path, first)
    header = [cell.strip().lower() for cell in _cells(first, delimiter)]
    if set(header) & set(IMAGE_FIELDS) and set(header) & set(CAPTION_FIELDS):
        rows = _Rows(lines, header, delimiter, bad, is_image)
    elif delimiter == "\t":
        rows = _Rows(lines, ["image", "caption"], delimiter, bad, is_image, deque([(where, first)]))
    else:
        raise DataError(
            f"{where}: the header must name an image column ({', '.join(IMAGE_FIELDS)}) "
            f"and a caption column ({', '.join(CAPTION_FIELDS)})"
        )
    yield from rows.read()


def without_number(name: str) -> str:
    """Return an image's name without the number of its caption, as ``a.jpg#0`` has it."""
    return _NUMBER_OF_CAPTION.sub("", name).strip()


@dataclass
class _Rows:
    """The rows of a table below its header; ``waiting`` holds lines that were looked at but not used."""

    lines: Iterator[tuple[str, str]]
    header: Sequence[str]
    delimiter: str
    bad: BadSamples
    is_image: IsImage
    waiting: deque[tuple[str, str]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.image_column = next(n for n, name in enumerate(self.header) if name in IMAGE_FIELDS)

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        while (line := self._next()) is not None:
            where, text = line
            if not text.strip():
                continue
            self.bad.total += 1
            try:
                cells = self._parse(text)
            except ValueError as error:
                self.bad.set_aside(where, str(error))
                continue
            yield where, dict(zip(self.header, cells, strict=True))

    def _next(self) -> tuple[str, str] | None:
        return self.waiting.popleft() if self.waiting else next(self.lines, None)

    def _parse(self, text: str) -> list[str]:
        """Return the cells of a row that begins with the line ``text``, one for each column.

        Raises:
            ValueError: the row is damaged.
        """
        taken: list[tuple[str, str]] = []
        stops_at_row = False

        def supply() -> Iterator[str]:
            nonlocal stops_at_row
            yield f"{text}\n"
            # The parser asks for more only within quotes.
            while len(taken) < MAX_CELL_LINES and (line := self._next()) is not None:
                if self._looks_like_row(line[1]):
                    self.waiting.appendleft(line)
                    stops_at_row = True
                    return
                taken.append(line)
                yield f"{line[1]}\n"
            raise _Endless

        try:
            cells = next(
                csv.reader(supply(), delimiter=self.delimiter, strict=True, skipinitialspace=True)
            )
        except (csv.Error, _Endless) as error:
            # Lines between an open quote and the next row are part of the damaged row.
            if self.delimiter == "\t" or not stops_at_row:
                self.waiting.extendleft(reversed(taken))
            if self.delimiter != "\t":
                is_open = stops_at_row or isinstance(error, _Endless)
                raise ValueError(OPEN_QUOTE if is_open else f"{STRAY_QUOTE} ({error})") from None
            cells = text.split("\t")
        return self._fitted(cells)

    def _looks_like_row(self, line: str) -> bool:
        cells = _cells(line, self.delimiter)
        if len(cells) <= max(1, self.image_column):
            return False
        name = without_number(cells[self.image_column])
        suffix = PurePosixPath(name.replace("\\", "/")).suffix.lower()
        return bool(name) and (suffix in IMAGE_SUFFIXES or self.is_image(name))

    def _fitted(self, cells: list[str]) -> list[str]:
        wanted = len(self.header)
        while (
            len(cells) > wanted and not cells[-1].strip()
        ):  # spreadsheets end lines with empty cells
            cells.pop()
        if self.delimiter == "\t" and len(cells) > wanted and self.header[-1] in CAPTION_FIELDS:
            cells[wanted - 1 :] = ["\t".join(cells[wanted - 1 :])]
        if len(cells) != wanted:
            hint = "" if self.delimiter == "\t" else "; put captions with commas in double quotes"
            raise ValueError(
                f"{len(cells)} cells instead of {wanted} ({self.delimiter.join(self.header)}){hint}"
            )
        return cells


class _Endless(Exception):
    """A quote that does not close before the end of the file, or within `MAX_CELL_LINES`."""


def _delimiter(path: Path, first: str) -> str:
    if path.suffix.lower() == ".tsv" or "\t" in first:
        return "\t"
    return ";" if ";" in first and "," not in first else ","


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of one line, whatever its quotes are."""
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []
