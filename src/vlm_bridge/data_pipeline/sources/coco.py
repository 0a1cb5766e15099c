"""COCO captions (Chen et al., arXiv:1504.00325), of 2014 or 2017.

Both years caption the same 123,287 photographs and split them differently. The number in a file
name is the image's id in both: ``train2014/COCO_train2014_000000000009.jpg`` is
``train2017/000000000009.jpg``. Images are found by id, also where Karpathy's file names 2014's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources.base import Rejected, Source, SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import (
    coco_captions,
    find_karpathy_file,
    karpathy_images,
    make_record,
)
from vlm_bridge.data_pipeline.sources.image_files import LEADS_OUT, MISSING, ImageFiles
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import parse_json

YEARS = (2017, 2014)
PARTS: tuple[SplitName, ...] = ("train", "val")  # the captions of its test part are not public

_IMAGE_FOLDERS = tuple(f"{part}{year}" for year in YEARS for part in PARTS)
_IMAGE_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")

Captioned = list[tuple[int, list[str], SplitName]]
"""(COCO's id, captions, split) of each image."""


@dataclass
class Coco(Source):
    """123,287 photographs with five human captions each (a few have six or seven).

    Attributes:
        captions_file: Karpathy's file; None takes ``dataset_coco.json`` if it is there.
        year: of COCO's own splits; None takes Karpathy's, or else the newest.
        restval: train on Karpathy's restval images too, as papers do: 113,287 training images
            instead of 82,783.
    """

    name: ClassVar[str] = "coco"
    description: ClassVar[str] = (
        "COCO captions: photographs of common objects, five human captions each"
    )
    licence_note: ClassVar[str] = (
        "captions: CC BY 4.0, the COCO Consortium; photographs: Flickr's terms of use and the "
        "licence that the annotations name for each, many of them non-commercial"
    )

    input_dir: Path
    captions_file: Path | None = None
    year: int | None = None
    restval: bool = True
    follow_links: bool = False

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of Karpathy's file or of COCO's annotations."""
        if karpathy := find_karpathy_file(folder, cls.name):
            return karpathy.name
        names = (f"annotations/captions_{part}{year}.json" for year in YEARS for part in PARTS)
        return next((name for name in names if (folder / name).is_file()), None)

    def items(self) -> list[SourceItem]:
        """Return the images in the order of their annotation files, train first."""
        self.rejected = []
        karpathy = self.captions_file
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
                f"(looked in {', '.join(_IMAGE_FOLDERS)}, images){why}"
            )
        return items

    def _of_karpathy(self, path: Path) -> Captioned:
        captioned: Captioned = []
        left_out = 0
        for where, fields in karpathy_images(path, _read_json(path)):
            if fields["split"] == "restval" and not self.restval:
                left_out += 1
                continue
            try:
                record = make_record(where, fields)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            name = _IMAGE_NAME.fullmatch(PurePosixPath(record.image).name)
            if name is None or record.split is None:
                raise DataError(f"{where}: {record.image} is no image of COCO with a split")
            captioned.append((int(name[1]), list(record.captions), record.split))
        if left_out:
            self.rejected.append(Rejected("restval", f"{left_out} images left out (--no-restval)"))
        restval = "in train" if self.restval else "left out"
        self.split_rule = f"Karpathy's splits ({path.name}), restval {restval}"
        return captioned

    def _of_coco(self) -> Captioned:
        folder = self.input_dir / "annotations"
        for year in YEARS if self.year is None else (self.year,):
            paths: dict[SplitName, Path] = {
                part: folder / f"captions_{part}{year}.json" for part in PARTS
            }
            if any(path.is_file() for path in paths.values()):
                break
        else:
            raise DataError(
                f"{self.input_dir} is not COCO: it has neither annotations/captions_train"
                f"{self.year or YEARS[0]}.json nor dataset_coco.json "
                "(vlm-data download coco prints how to get them)"
            )
        self.split_rule = (
            f"COCO {year}'s own train and val; test is empty, since COCO keeps the captions of its "
            "test images (Karpathy's dataset_coco.json has a test split)"
        )
        unlisted = Skipped("annotations")
        captioned: Captioned = []
        for part, path in paths.items():
            if path.is_file():
                for coco_id, texts in coco_captions(path, _read_json(path), unlisted).items():
                    if not isinstance(coco_id, int):
                        raise DataError(f"{path} is damaged: the id of an image is no number")
                    captioned.append((coco_id, texts, part))
        self.rejected += [Rejected(Path(bad.where).name, bad.reason) for bad in unlisted.samples]
        return captioned

    def _images(self) -> tuple[dict[int, Path], list[str]]:
        """Return every image by its id, of two copies the one of 2017; and links that lead out."""
        found: dict[int, Path] = {}
        linked_out: list[str] = []
        tops = (self.input_dir, self.input_dir / "images")
        # A folder within another of its name is a usual accident of unpacking.
        folders = [
            top / name / inner for top in tops for name in _IMAGE_FOLDERS for inner in ("", name)
        ]
        for folder in filter(Path.is_dir, (*folders, *reversed(tops))):
            images = ImageFiles(self.input_dir, folder, self.follow_links, recursive=False)
            for name, path in images.paths.items():
                if match := _IMAGE_NAME.fullmatch(name):
                    found.setdefault(int(match[1]), path)
            linked_out += images.linked_out
        return found, linked_out


def _read_json(path: Path) -> object:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): get it again") from None
