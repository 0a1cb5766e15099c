"""Read captions in the forms that people and programs write them in, each as `CaptionRecord`.

To add a form, write a reader and name it in `READERS` or in `_read_document`.
"""

from __future__ import annotations

import ast
import codecs
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.parquet import ParquetPicture, read_rows, schema_of
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources.image_files import without_number
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, lines_of, parse_json, shown

IMAGE_FIELDS = (
    "image", "file_name", "filename", "image_path", "image_name", "name", "path", "file",
)  # fmt: skip
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "description", "comment", "raw")
SPLIT_FIELD, CONVERSATIONS = "split", "conversations"
OPEN_QUOTE = (
    "a double quote opens here and does not close before the next row: close it, or write it twice"
)
STRAY_QUOTE = "a stray double quote: put the whole cell in quotes and write those within it twice"
MAX_CELL_LINES = 100
"""Lines of a quoted cell: a quote that is open for longer was opened by mistake."""

_NO_CAPTION = frozenset({"", "nan", "<na>", "n/a", "none", "null"})
_QUOTED_ITEM = re.compile(r"""\[\s*["']""")
_NO_COMMA = re.compile(r"""["']\s+["']""")  # numpy writes lists of texts so

IsImage = Callable[[str], bool]
"""Whether the dataset has an image of that name."""
Fields = Iterator[tuple[str, Any]]
"""("file:line", a record by the names of its fields)."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """The captions that one place of a caption file gives an image.

    Attributes:
        where: "file:line" or "file: entry 3".
        image: the image's name in the file.
        split: the split that is written beside it.
        stored: the image itself, where the file holds it.
        skipped: reasons for what the record holds besides.
    """

    where: str
    image: str
    captions: tuple[str, ...]
    split: SplitName | None = None
    stored: ParquetPicture | None = None
    skipped: tuple[str, ...] = ()


Records = Iterator[CaptionRecord]


def read_captions(path: Path, bad: Skipped, is_image: IsImage = lambda name: False) -> Records:
    """Yield the records of a caption file, whose suffix tells its form.

    Args:
        path: a file with one of the suffixes of `READERS`; another one is read as a table.
        bad: takes the records that cannot be used.
        is_image: tells a row from a line of text within a quoted cell, besides image suffixes.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    return READERS.get(path.suffix.lower(), _read_table)(path, bad, is_image)


def read_sidecars(folder: Path, images: Iterable[str], bad: Skipped) -> Records:
    """Yield the captions of images from text files beside them, a caption a line."""
    lines = (
        (where, {"image": image, "caption": line})
        for image in images
        if (text := (folder / image).with_suffix(".txt")).is_file()
        for where, line in read_lines(text, bad)
        if line.strip()
    )
    return _records(lines, bad)


def read_lines(path: Path, bad: Skipped) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line; ``bad`` takes those that are no text."""
    with path.open("rb") as file:
        mark = file.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # a spreadsheet's "Unicode text"
        try:
            lines = path.read_text(encoding="utf-16").splitlines()
        except ValueError:
            raise DataError(f"{path} is damaged UTF-16: save it as UTF-8") from None
        yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1))
        return
    for number, _, raw in lines_of(path):
        where = f"{path}:{number}"
        if raw is None:
            _skip(bad, where, "the line is too long for a caption")
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            _skip(bad, where, "not UTF-8 text")
            continue
        yield where, line.rstrip("\r\n")


def make_record(where: str, fields: dict[str, Any]) -> CaptionRecord:
    """Return the record of named values.

    Raises:
        ValueError: it names no image, has no captions, or an unknown split.
    """
    image = next((fields[name] for name in IMAGE_FIELDS if fields.get(name) is not None), None)
    if not is_text(image) or not image.strip():
        raise ValueError(f"names no image (one of the fields {', '.join(IMAGE_FIELDS)})")
    captions, skipped = _captions_of(fields)
    split = None
    if named := fields.get(SPLIT_FIELD):
        split = "train" if named == "restval" else normalise_split(str(named))
        if split is None:
            raise ValueError(f"unknown split {shown(named)} (train, val or test)")
    return CaptionRecord(where, image.strip(), captions, split, skipped=skipped)


def _skip(bad: Skipped, where: str, reason: str) -> None:
    bad.total += 1
    bad.add(where, reason)


def _records(found: Iterable[tuple[str, Any]], bad: Skipped) -> Records:
    for where, fields in found:
        bad.total += 1
        try:
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
            yield make_record(where, fields)
        except ValueError as error:
            bad.add(where, str(error))


def _captions_of(fields: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a record's captions, and reasons for those not used; ValueError where it has none."""
    named = [fields[name] for name in CAPTION_FIELDS if name in fields]
    if not named and CONVERSATIONS in fields:
        return _answer_of(fields[CONVERSATIONS])
    if not named:
        raise ValueError(f"has no caption (one of the fields {', '.join(CAPTION_FIELDS)})")
    value = next((value for value in named if value is not None), None)
    if isinstance(value, float) and value != value:  # pandas writes NaN for an empty cell
        value = None
    texts = _listed(value) if isinstance(value, str) else value or [""]
    if not isinstance(texts, list) or not all(is_text(text) or text is None for text in texts):
        raise ValueError("its caption is neither text nor a list of texts")
    captions = [text for text in texts if text and text.strip().lower() not in _NO_CAPTION]
    short = tuple(text for text in captions if len(text) <= MAX_CAPTION_CHARACTERS)
    empty, long = len(texts) - len(captions), len(captions) - len(short)
    skipped = []
    if empty:
        skipped.append("an empty caption" if empty == 1 else f"{empty} empty captions")
    if long:
        skipped.append(f"{long} captions of more than {MAX_CAPTION_CHARACTERS:,} characters")
    return short, tuple(skipped)


def _listed(text: str) -> list[str]:
    """Return the captions of a cell: those of a list as JSON or Python writes it, else the text.

    Raises:
        ValueError: a list that cannot be read, or not of texts.
    """
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [text]
    try:
        values = parse_json(stripped)
    except ValueError:
        try:
            values = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values = None
        # Python joins neighboring texts.
        if values is None or (values and _NO_COMMA.search(stripped)):
            if _QUOTED_ITEM.match(stripped):
                raise ValueError(f"a list of captions that cannot be read: {shown(text)}") from None
            return [text]
    if not isinstance(values, list) or not all(map(is_text, values)):
        raise ValueError(f"a list that is not of captions: {shown(text)}")
    return values or [""]


def _answer_of(conversation: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the first answer of a LLaVA conversation; later ones answer unknown questions."""
    turns = conversation if isinstance(conversation, list) else []
    answers = [t.get("value") for t in turns if isinstance(t, dict) and t.get("from") == "gpt"]
    if not answers or not is_text(answers[0]):
        raise ValueError(f'its {CONVERSATIONS} have no answer (a turn from "gpt")')
    further = len(answers) - 1
    return (answers[0],), (f"{further} further answers of its conversation",) if further else ()


# --- tables ---


def _read_table(path: Path, bad: Skipped, is_image: IsImage) -> Records:
    return _records(_rows(path, bad, is_image), bad)


def _rows(path: Path, bad: Skipped, is_image: IsImage) -> Fields:
    """Yield the rows of a table; a damaged row costs no other row.

    Commas, semicolons, tabs or bars part the cells. A table with tabs may have no header; its
    columns are image and caption. With tabs and bars, a quote that does not close is text.
    """
    lines = list(read_lines(path, bad))
    position = next((n for n, (_, line) in enumerate(lines) if line.strip()), None)
    if position is None:
        raise DataError(f"{path}: the caption file is empty or {bad.summary() or 'blank'}")
    where, first = lines[position]
    delimiter = _delimiter(path, first)
    header = [cell.strip().strip('"').strip().lower() for cell in first.split(delimiter)]
    if set(header) & set(IMAGE_FIELDS) and set(header) & set(CAPTION_FIELDS):
        position += 1
    elif delimiter == "\t":
        header = ["image", "caption"]
    else:
        raise DataError(
            f"{where}: the header must name an image column ({', '.join(IMAGE_FIELDS)}) "
            f"and a caption column ({', '.join(CAPTION_FIELDS)})"
        )
    image_column = next(n for n, name in enumerate(header) if name in IMAGE_FIELDS)

    def begins_row(line: str) -> bool:
        cells = line.split(delimiter)
        if len(cells) <= max(1, image_column):
            return False
        name = without_number(cells[image_column].strip().strip('"'))
        suffix = PurePosixPath(name.replace("\\", "/")).suffix.lower()
        return bool(name) and (suffix in IMAGE_SUFFIXES or is_image(name))

    while position < len(lines):
        where, text = lines[position]
        if not text.strip():
            position += 1
            continue
        cells, position = _parse_row(lines, position, delimiter, begins_row)
        cells = _fitted(cells, header, delimiter) if isinstance(cells, list) else cells
        if isinstance(cells, str):
            _skip(bad, where, cells)
        else:
            yield where, dict(zip(header, cells, strict=True))


def _parse_row(
    lines: list[tuple[str, str]], start: int, delimiter: str, begins_row: Callable[[str], bool]
) -> tuple[list[str] | str, int]:
    """Return the cells of the row at ``start`` or the reason of its damage, and the next line."""
    reason, after = OPEN_QUOTE, start + 1
    for end in range(start + 1, min(start + MAX_CELL_LINES, len(lines)) + 1):
        row = [f"{line}\n" for _, line in lines[start:end]]
        try:
            reader = csv.reader(row, delimiter=delimiter, strict=True, skipinitialspace=True)
            return next(reader), end
        except csv.Error as error:
            if "end of data" not in str(error):
                reason = f"{STRAY_QUOTE} ({error})"
                break
        if end < len(lines) and begins_row(lines[end][1]):
            after = end  # the lines between are part of the damaged row
            break
    if delimiter in "\t|":
        return lines[start][1].split(delimiter), start + 1
    return reason, after


def _fitted(cells: list[str], header: list[str], delimiter: str) -> list[str] | str:
    """Return as many cells as the header has, or a reason."""
    wanted = len(header)
    while len(cells) > wanted and not cells[-1].strip():  # spreadsheets add empty cells
        cells.pop()
    is_plain = delimiter in "\t|"
    if is_plain and len(cells) > wanted and header[-1] in CAPTION_FIELDS:
        glue = "| " if delimiter == "|" else delimiter  # blanks after a bar are not kept
        cells[wanted - 1 :] = [glue.join(cells[wanted - 1 :])]
    if len(cells) == wanted:
        return cells
    hint = "" if is_plain else "; put captions with commas in double quotes"
    return f"{len(cells)} cells instead of {wanted} ({delimiter.join(header)}){hint}"


def _delimiter(path: Path, first: str) -> str:
    if path.suffix.lower() == ".tsv" or "\t" in first:
        return "\t"
    return next((mark for mark in "|;" if mark in first and "," not in first), ",")


# --- JSON and parquet ---


def _read_json_lines(path: Path, bad: Skipped, is_image: IsImage) -> Records:
    lines = (line for _, line in read_lines(path, Skipped("")) if line.strip())
    if next(lines, "").lstrip().startswith("["):
        return _read_document(path, bad, is_image)
    return _records(_json_lines(path, bad), bad)


def _json_lines(path: Path, bad: Skipped) -> Fields:
    is_empty = True
    for where, line in read_lines(path, bad):
        if line.strip():
            is_empty = False
            try:
                yield where, parse_json(line)
            except ValueError as error:
                _skip(bad, where, f"not a JSON object ({error})")
    if is_empty and not bad.samples:
        raise DataError(f"{path}: the caption file is empty")


def _read_document(path: Path, bad: Skipped, is_image: IsImage) -> Records:
    """Read a list of records (BLIP, LAVIS, LLaVA), COCO's or Karpathy's form, or JSON lines."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        first = next((line for _, line in read_lines(path, Skipped("")) if line.strip()), "")
        try:
            is_lines = isinstance(parse_json(first), dict)
        except ValueError:
            is_lines = False
        if is_lines:
            return _records(_json_lines(path, bad), bad)
        raise DataError(f"{path} is not JSON ({error}): get it again") from None
    if isinstance(content, list):
        entries = ((f"{path}: entry {number}", record) for number, record in enumerate(content))
        return _records(entries, bad)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if "annotations" in content:
            captions = coco_captions(path, content, bad)
            named = (
                (f"{path}: image {i['id']}",
                 {"image": i.get("file_name"), "captions": captions[i["id"]]})
                for i in content["images"]
            )  # fmt: skip
        else:
            named = karpathy_images(path, content)
        return _records(named, bad)
    raise DataError(
        f"{path} is no caption file: a list of records with image and caption, COCO's form "
        "(images, annotations) and Karpathy's (images with sentences) are read"
    )


def coco_captions(path: Path, content: Any, bad: Skipped) -> dict[Any, list[str]]:
    """Return the captions of every image of COCO-form annotations by its id, in file order.

    Args:
        bad: takes the annotations whose image is not listed.

    Raises:
        DataError: the content is of another form.
    """
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            bad.total += 1
            text, image_id = annotation["caption"], annotation["image_id"]
            if not is_text(text):
                raise TypeError(f"the caption of annotation {annotation.get('id')} is no text")
            if image_id in captions:
                captions[image_id].append(text)
            else:
                where = f"{path}: annotation {annotation.get('id')}"
                bad.add(where, f"its image {image_id} is not among the images listed")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged or no caption annotations of COCO ({shown(error)}): get it again"
        ) from None
    return captions


def karpathy_images(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield image, captions and split of each image of Karpathy's split files (CVPR 2015)::

        {"images": [{"filename": "COCO_val2014_000000391895.jpg", "filepath": "val2014",
                     "split": "restval", "sentences": [{"raw": "A man with ..."}]}]}

    Raises:
        DataError: the content is of another form.
    """
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{path} is not one of Karpathy's split files: it has no list of images")
    for number, image in enumerate(images):
        where = f"{path}: image {number}"
        try:
            folder, name = image.get("filepath") or "", image["filename"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
            fields = {"image": f"{folder}/{name}" if folder else name, "captions": captions}
            yield where, fields | {SPLIT_FIELD: image["split"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where} lacks filename, split or sentences with raw text ({shown(error)})"
            ) from None


def find_karpathy_file(folder: Path, dataset: str) -> Path | None:
    """Return ``dataset_DATASET.json`` in one of the usual places below ``folder``, or None."""
    places = ("", "annotations", "karpathy", "caption_datasets")
    candidates = (folder / place / f"dataset_{dataset}.json" for place in places)
    return next((path for path in candidates if path.is_file()), None)


def _read_parquet(path: Path, bad: Skipped, is_image: IsImage) -> Records:
    """Read columns as fields; the bytes of an image column are read later."""
    schema = schema_of(path)

    import pyarrow.types as types

    stored = next(
        (f.name for f in schema if f.name in IMAGE_FIELDS and types.is_struct(f.type)), None
    )
    names = [name for name in schema.names if name in (*IMAGE_FIELDS, *CAPTION_FIELDS, SPLIT_FIELD)]
    if not set(names) & set(IMAGE_FIELDS) or not set(names) & set(CAPTION_FIELDS):
        raise DataError(
            f"{path}: it needs an image column ({', '.join(IMAGE_FIELDS)}) and a caption column "
            f"({', '.join(CAPTION_FIELDS)}); it has {', '.join(schema.names)}"
        )
    columns = [f"{name}.path" if name == stored else name for name in names]
    for number, (row_group, row, values) in enumerate(read_rows(path, columns)):
        place = None
        if stored is not None:
            place = ParquetPicture(path, row_group, row, stored)
            values["image"] = (values.pop(stored) or {}).get("path") or f"{path.stem}-{number:06d}"
        for record in _records([(f"{path}: row {number}", values)], bad):
            yield replace(record, stored=place)


READERS: dict[str, Callable[[Path, Skipped, IsImage], Records]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_document,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_table,
    ".parquet": _read_parquet,
}
