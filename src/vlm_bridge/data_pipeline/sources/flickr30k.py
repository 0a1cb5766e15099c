"""Flickr30k (Young, Lai, Hodosh and Hockenmaier, TACL 2014) in the layouts that people have it in.

Captions come from the first of these that is there, and splits with them where it has some:

- ``dataset_flickr30k.json``: Karpathy's file, with the splits that papers compare on (29,000 / 1,014 / 1,000);
- ``flickr_annotations_30k.csv``: the same as a table with the columns raw, sentids, split, filename;
- ``results_20130124.token``: the dataset's own, lines of ``name.jpg#number<TAB>caption``;
- ``results.csv``: the same as ``name.jpg| number| caption``;
- ``captions.txt``: the same as CSV with the columns image, caption, as copies on Kaggle have it.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.caption_folder import is_inside
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.sources.base import (
    Rejected,
    SourceItem,
    SourceOptions,
    read_lines,
    read_token_lines,
)
from vlm_bridge.data_pipeline.sources.karpathy import find_karpathy_file, read_karpathy_file
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import parse_json

CAPTION_FILES = ("flickr_annotations_30k.csv", "results_20130124.token", "results.csv", "captions.txt")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", "flickr30k")
"""Names of the folder of pictures; one of them within another of the same name is a usual accident of unpacking."""

IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "image_name"), ("caption", "comment")

# A widespread copy of results.csv has one line without its second bar: "2199200615.jpg| 4   A dog runs ...".
_BARRED_LINE = re.compile(r"(?P<image>[^|]+)\|\s*(?P<number>\d+)(?:\s*\||\s{2,})\s*(?P<caption>.*)")


@dataclass(frozen=True, slots=True)
class _Captioned:
    captions: list[str]
    split: SplitName | None = None


@dataclass
class Flickr30k:
    """31,783 photographs with five human captions each; 31,014 of them are in Karpathy's splits."""

    name: ClassVar[str] = "flickr30k"
    description: ClassVar[str] = "Flickr30k: photographs of everyday life, five human captions each"
    licence_note: ClassVar[str] = (
        "Flickr photographs of many owners under Flickr's terms of use: for non-commercial research and education "
        "only, not to be redistributed"
    )
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True

    input_dir: Path
    captions_file: Path | None = None
    """One of the files above, by whatever name; None finds it."""
    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Flickr30k:
        return cls(options.require_input_dir(cls.name), options.captions_file)

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the caption file."""
        self.rejected = []
        captions_file = self._captions_file()
        captioned = self._read(captions_file)
        if not captioned:
            raise DataError(f"{captions_file} has no captions")
        pictures = self._pictures()
        items: list[SourceItem] = []
        for file_name, of_image in captioned.items():
            image_id = Path(file_name).stem
            # A name is only ever looked up among the pictures found: it cannot lead anywhere else.
            path = pictures.pop(file_name, None)
            if path is None:
                self.rejected.append(Rejected(image_id, "its picture is missing"))
            elif not is_inside(path.parent.resolve(), path):
                self.rejected.append(Rejected(image_id, f"a link that leads out of {path.parent}"))
            elif not of_image.captions:
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, of_image.captions, of_image.split, path=path))
        if not items:
            raise DataError(
                f"none of the {len(captioned)} pictures of {captions_file} is in {self.input_dir}"
            )
        self.rejected += [
            Rejected(Path(name).stem, f"it is not in {captions_file.name}") for name in sorted(pictures)
        ]
        decided = all(item.split is not None for item in items)
        self.split_rule = f"Karpathy's splits ({captions_file.name})" if decided else None
        return items

    def _captions_file(self) -> Path:
        if self.captions_file is not None:
            if not self.captions_file.is_file():
                raise DataError(f"no such caption file: {self.captions_file} (--captions-file)")
            return self.captions_file
        if karpathy := find_karpathy_file(self.input_dir, self.name):
            return karpathy
        folders = [self.input_dir, *(self.input_dir / name for name in IMAGE_FOLDERS)]
        candidates = (folder / name for name in CAPTION_FILES for folder in folders)
        for path in candidates:
            if path.is_file():
                return path
        names = ", ".join(("dataset_flickr30k.json", *CAPTION_FILES))
        raise DataError(f"{self.input_dir} is not Flickr30k: it has none of {names}")

    def _read(self, path: Path) -> dict[str, _Captioned]:
        if path.suffix.lower() == ".json":
            images = read_karpathy_file(path, self.name)
            return {image.file_name: _Captioned(image.captions, image.split) for image in images}
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = [cell.strip() for cell in file.readline().split(",")]
        if "raw" in header:
            return _read_annotations(path)
        if set(header) & set(IMAGE_COLUMNS) and set(header) & set(CAPTION_COLUMNS):
            return self._read_table(path, header)
        return self._read_barred_lines(path) if path.suffix.lower() == ".csv" else _read_token_file(path)

    def _read_table(self, path: Path, header: list[str]) -> dict[str, _Captioned]:
        """Read CSV whose header names the columns; a row without image or caption is rejected, not fatal."""
        image = next(header.index(name) for name in IMAGE_COLUMNS if name in header)
        caption = next(header.index(name) for name in CAPTION_COLUMNS if name in header)
        captioned: dict[str, _Captioned] = {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            try:
                next(rows)
                for row in filter(None, rows):
                    if len(row) != len(header) or not row[image].strip():
                        where = f"{path.name}:{rows.line_num}"
                        reason = (
                            f"no row of {','.join(header)} (a caption with commas stands in double quotes)"
                        )
                        self.rejected.append(Rejected(where, reason))
                        continue
                    captioned.setdefault(row[image].strip(), _Captioned([])).captions.append(row[caption])
            except (ValueError, csv.Error) as error:
                raise DataError(f"{path}:{rows.line_num}: damaged ({error})") from None
        return captioned

    def _read_barred_lines(self, path: Path) -> dict[str, _Captioned]:
        """Read ``image_name| comment_number| comment``; a line that is none of it is set aside, not fatal."""
        captioned: dict[str, _Captioned] = {}
        for number, (where, line) in enumerate(read_lines(path)):
            match = _BARRED_LINE.fullmatch(line)
            if match:
                of_image = captioned.setdefault(match["image"].strip(), _Captioned([]))
                of_image.captions.append(match["caption"])
            elif number > 0:  # the header names the columns
                self.rejected.append(Rejected(Path(where).name, "no line of name| number| caption"))
        return captioned

    def _pictures(self) -> dict[str, Path]:
        """Find the folder of pictures; its files by name."""
        for folder in self._image_folders():
            pictures = {path.name: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
            if pictures:
                return pictures
        raise DataError(
            f"{self.input_dir} has no folder of pictures (looked for {', '.join(IMAGE_FOLDERS)} and in itself)"
        )

    def _image_folders(self) -> list[Path]:
        folders = [self.input_dir / name / inner for name in IMAGE_FOLDERS for inner in ("", name)]
        return [folder for folder in (*folders, self.input_dir) if folder.is_dir()]


def _read_token_file(path: Path) -> dict[str, _Captioned]:
    captioned: dict[str, _Captioned] = {}
    for _, file_name, caption in read_token_lines(path):
        captioned.setdefault(file_name, _Captioned([])).captions.append(caption)
    return captioned


def _read_annotations(path: Path) -> dict[str, _Captioned]:
    """Read a table whose ``raw`` column holds the captions of an image as a JSON list."""
    captioned: dict[str, _Captioned] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        try:
            missing = {"raw", "split", "filename"} - set(table.fieldnames or ())
            if missing:
                raise DataError(f"{path}: it has no column {', '.join(sorted(missing))}")
            for row in table:
                captions, split = parse_json(row["raw"]), normalise_split(row["split"])
                if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
                    raise ValueError("raw is no list of texts")
                if split is None:
                    raise ValueError(f"unknown split {row['split']!r}")
                if not row["filename"]:  # a line that ends early
                    raise ValueError("no filename")
                captioned[row["filename"]] = _Captioned(captions, split)
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise DataError(f"{path}:{table.line_num}: damaged ({error})") from None
    return captioned
