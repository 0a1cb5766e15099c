"""COCO captions (Chen et al., arXiv:1504.00325), of 2014 or 2017, with COCO's own or Karpathy's splits.

Both years caption the same 123,287 photographs and deal them out differently; an image's id is the same in both, and
so is the number in its file name: ``train2014/COCO_train2014_000000000009.jpg`` is ``train2017/000000000009.jpg``.
Pictures are therefore found by id, in whichever folders are there, also where Karpathy's file speaks of 2014.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem, SourceOptions
from vlm_bridge.data_pipeline.sources.caption_forms import coco_captions
from vlm_bridge.data_pipeline.sources.image_files import LEADS_OUT, MISSING, ImageFiles
from vlm_bridge.data_pipeline.sources.karpathy import (
    RESTVAL,
    KarpathyImage,
    find_karpathy_file,
    read_karpathy_file,
)
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import parse_json, shown

YEARS = (2017, 2014)
PARTS: tuple[SplitName, ...] = ("train", "val")
"""COCO has test pictures too, but keeps their captions."""

_PICTURE_FOLDERS = tuple(f"{part}{year}" for year in YEARS for part in PARTS)
_PICTURE_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


@dataclass
class Coco:
    """123,287 photographs with five human captions each (a few have six or seven)."""

    name: ClassVar[str] = "coco"
    description: ClassVar[str] = (
        "COCO captions: photographs of common objects, five human captions each"
    )
    licence_note: ClassVar[str] = (
        "captions: CC BY 4.0, the COCO Consortium; photographs: Flickr's terms of use and the licence "
        "that the annotations name for each, many of them non-commercial"
    )
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True

    input_dir: Path
    karpathy_file: Path | None = None
    """None takes ``dataset_coco.json`` if it is there, or else COCO's own splits."""
    year: int | None = None
    """Of COCO's own annotations; None takes the newest there is. Karpathy's file needs none."""
    restval: bool = True
    """Train on Karpathy's restval images too, as papers do: 113,287 training images instead of 82,783."""
    follow_links: bool = False
    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Coco:
        return cls(
            options.require_input_dir(cls.name),
            options.captions_file,
            options.year,
            options.restval,
            options.follow_links,
        )

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the file that tells COCO, None where there is none."""
        if karpathy := find_karpathy_file(folder, cls.name):
            return karpathy.name
        names = (f"annotations/captions_{part}{year}.json" for year in YEARS for part in PARTS)
        return next((name for name in names if (folder / name).is_file()), None)

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of their annotation files, train first."""
        self.rejected = []
        if self.karpathy_file is not None and not self.karpathy_file.is_file():
            raise DataError(f"no such caption file: {self.karpathy_file} (--captions-file)")
        karpathy = self.karpathy_file
        if karpathy is None and self.year is None:
            karpathy = find_karpathy_file(self.input_dir, self.name)
        captioned = self._of_karpathy(karpathy) if karpathy else self._of_coco()
        images, linked_out = self._images()
        items: list[SourceItem] = []
        for coco_id, captions, split in captioned:
            image_id = f"{coco_id:012d}"
            if coco_id not in images:
                self.rejected.append(Rejected(image_id, MISSING))
            elif not captions:
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, captions, split, path=images[coco_id]))
        self.rejected += [Rejected(name, LEADS_OUT) for name in linked_out]
        if not items:
            why = f"; {', '.join(linked_out[:3])} is {LEADS_OUT}" if linked_out else ""
            raise DataError(
                f"none of the {len(captioned)} captioned images is in {self.input_dir} "
                f"(looked in {', '.join(_PICTURE_FOLDERS)}, images){why}"
            )
        return items

    def _of_karpathy(self, path: Path) -> list[tuple[int, list[str], SplitName]]:
        captioned: list[tuple[int, list[str], SplitName]] = []
        left_out = 0
        for number, image in enumerate(read_karpathy_file(path, self.name)):
            if image.part == RESTVAL and not self.restval:
                left_out += 1
            else:
                captioned.append(
                    (
                        _coco_id(image, f"{path}: image {number}"),
                        image.captions,
                        image.split or "train",
                    )
                )
        if left_out:
            self.rejected.append(Rejected(RESTVAL, f"{left_out} images left out (--no-restval)"))
        self.split_rule = (
            f"Karpathy's splits ({path.name}), restval {'in train' if self.restval else 'left out'}"
        )
        return captioned

    def _of_coco(self) -> list[tuple[int, list[str], SplitName]]:
        year, files = self._annotation_files()
        self.split_rule = (
            f"COCO {year}'s own train and val; test is empty, since COCO keeps the captions of its test images "
            "(Karpathy's dataset_coco.json has a test split)"
        )
        return [
            (coco_id, captions, part)
            for part, path in files.items()
            for coco_id, captions in self._read_annotations(path).items()
        ]

    def _read_annotations(self, path: Path) -> dict[int, list[str]]:
        """Return the captions of every image by its id, in file order."""
        unlisted = BadSamples("annotations")
        try:
            captions = coco_captions(path, parse_json(path.read_bytes()), unlisted)
            by_id = {int(coco_id): of_image for coco_id, of_image in captions.items()}
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path} is damaged or no caption annotations of COCO ({shown(error)}): get it again"
            ) from None
        self.rejected += [Rejected(Path(bad.where).name, bad.reason) for bad in unlisted.samples]
        return by_id

    def _annotation_files(self) -> tuple[int, dict[SplitName, Path]]:
        """Return the year and its annotation files by part, at least one."""
        for year in YEARS if self.year is None else (self.year,):
            files: dict[SplitName, Path] = {
                part: path
                for part in PARTS
                for path in (self.input_dir / "annotations" / f"captions_{part}{year}.json",)
                if path.is_file()
            }
            if files:
                return year, files
        wanted = f"captions_train{self.year or YEARS[0]}.json"
        raise DataError(
            f"{self.input_dir} is not COCO: it has neither annotations/{wanted} nor dataset_coco.json "
            "(vlm-data download coco prints how to get them)"
        )

    def _images(self) -> tuple[dict[int, Path], list[str]]:
        """Find every image by its id, of two copies the one of 2017; and the links that lead out."""
        found: dict[int, Path] = {}
        linked_out: list[str] = []
        tops = (self.input_dir, self.input_dir / "images")
        # A folder within another of its name is a usual accident of unpacking.
        folders = [
            top / name / inner for top in tops for name in _PICTURE_FOLDERS for inner in ("", name)
        ]
        for folder in (*folders, *reversed(tops)):
            if not folder.is_dir():
                continue
            images = ImageFiles(self.input_dir, folder, self.follow_links, recursive=False)
            for name, path in images.paths.items():
                if match := _PICTURE_NAME.fullmatch(name):
                    found.setdefault(int(match[1]), path)
            linked_out += images.linked_out
        return found, linked_out


def _coco_id(image: KarpathyImage, where: str) -> int:
    if not isinstance(image.coco_id, int):
        raise DataError(f"{where}: it has no cocoid")
    return image.coco_id
