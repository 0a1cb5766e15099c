"""Read captions in the forms that people and programs write them in, each as a stream of `CaptionRecord`.

To add a form, write a reader and name it in `READERS` or in `_read_document`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.parquet import ParquetPicture, read_rows, schema_of
from vlm_bridge.data_pipeline.sources.base import read_lines
from vlm_bridge.data_pipeline.sources.karpathy import karpathy_images
from vlm_bridge.data_pipeline.sources.tables import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    IsImage,
    read_table,
)
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, parse_json, shown

SPLIT_FIELD, CONVERSATIONS = "split", "conversations"

_NO_CAPTION = frozenset({"", "nan", "<na>", "n/a", "none", "null"})
"""Cells that say that there is no caption, in lower case: what pandas and databases write."""
_QUOTED_ITEM = re.compile(r"""\[\s*["']""")


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """The captions that one place of a caption file gives an image.

    Attributes:
        where: "file:line" or "file: entry 3".
        image: the image's name as it is written.
        split: the split that is written beside it.
        stored: the image itself, where the file holds it.
        skipped: what the record holds besides and why it is not used.
    """

    where: str
    image: str
    captions: tuple[str, ...]
    split: SplitName | None = None
    stored: ParquetPicture | None = None
    skipped: tuple[str, ...] = ()


Records = Iterator[CaptionRecord]


def read_captions(path: Path, bad: BadSamples, is_image: IsImage = lambda name: False) -> Records:
    """Yield the records of a caption file, whose suffix tells its form.

    Args:
        path: a file with one of the suffixes of `READERS`; another one is read as a table.
        bad: takes the records that cannot be used.
        is_image: whether the dataset has an image of a name, see `read_table`.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    return READERS.get(path.suffix.lower(), _read_table)(path, bad, is_image)


def read_sidecars(folder: Path, images: Iterable[str], bad: BadSamples) -> Records:
    """Yield the captions of images from text files of the same name beside them, a caption a line."""
    lines = (
        (where, {"image": image, "caption": line})
        for image in images
        if (text := (folder / image).with_suffix(".txt")).is_file()
        for where, line in read_lines(text, bad)
    )
    return _records(lines, bad)


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
        split = normalise_split(str(named))
        if split is None:
            raise ValueError(f"unknown split {shown(named)} (train, val or test)")
    return CaptionRecord(where, image.strip(), captions, split, skipped=skipped)


def _captions_of(fields: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the captions of a record, and what of it is not used and why; ValueError where it has none."""
    named = [fields[name] for name in CAPTION_FIELDS if name in fields]
    if not named and CONVERSATIONS in fields:
        return _answer_of(fields[CONVERSATIONS])
    if not named:
        raise ValueError(f"has no caption (one of the fields {', '.join(CAPTION_FIELDS)})")
    value = next((value for value in named if value is not None), None)
    texts = _listed(value) if isinstance(value, str) else value
    if (
        isinstance(texts, float) and texts != texts
    ) or texts is None:  # what pandas makes of an empty cell
        texts = [""]
    texts = [""] if texts == [] else texts
    if not isinstance(texts, list) or not all(is_text(text) or text is None for text in texts):
        raise ValueError("its caption is neither text nor a list of texts")
    captions = [
        text for text in texts if text is not None and text.strip().lower() not in _NO_CAPTION
    ]
    # Dropped here, since a parquet file holds once what stands in each of its rows.
    short = tuple(text for text in captions if len(text) <= MAX_CAPTION_CHARACTERS)
    empty, long = len(texts) - len(captions), len(captions) - len(short)
    skipped = []
    if empty:
        skipped.append("an empty caption" if empty == 1 else f"{empty} empty captions")
    if long:
        skipped.append(f"{long} captions of more than {MAX_CAPTION_CHARACTERS:,} characters")
    return short, tuple(skipped)


def _listed(text: str) -> list[str]:
    """Return the captions of a cell: those of a list as JSON or Python writes it, or else the text itself.

    Raises:
        ValueError: a list that cannot be read, or not of texts.
    """
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [text]
    try:
        values = _parse_list(stripped)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        if _QUOTED_ITEM.match(stripped):
            raise ValueError(f"a list of captions that cannot be read: {shown(text)}") from None
        return [text]
    if not isinstance(values, list) or not all(map(is_text, values)):
        raise ValueError(f"a list that is not of captions: {shown(text)}")
    return values


def _parse_list(text: str) -> Any:
    """Return the value of a list as JSON or Python writes it; ValueError and others where it is none."""
    try:
        return parse_json(text)
    except ValueError:
        values = ast.literal_eval(text)
    # Python joins neighbouring texts, which numpy writes without commas.
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    if sum(token.type == tokenize.STRING for token in tokens) > len(values):
        raise ValueError("texts without commas between them")
    return values


def _answer_of(conversation: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the first answer of a LLaVA conversation; later ones answer questions that the caption lacks."""
    if not isinstance(conversation, list) or not all(
        isinstance(turn, dict) for turn in conversation
    ):
        raise ValueError(f"its {CONVERSATIONS} are no list of turns")
    answers = [turn.get("value") for turn in conversation if turn.get("from") == "gpt"]
    if not answers or not is_text(answers[0]):
        raise ValueError(f'its {CONVERSATIONS} have no answer (a turn from "gpt")')
    further = len(answers) - 1
    return (answers[0],), (f"{further} further answers of its conversation",) if further else ()


def _read_table(path: Path, bad: BadSamples, is_image: IsImage) -> Records:
    return _records(read_table(path, bad, is_image), bad)


def _read_json_lines(path: Path, bad: BadSamples, is_image: IsImage) -> Records:
    _, first = next(read_lines(path, BadSamples("")), ("", ""))
    if first.lstrip("\ufeff ").startswith("["):
        return _read_document(path, bad, is_image)
    return _records(_json_lines(path, bad), bad)


def _json_lines(path: Path, bad: BadSamples) -> Iterator[tuple[str, Any]]:
    is_empty = True
    for where, line in read_lines(path, bad):
        is_empty = False
        try:
            yield where, parse_json(line)
        except ValueError as error:
            bad.set_aside(where, f"not a JSON object ({error})")
    if is_empty and not bad.samples:
        raise DataError(f"{path}: the caption file is empty")


def _read_document(path: Path, bad: BadSamples, is_image: IsImage) -> Records:
    """Read JSON: a list of records (BLIP, LAVIS, LLaVA), COCO's form, Karpathy's form, or an object a line."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        _, first = next(read_lines(path, BadSamples("")), ("", ""))
        try:
            is_lines = isinstance(parse_json(first), dict)
        except ValueError:
            is_lines = False
        if is_lines:
            return _records(_json_lines(path, bad), bad)
        raise DataError(f"{path} is not JSON ({error}): get it again") from None
    if isinstance(content, list):
        return _records(_counted(path, content, bad), bad)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return (
            _read_coco(path, content, bad)
            if "annotations" in content
            else _read_karpathy(path, content, bad)
        )
    raise DataError(
        f"{path} is no caption file: a list of records with image and caption, COCO's form (images, annotations) and "
        "Karpathy's (images with sentences) are read"
    )


def _counted(path: Path, records: Iterable[Any], bad: BadSamples) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records):
        bad.total += 1
        yield f"{path}: entry {number}", record


def _read_coco(path: Path, content: dict[str, Any], bad: BadSamples) -> Records:
    captions = coco_captions(path, content, bad)
    for image in content["images"]:
        bad.total += 1
        where = f"{path}: image {image['id']}"
        try:
            yield make_record(
                where, {"image": image.get("file_name"), "captions": captions[image["id"]]}
            )
        except ValueError as error:
            bad.set_aside(where, str(error))


def coco_captions(path: Path, content: Any, bad: BadSamples) -> dict[Any, list[str]]:
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
            if annotation["image_id"] in captions:
                if not is_text(annotation["caption"]):
                    raise TypeError(f"the caption of annotation {annotation.get('id')} is no text")
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                bad.set_aside(
                    f"{path}: annotation {annotation.get('id')}",
                    f"its image {annotation['image_id']} is not among the images listed",
                )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged or no caption annotations of COCO ({shown(error)}): get it again"
        ) from None
    return captions


def _read_karpathy(path: Path, content: dict[str, Any], bad: BadSamples) -> Records:
    for number, image in enumerate(karpathy_images(path, content)):
        bad.total += 1
        yield CaptionRecord(
            f"{path}: image {number}",
            image.file_path,
            tuple(image.captions),
            image.split or "train",
        )


def _read_parquet(path: Path, bad: BadSamples, is_image: IsImage) -> Records:
    """Read columns as fields; an image column with the bytes of the images is read from when their turn comes."""
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
        bad.total += 1
        where, place = f"{path}: row {number}", None
        if stored is not None:
            place = ParquetPicture(path, row_group, row, stored)
            values["image"] = (values.pop(stored) or {}).get("path") or f"{path.stem}-{number:06d}"
        try:
            yield replace(make_record(where, values), stored=place)
        except ValueError as error:
            bad.set_aside(where, str(error))


def _records(found: Iterable[tuple[str, Any]], bad: BadSamples) -> Records:
    for where, fields in found:
        try:
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
            yield make_record(where, fields)
        except ValueError as error:
            bad.set_aside(where, str(error))


READERS: dict[str, Callable[[Path, BadSamples, IsImage], Records]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_document,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_table,
    ".parquet": _read_parquet,
}
