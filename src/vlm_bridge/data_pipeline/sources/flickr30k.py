"""Flickr30k (Young, Lai, Hodosh and Hockenmaier, TACL 2014) in the layouts that people have it in.

Captions come from the first of these that is there, and splits with them where it has some:

- ``dataset_flickr30k.json``: Karpathy's file, with the splits that papers compare on (29,000 / 1,014 / 1,000);
- ``flickr_annotations_30k.csv``: the same as a table with the columns raw, sentids, split, filename;
- ``results_20130124.token``: the dataset's own, lines of ``name.jpg#number<TAB>caption``;
- ``results.csv``: the same as ``name.jpg| number| caption``;
- ``captions.txt``: the same as CSV with the columns image, caption, as copies on Kaggle have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.bad_samples import MAX_BAD_SHARE, MIN_BAD_ROWS, BadSamples
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources.base import (
    Rejected,
    SourceItem,
    SourceOptions,
    read_lines,
    read_token_lines,
)
from vlm_bridge.data_pipeline.sources.caption_forms import read_captions
from vlm_bridge.data_pipeline.sources.image_files import LEADS_OUT, ImageFiles
from vlm_bridge.data_pipeline.sources.karpathy import find_karpathy_file, read_karpathy_file
from vlm_bridge.data_pipeline.sources.tables import CAPTION_FIELDS, IMAGE_FIELDS
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError

CAPTION_FILES = (
    "flickr_annotations_30k.csv",
    "results_20130124.token",
    "results.csv",
    "captions.txt",
)
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", "flickr30k")
"""Names of the folder of images; one of them within another of the same name is a usual accident of unpacking."""

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
    follow_links: bool = False
    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Flickr30k:
        return cls(options.require_input_dir(cls.name), options.captions_file, options.follow_links)

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the file that tells Flickr30k; ``captions.txt`` may be of any images."""
        names = ("dataset_flickr30k.json", *CAPTION_FILES[:-1])
        found = _find_captions(folder)
        return found.name if found is not None and found.name in names else None

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the caption file."""
        self.rejected = []
        captions_file = self._captions_file()
        bad = BadSamples(f"lines of {captions_file.name}")
        captioned = _read(captions_file, bad)
        if not captioned:
            raise DataError(
                f"{captions_file} has no captions{f': {bad.summary()}' if bad.samples else ''}"
            )
        bad.check(MAX_BAD_SHARE, at_least=MIN_BAD_ROWS)
        self.rejected += [
            Rejected(Path(sample.where).name, sample.reason) for sample in bad.samples
        ]
        images = self._images()
        items: list[SourceItem] = []
        for file_name, of_image in captioned.items():
            image_id = Path(file_name).stem
            path, problem = images.look_up(file_name)
            if path is None:
                self.rejected.append(Rejected(image_id, problem))
            elif not of_image.captions:
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, of_image.captions, of_image.split, path=path))
        if not items:
            why = (
                f": {', '.join(images.linked_out[:3])} is {LEADS_OUT}" if images.linked_out else ""
            )
            raise DataError(
                f"none of the {len(captioned)} images of {captions_file} is in {self.input_dir}{why}"
            )
        used = {item.path for item in items}
        self.rejected += [
            Rejected(Path(name).stem, f"it is not in {captions_file.name}")
            for name, path in images.paths.items()
            if path not in used and name not in captioned
        ]
        decided = all(item.split is not None for item in items)
        self.split_rule = f"Karpathy's splits ({captions_file.name})" if decided else None
        return items

    def _captions_file(self) -> Path:
        if self.captions_file is not None:
            if not self.captions_file.is_file():
                raise DataError(f"no such caption file: {self.captions_file} (--captions-file)")
            return self.captions_file
        if found := _find_captions(self.input_dir):
            return found
        names = ", ".join(("dataset_flickr30k.json", *CAPTION_FILES))
        raise DataError(f"{self.input_dir} is not Flickr30k: it has none of {names}")

    def _images(self) -> ImageFiles:
        """Find the folder of images."""
        folders = [self.input_dir / name / inner for name in IMAGE_FOLDERS for inner in ("", name)]
        for folder in (*folders, self.input_dir):
            if folder.is_dir():
                images = ImageFiles(self.input_dir, folder, self.follow_links, recursive=False)
                if images.paths or images.linked_out:
                    return images
        raise DataError(
            f"{self.input_dir} has no folder of images (looked for {', '.join(IMAGE_FOLDERS)} and in itself)"
        )


def _find_captions(folder: Path) -> Path | None:
    if karpathy := find_karpathy_file(folder, Flickr30k.name):
        return karpathy
    folders = [folder, *(folder / name for name in IMAGE_FOLDERS)]
    return next(
        (path for name in CAPTION_FILES for f in folders if (path := f / name).is_file()), None
    )


def _read(path: Path, bad: BadSamples) -> dict[str, _Captioned]:
    """Return captions and split of every image by its file name, in file order."""
    if path.suffix.lower() == ".json":
        images = read_karpathy_file(path, Flickr30k.name)
        return {image.file_name: _Captioned(image.captions, image.split) for image in images}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = {cell.strip().lower() for cell in file.readline().split(",")}
    captioned: dict[str, _Captioned] = {}
    if header & set(IMAGE_FIELDS) and header & set(CAPTION_FIELDS):
        for record in read_captions(path, bad):
            captioned.setdefault(record.image, _Captioned([], record.split)).captions.extend(
                record.captions
            )
        return captioned
    is_barred = path.suffix.lower() == ".csv"
    for file_name, caption in _barred_lines(path, bad) if is_barred else _token_lines(path):
        captioned.setdefault(file_name, _Captioned([])).captions.append(caption)
    return captioned


def _token_lines(path: Path) -> Iterator[tuple[str, str]]:
    return ((file_name, caption) for _, file_name, caption in read_token_lines(path))


def _barred_lines(path: Path, bad: BadSamples) -> Iterator[tuple[str, str]]:
    """Yield file name and caption of the lines ``image_name| comment_number| comment`` below the header."""
    for number, (where, line) in enumerate(read_lines(path, bad)):
        match = _BARRED_LINE.fullmatch(line)
        if match:
            yield match["image"].strip(), match["caption"]
        elif number > 0:  # the header names the columns
            bad.set_aside(where, "no line of name| number| caption")
