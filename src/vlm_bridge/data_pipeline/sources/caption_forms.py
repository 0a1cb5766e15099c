"""Read tables, JSON, parquet files and text files beside images as `CaptionRecord`s.

To add a form, write a function that yields its rows and name it in `FORMS`.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources import ParquetImage, read_rows, schema_of
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, lines_of, parse_json, shown

IMAGE_FIELDS = (
    "image", "file_name", "filename", "image_path", "image_name", "name", "path", "file",
)  # fmt: skip
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "description", "comment", "raw")
NEEDED = f"an image ({', '.join(IMAGE_FIELDS)}) and a caption ({', '.join(CAPTION_FIELDS)})"
RESTVAL = "restval"  # Karpathy's name for images of COCO's val part that are for training

_NO_CAPTION = frozenset({"", "nan", "<na>", "n/a", "none", "null"})
_LIST = re.compile(r"""\[(\s*["'].*)?\]""", re.DOTALL)
_NO_COMMA = re.compile(r"""["']\s+["']""")  # numpy writes lists of texts so; Python joins them
_CAPTION_NUMBER = re.compile(r"#\d+\s*$")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Rows = Iterator[tuple[str, Any]]
"""("file:line", values by the names of their fields, or a ValueError) of each row."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """The captions that one place of a caption file ("file:line") gives an image."""

    where: str
    image: str
    captions: list[str]
    split: SplitName | None
    is_restval: bool
    stored: ParquetImage | None  # the image itself, where the file holds it


def without_number(name: str) -> str:
    """Return an image's name without the number of its caption (``a.jpg#0``)."""
    return _CAPTION_NUMBER.sub("", name).strip()


def read_captions(path: Path, skipped: Skipped) -> Iterator[CaptionRecord]:
    """Yield the records of a caption file, whose suffix tells its form (`FORMS`, else a table).

    Of a folder, text files beside images are read. Damaged rows are ``skipped``.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    read = _text_rows if path.is_dir() else FORMS.get(path.suffix.lower(), _table_rows)
    for where, row in read(path):
        skipped.total += 1
        try:
            yield _make_record(where, row)
        except ValueError as error:
            skipped.add(where, str(error))


def captioned_by_text(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder that have a text file beside them, in order."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.with_suffix(".txt").is_file():
            yield path


def _text_rows(folder: Path) -> Rows:
    for image in captioned_by_text(folder):
        name = image.relative_to(folder).as_posix()
        for number, line in _lines_of(image.with_suffix(".txt")):
            yield f"{name}:{number}", {"image": name, "caption": line}


def _make_record(where: str, row: Any) -> CaptionRecord:
    """Return the record of a row; ValueError where it has no image, captions or known split."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    image = next((row[name] for name in IMAGE_FIELDS if row.get(name) is not None), None)
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"names no image (one of the fields {', '.join(IMAGE_FIELDS)})")
    texts = _texts_of(row)
    if not all(map(is_text, (image, *texts))):
        raise ValueError("not UTF-8 text")
    part = str(row.get("split") or "")
    split = "train" if part == RESTVAL else normalise_split(part)
    if part and split is None:
        raise ValueError(f"unknown split {shown(part)} (train, val or test)")
    captions = [text for text in texts if text.strip().lower() not in _NO_CAPTION]
    return CaptionRecord(
        where, image.strip(), captions, split, part == RESTVAL, row.get(ParquetImage)
    )


def _texts_of(row: dict[Any, Any]) -> list[str]:
    """Return a row's captions, of a LLaVA conversation the first answer."""
    values = [row[name] for name in CAPTION_FIELDS if name in row]
    if not values and isinstance(row.get("conversations"), list):
        turns = [turn for turn in row["conversations"] if isinstance(turn, dict)]
        values = [turn.get("value") for turn in turns if turn.get("from") == "gpt"][:1]
    if not values:
        raise ValueError(f"has no caption (one of the fields {', '.join(CAPTION_FIELDS)})")
    value = next((value for value in values if value is not None), [])
    if isinstance(value, str):
        value = _listed(value)
    elif value != value:  # pandas writes NaN for an empty cell
        value = []
    texts = [text for text in value if text is not None] if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its caption is neither text nor a list of texts")
    return texts


def _listed(cell: str) -> list[str]:
    """Return the captions of a cell: those of a list as JSON or Python writes it, or the text."""
    text = cell.strip()
    if not _LIST.fullmatch(text):
        return [cell]
    for parse in (parse_json, ast.literal_eval):
        try:
            values = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if not (values and _NO_COMMA.search(text)):
            return values
    raise ValueError(f"a list of captions that cannot be read: {shown(cell)}")


def _lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line; `is_text` is false for one that is not UTF-8."""
    for number, line in lines_of(path):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        yield number, text.rstrip("\r\n")


# --- tables ---


def _table_rows(path: Path) -> Rows:
    """Yield the rows of a table; commas, semicolons, tabs or bars separate the cells.

    A table with tabs may have no header; its columns are image and caption.
    """
    lines = _lines_of(path)
    number, first = next((line for line in lines if line[1].strip()), (0, ""))
    if not is_text(first) or not first:
        raise DataError(f"{path}: the caption file is empty or no UTF-8 text")
    delimiter = next((mark for mark in "\t|;" if mark in first), ",")
    header = [cell.strip(' "').lower() for cell in first.split(delimiter)]
    if not (set(header) & set(IMAGE_FIELDS) and set(header) & set(CAPTION_FIELDS)):
        if delimiter != "\t":
            raise DataError(f"{path}:{number}: the header must name {NEEDED}")
        header, lines = ["image", "caption"], chain([(number, first)], lines)
    if delimiter in "\t|":
        rows = ((n, _plain_cells(line, delimiter, len(header))) for n, line in lines)
    else:
        column = next(n for n, name in enumerate(header) if name in IMAGE_FIELDS)
        rows = _csv_rows(path, number + 1, lines, delimiter, column)
    for number, cells in rows:
        row: Any = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            hint = (
                f"; put captions with {delimiter!r} in double quotes"
                if cells[len(header) :]
                else ""
            )
            columns = f"{len(header)} ({delimiter.join(header)})"
            row = ValueError(f"{len(cells)} cells instead of {columns}{hint}")
        if any(cells):
            yield f"{path.name}:{number}", row


def _plain_cells(line: str, delimiter: str, num_columns: int) -> list[str]:
    """Split a line into cells; the last one may hold delimiters, and quotes need no pair."""
    cells = [cell.strip() for cell in line.split(delimiter, num_columns - 1)]
    is_quoted = map(_QUOTED.fullmatch, cells)
    return [c[1:-1].replace('""', '"') if q else c for c, q in zip(cells, is_quoted, strict=True)]


def _csv_rows(
    path: Path, number: int, lines: Iterable[tuple[int, str]], delimiter: str, column: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row, which may hold lines, from line ``number`` on.

    Raises DataError where a quote stays open and swallows other rows.
    """
    texts = (f"{line}\n" for _, line in lines)
    reader = csv.reader(texts, delimiter=delimiter, skipinitialspace=True)
    start = number
    try:
        for cells in reader:
            inner = (line.split(delimiter) for cell in cells for line in cell.split("\n")[1:])
            if any(_is_image_file(row[column]) for row in inner if row[column:]):
                raise csv.Error("a double quote opens here and does not close before the next row")
            yield start, cells
            start = number + reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}:{start}: {error}; double the quotes within quoted cells") from None


def _is_image_file(name: str) -> bool:
    return PurePosixPath(without_number(name.strip('"'))).suffix.lower() in IMAGE_SUFFIXES


# --- JSON and parquet ---


def _json_lines(path: Path) -> Rows:
    for number, line in _lines_of(path):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                row = ValueError(f"not a JSON object ({error})")
            yield f"{path.name}:{number}", row


def _json_rows(path: Path) -> Rows:
    """Read a list of records (BLIP, LAVIS, LLaVA), COCO's or Karpathy's form, or JSON lines."""
    content = path.read_bytes().lstrip()
    try:
        document = parse_json(content)
    except ValueError as error:
        if b"\n{" in content:
            return _json_lines(path)
        raise DataError(f"{path} is damaged or no JSON ({error}): get it again") from None
    try:
        if isinstance(document, list):
            rows = list(enumerate(document))
        else:
            is_coco = "annotations" in document
            rows = list(_coco_rows(document) if is_coco else _karpathy_rows(document))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged or no caption file ({shown(error)}): a list of records with "
            f"{NEEDED}, COCO's form (images, annotations) and Karpathy's (images with filename, "
            "split and sentences) are read"
        ) from None
    return ((f"{path.name}: image {shown(key)}", row) for key, row in rows)


def _coco_rows(document: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    captions: dict[Any, list[str]] = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in document["images"]:
        image_id, name = image["id"], str(image.get("file_name"))
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES and isinstance(image_id, int):
            name = f"{image_id:012d}.jpg"  # COCO names images by their ids
        yield image_id, {"image": name, "captions": captions.pop(image_id, [])}
    for image_id, texts in captions.items():
        yield image_id, {"image": f"{shown(image_id)} (not listed)", "captions": texts}


def _karpathy_rows(document: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the rows of Karpathy's split files (Karpathy and Fei-Fei, CVPR 2015)."""
    for number, image in enumerate(document["images"]):
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield number, {"image": image["filename"], "captions": captions, "split": image["split"]}


def _parquet_rows(path: Path) -> Rows:
    """Read columns as fields; the bytes of an image column are read later."""
    import pyarrow.types as types

    schema = schema_of(path)
    names = [name for name in schema.names if name in (*IMAGE_FIELDS, *CAPTION_FIELDS, "split")]
    if not set(names) & set(IMAGE_FIELDS) or not set(names) & set(CAPTION_FIELDS):
        raise DataError(f"{path}: its columns must name {NEEDED}; it has {', '.join(schema.names)}")
    structs = {field.name for field in schema if types.is_struct(field.type)}
    stored = next((name for name in names if name in structs), None)
    columns = [name for name in names if name != stored]
    for row, values in enumerate(read_rows(path, columns)):
        fields: dict[Any, Any] = values
        if stored is not None:
            fields["image"] = f"{path.stem}-{row:06d}"
            fields[ParquetImage] = ParquetImage(path, row, stored)
        yield f"{path.name}: row {row}", fields


FORMS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _table_rows,
    ".parquet": _parquet_rows,
}
