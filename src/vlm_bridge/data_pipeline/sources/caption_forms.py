"""Read captions in the forms that people and programs write them in, each as `CaptionRecord`.

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
from vlm_bridge.data_pipeline.parquet import ParquetImage, read_rows, schema_of
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, lines_of, parse_json, shown

IMAGE_FIELDS = (
    "image", "file_name", "filename", "image_path", "image_name", "name", "path", "file",
)  # fmt: skip
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "description", "comment", "raw")
NEEDED = f"an image ({', '.join(IMAGE_FIELDS)}) and a caption ({', '.join(CAPTION_FIELDS)})"
RESTVAL = "restval"  # Karpathy's name for images of COCO's val part that are for training
QUOTING = ": put the cell in quotes and double those within it"
OPEN_QUOTE = f"a double quote opens here and does not close before the next row{QUOTING}"
MAX_CELL_LINES = 100  # a quote that is open for longer was opened by mistake

_NO_CAPTION = frozenset({"", "nan", "<na>", "n/a", "none", "null"})
_LIST = re.compile(r"""\[(\s*["'].*)?\]""", re.DOTALL)
_NO_COMMA = re.compile(r"""["']\s+["']""")  # numpy writes lists of texts so; Python joins them
_CAPTION_NUMBER = re.compile(r"#\d+\s*$")

Rows = Iterator[tuple[str, Any]]
"""("file:line", values by the names of their fields, or a ValueError) of each row."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """The captions that one place of a caption file gives an image."""

    where: str  # "file:line" or "file: entry 3"
    image: str
    captions: tuple[str, ...]
    part: str = ""  # the split as the file writes it
    stored: ParquetImage | None = None  # the image itself, where the file holds it

    @property
    def split(self) -> SplitName | None:
        return "train" if self.part == RESTVAL else normalise_split(self.part)


def without_number(name: str) -> str:
    """Return an image's name without the number of its caption (``a.jpg#0``)."""
    return _CAPTION_NUMBER.sub("", name).strip()


def read_captions(path: Path, skipped: Skipped) -> Iterator[CaptionRecord]:
    """Yield the records of a caption file, whose suffix tells its form (`FORMS`, else a table).

    Raises DataError if the file as a whole cannot be read; damaged rows are ``skipped``.
    """
    return _records(FORMS.get(path.suffix.lower(), _table_rows)(path), skipped)


def read_sidecars(folder: Path, images: Iterable[str], skipped: Skipped) -> Iterator[CaptionRecord]:
    """Yield the captions of images from text files beside them, a caption a line."""
    texts = ((image, (folder / image).with_suffix(".txt")) for image in images)
    lines = ((image, line) for image, text in texts if text.is_file() for line in _lines_of(text))
    return _records(((at, {"image": image, "text": line}) for image, (at, line) in lines), skipped)


def _records(rows: Iterable[tuple[str, Any]], skipped: Skipped) -> Iterator[CaptionRecord]:
    for where, row in rows:
        skipped.total += 1
        try:
            record = _make_record(where, row)
        except ValueError as error:
            skipped.add(where, str(error))
        else:
            yield record


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
    captions = tuple(text for text in texts if text.strip().lower() not in _NO_CAPTION)
    part, stored = str(row.get("split") or ""), row.get(ParquetImage)
    record = CaptionRecord(where, image.strip(), captions, part, stored)
    if part and record.split is None:
        raise ValueError(f"unknown split {shown(part)} (train, val or test)")
    return record


def _texts_of(row: dict[Any, Any]) -> list[str]:
    """Return a row's captions, of a LLaVA conversation the first answer."""
    values = [row[name] for name in CAPTION_FIELDS if name in row]
    if not values and "conversations" in row:
        try:
            turns = (turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
            values = [next(turns)]
        except (StopIteration, LookupError, TypeError):
            raise ValueError('its conversations have no answer (a turn from "gpt")') from None
    if not values:
        raise ValueError(f"has no caption (one of the fields {', '.join(CAPTION_FIELDS)})")
    value = next((value for value in values if value is not None), "")
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


def _lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line; bytes that are not UTF-8 make it no text."""
    for number, line in lines_of(path):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        yield f"{path}:{number}", text.rstrip("\r\n")


# --- tables ---


def _table_rows(path: Path) -> Rows:
    """Yield the rows of a table; a damaged row costs no other row.

    Commas, semicolons, tabs or bars part the cells. A table with tabs may have no header; its
    columns are image and caption.
    """
    lines = _lines_of(path)
    where, first = next((line for line in lines if line[1].strip()), ("", ""))
    if not is_text(first) or not first:
        raise DataError(f"{path}: the caption file is empty or no UTF-8 text")
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in first else ","
    if delimiter not in first:
        delimiter = next((mark for mark in "|;" if mark in first), delimiter)
    header = [cell.strip().strip('"').strip().lower() for cell in first.split(delimiter)]
    if not (set(header) & set(IMAGE_FIELDS) and set(header) & set(CAPTION_FIELDS)):
        if delimiter != "\t":
            raise DataError(f"{where}: the header must name {NEEDED}")
        header, lines = ["image", "caption"], chain([(where, first)], lines)
    column = next(n for n, name in enumerate(header) if name in IMAGE_FIELDS)
    for where, cells in _split_rows(lines, delimiter, column):
        yield where, _fit(cells, header, delimiter) if isinstance(cells, list) else cells


def _split_rows(
    lines: Iterable[tuple[str, str]], delimiter: str, column: int
) -> Iterator[tuple[str, list[str] | ValueError]]:
    """Yield the cells of each row; a quoted cell may hold lines, but none that is a row itself.

    With tabs and bars, a row is a line, and a quote that does not close is text.
    """
    start, text = "", ""
    for where, line in chain(lines, [("", "")]):
        if text and (not where or _begins_row(line.split(delimiter), column)):
            yield start, ValueError(OPEN_QUOTE)
            text = ""
        start, text = start if text else where, f"{text}{line}\n"
        reader = csv.reader([text], delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            if cells := next(reader):
                yield start, cells
        except csv.Error as error:
            if delimiter in "\t|":
                yield start, line.split(delimiter)
            elif "end of data" not in str(error):
                yield start, ValueError(f"a stray double quote ({error}){QUOTING}")
            elif text.count("\n") < MAX_CELL_LINES:
                continue
            else:
                yield start, ValueError(OPEN_QUOTE)
        text = ""


def _begins_row(cells: list[str], column: int) -> bool:
    """Return whether a line within a quoted cell is rather a row: it names an image file."""
    name = without_number(cells[column].strip().strip('"')) if column < len(cells) > 1 else ""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _fit(cells: list[str], header: list[str], delimiter: str) -> dict[str, str] | ValueError:
    """Return the cells by the names of their columns."""
    wanted, is_plain = len(header), delimiter in "\t|"
    while len(cells) > wanted and not cells[-1].strip():  # spreadsheets add empty cells
        cells.pop()
    if is_plain and len(cells) > wanted and header[-1] in CAPTION_FIELDS:
        glue = "| " if delimiter == "|" else delimiter  # blanks after a bar are not kept
        cells[wanted - 1 :] = [glue.join(cells[wanted - 1 :])]
    if len(cells) == wanted:
        return dict(zip(header, cells, strict=True))
    hint = "" if is_plain else "; put captions with commas in double quotes"
    columns = delimiter.join(header)
    return ValueError(f"{len(cells)} cells instead of {wanted} ({columns}){hint}")


# --- JSON and parquet ---


def _json_lines(path: Path) -> Rows:
    for where, line in _lines_of(path):
        if line.strip():
            try:
                yield where, parse_json(line)
            except ValueError as error:
                yield where, ValueError(f"not a JSON object ({error})")


def _json_rows(path: Path) -> Rows:
    """Read JSON lines, a list of records (BLIP, LAVIS, LLaVA), or COCO's or Karpathy's form."""
    content = path.read_bytes().lstrip()
    if path.suffix.lower() == ".jsonl" and not content.startswith(b"["):
        return _json_lines(path)
    try:
        document = parse_json(content)
    except ValueError as error:
        try:
            parse_json(content.partition(b"\n")[0])
        except ValueError:
            raise DataError(f"{path} is damaged or no JSON ({error}): get it again") from None
        return _json_lines(path)
    if isinstance(document, list):
        return ((f"{path}: entry {number}", row) for number, row in enumerate(document))
    try:
        rows = _coco_rows(document) if "annotations" in document else _karpathy_rows(document)
        return iter([(f"{path}: image {shown(image_id)}", row) for image_id, row in rows])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged or no caption file ({shown(error)}): a list of records with "
            f"{NEEDED}, COCO's form (images, annotations) and Karpathy's (images with filename, "
            "split and sentences) are read"
        ) from None


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
    structs = (field.name for field in schema if types.is_struct(field.type))
    stored = next((name for name in structs if name in IMAGE_FIELDS), None)
    names = [name for name in schema.names if name in (*IMAGE_FIELDS, *CAPTION_FIELDS, "split")]
    if not set(names) & set(IMAGE_FIELDS) or not set(names) & set(CAPTION_FIELDS):
        raise DataError(f"{path}: its columns must name {NEEDED}; it has {', '.join(schema.names)}")
    columns = [f"{name}.path" if name == stored else name for name in names]
    for number, (row_group, row, values) in enumerate(read_rows(path, columns)):
        fields: dict[Any, Any] = values
        if stored is not None:
            fields[ParquetImage] = ParquetImage(path, row_group, row, stored)
            fields["image"] = (values.pop(stored) or {}).get("path") or f"{path.stem}-{number:06d}"
        yield f"{path}: row {number}", fields


FORMS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _table_rows,
    ".parquet": _parquet_rows,
}
