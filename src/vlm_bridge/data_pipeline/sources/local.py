"""A folder of pictures with captions as CSV, TSV or JSONL, or in Hugging Face's image-folder layout."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlm_bridge.data_pipeline.bad_samples import MAX_BAD_SHARE, BadSamples
from vlm_bridge.data_pipeline.caption_folder import inside, is_inside
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem, SourceOptions, read_lines
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, parse_json, shown

CAPTION_FILES = (
    "captions.jsonl",
    "captions.csv",
    "captions.tsv",
    "captions.txt",
    "metadata.jsonl",
    "metadata.csv",
)
IMAGE_FIELDS = ("image", "file_name", "filename", "image_path", "image_name", "name", "path", "file")
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "description")
SPLIT_FIELD = "split"

# Where the pictures of a caption file may lie, beside the file itself.
_PICTURE_FOLDERS = ("", "images", "Images")


@dataclass(frozen=True)
class _Row:
    """One line of a caption file: ``where`` is "file:line"."""

    where: str
    image: str
    captions: list[str]
    split: SplitName | None


@dataclass
class LocalFolder:
    """Your own pictures; splits come from a ``split`` column or folders, otherwise from image ids."""

    name: ClassVar[str] = "local"
    description: ClassVar[str] = "A folder of pictures with a caption file (CSV, TSV, JSONL, metadata)"
    licence_note: ClassVar[str] = "Your own pictures and captions: under whatever licence you hold them"
    default_caption_style: ClassVar[CaptionStyle] = "raw"
    finds_near_duplicates: ClassVar[bool] = True

    input_dir: Path
    captions_file: Path | None = None
    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> LocalFolder:
        return cls(options.require_input_dir(cls.name), options.captions_file)

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of their first caption.

        Lines that cannot be used are set aside, up to a share of them (`MAX_BAD_SHARE`).
        """
        self.rejected = []
        rows: dict[Path, list[_Row]] = {}
        missing: list[Rejected] = []
        bad = BadSamples("lines of the caption file")
        for captions_file, folder_split in self._caption_files():
            for row in _read_rows(captions_file, folder_split, bad):
                try:
                    path = self._find_picture(captions_file.parent, row)
                except ValueError as error:
                    bad.set_aside(row.where, str(error))
                    continue
                if path is None:
                    missing.append(Rejected(row.image, f"its picture is missing ({_short(row.where)})"))
                else:
                    rows.setdefault(path, []).append(row)
        bad.check(MAX_BAD_SHARE)
        if not rows:
            if missing:
                raise DataError(
                    f"none of the {len(missing)} pictures in the caption file exists under {self.input_dir} "
                    f"(first: {missing[0].id})"
                )
            raise DataError(f"the caption file in {self.input_dir} has no captions")
        ids = _image_ids(list(rows), self.input_dir)
        without_caption = sorted(
            self._relative(path)
            for path in self.input_dir.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path not in rows
        )
        self.rejected = [Rejected(_short(sample.where), sample.reason) for sample in bad.samples]
        self.rejected += missing + [Rejected(name, "it has no caption") for name in without_caption]
        return [
            SourceItem(
                image_id=ids[path],
                captions=[caption for row in of_image for caption in row.captions],
                split=_one_split(of_image),
                path=path,
            )
            for path, of_image in rows.items()
        ]

    def _caption_files(self) -> list[tuple[Path, SplitName | None]]:
        """Find the caption file, or one in each split folder (``train/``, ``validation/`` ...)."""
        if self.captions_file is not None:
            if not self.captions_file.is_file():
                raise DataError(f"no such caption file: {self.captions_file} (--captions-file)")
            return [(self.captions_file, None)]
        here = _candidates(self.input_dir)
        if len(here) > 1:
            names = ", ".join(path.name for path in here)
            raise DataError(
                f"{self.input_dir} has several caption files ({names}): choose one with --captions-file"
            )
        if here:
            return [(here[0], None)]
        found: list[tuple[Path, SplitName | None]] = []
        for folder in sorted(path for path in self.input_dir.iterdir() if path.is_dir()):
            split = normalise_split(folder.name)
            if split is not None:
                found.extend((path, split) for path in _candidates(folder)[:1])
        if not found:
            raise DataError(
                f"no caption file in {self.input_dir} (looked for {', '.join(CAPTION_FILES)}): "
                "name it with --captions-file"
            )
        return found

    def _find_picture(self, beside: Path, row: _Row) -> Path | None:
        """Return the row's picture: relative to the input folder or its caption file, or in ``images/``.

        Raises:
            ValueError: the path leads out of these folders, as it is written or by a symbolic link.
        """
        for folder in dict.fromkeys((beside, self.input_dir)):
            for sub in _PICTURE_FOLDERS:
                path = inside(folder / sub, row.image)
                if not path.is_file():
                    continue
                if not is_inside(folder.resolve(), path):
                    raise ValueError(f"picture path {shown(row.image)} is a link that leads out of {folder}")
                return path
        return None

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.input_dir).as_posix()


def _candidates(folder: Path) -> list[Path]:
    return [folder / name for name in CAPTION_FILES if (folder / name).is_file()]


def _short(where: str) -> str:
    return Path(where).name


def _one_split(rows: list[_Row]) -> SplitName | None:
    splits: set[SplitName] = {row.split for row in rows if row.split is not None}
    if len(splits) > 1:
        raise DataError(
            f"{rows[-1].where}: {rows[-1].image} is in several splits ({', '.join(sorted(splits))})"
        )
    return splits.pop() if splits else None


def _image_ids(paths: list[Path], root: Path) -> dict[Path, str]:
    """Name images by their path under ``root``, without its suffix unless two would then be alike."""

    def relative(path: Path) -> Path:
        return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)

    def stem(path: Path) -> str:
        return relative(path).with_suffix("").as_posix()

    uses = Counter(map(stem, paths))
    return {path: stem(path) if uses[stem(path)] == 1 else relative(path).as_posix() for path in paths}


def _read_rows(path: Path, folder_split: SplitName | None, bad: BadSamples) -> Iterator[_Row]:
    is_json = path.suffix.lower() in (".jsonl", ".json")
    for where, record in _read_json_lines(path, bad) if is_json else _read_table(path, bad):
        try:
            yield _make_row(where, record, folder_split)
        except ValueError as error:
            bad.set_aside(where, str(error))


def _make_row(where: str, record: dict[str, Any], folder_split: SplitName | None) -> _Row:
    """The row of a record; ValueError where it lacks something."""
    image = _first(record, IMAGE_FIELDS)
    captions = _first(record, CAPTION_FIELDS)
    if isinstance(captions, str):
        captions = [captions]
    if not is_text(image) or not image.strip():
        raise ValueError(f"names no picture (one of the fields {', '.join(IMAGE_FIELDS)})")
    if not isinstance(captions, list) or not all(map(is_text, captions)):
        raise ValueError(f"has no caption (one of the fields {', '.join(CAPTION_FIELDS)})")
    split = folder_split
    if named := record.get(SPLIT_FIELD):
        split = normalise_split(str(named))
        if split is None:
            raise ValueError(f"unknown split {shown(named)} (train, val or test)")
    return _Row(where, image.strip(), captions, split)


def _first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _read_json_lines(path: Path, bad: BadSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in read_lines(path, bad):
        try:
            record = parse_json(line)
        except ValueError as error:
            bad.set_aside(where, f"not a JSON object ({error})")
            continue
        if isinstance(record, dict):
            yield where, record
        else:
            bad.set_aside(where, "not a JSON object")


def _read_table(path: Path, bad: BadSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read CSV (a header names the columns) or ``name<TAB>caption`` lines (a header is welcome)."""
    where, first = next(read_lines(path), ("", ""))
    if not first:
        raise DataError(f"{path}: the caption file is empty")
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in first else ","
    if delimiter == "," and ";" in first and "," not in first:
        delimiter = ";"
    try:
        header = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=delimiter))]
    except csv.Error as error:
        raise DataError(f"{where}: damaged header ({error})") from None
    has_header = bool(set(header) & set(IMAGE_FIELDS)) and bool(set(header) & set(CAPTION_FIELDS))
    if delimiter == "\t" and not has_header:
        yield from _read_pairs(path, bad)
    elif has_header:
        yield from _read_cells(path, header, delimiter, bad)
    else:
        raise DataError(
            f"{where}: the header must name a picture column ({', '.join(IMAGE_FIELDS)}) "
            f"and a caption column ({', '.join(CAPTION_FIELDS)})"
        )


def _read_pairs(path: Path, bad: BadSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in read_lines(path, bad):
        name, tab, caption = line.partition("\t")
        if tab:
            yield where, {"image": name, "caption": caption}
        else:
            bad.set_aside(where, "expected name<TAB>caption")


def _read_cells(
    path: Path, header: list[str], delimiter: str, bad: BadSamples
) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in read_lines(
        path
    ):  # a file that is not UTF-8 is so throughout: said before anything is made of it
        pass
    # The file, not its lines: a quoted cell may hold line breaks.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            next(row for row in reader if row)
            for row in filter(None, reader):
                bad.total += 1
                where = f"{path}:{reader.line_num}"
                if len(row) == len(header):
                    yield where, dict(zip(header, row, strict=True))
                else:
                    reason = f"{len(row)} cells where the header has {len(header)}"
                    bad.set_aside(where, f"{reason} (captions with commas stand in double quotes)")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: damaged CSV ({error})") from None
