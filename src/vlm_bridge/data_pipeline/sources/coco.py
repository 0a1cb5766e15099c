"""COCO captions (Chen et al., arXiv:1504.00325), of 2014 or 2017.

Both years caption the same 123,287 photographs and split them differently. The number in a file
name is the image's id in both: ``train2014/COCO_train2014_000000000009.jpg`` is
``train2017/000000000009.jpg``. Images are found by id, also where Karpathy's file names 2014's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources.base import Rejected
from vlm_bridge.data_pipeline.sources.caption_forms import RESTVAL, CaptionRecord
from vlm_bridge.data_pipeline.sources.captioned_files import (
    CaptionedFiles,
    CaptionFile,
    ImageFiles,
    first_file,
)
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError

YEARS = (2017, 2014)
PARTS: tuple[SplitName, ...] = ("train", "val")  # the captions of its test part are not public
KARPATHY = "dataset_coco.json"
_FILE = "captions_{}{}.json"
_IMAGE_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


@dataclass
class Coco(CaptionedFiles):
    """123,287 photographs with five human captions each (a few have six or seven).

    Attributes:
        captions_file: Karpathy's file; None takes ``dataset_coco.json`` if it is there.
        year: of COCO's own splits; None takes Karpathy's, or else the newest.
        restval: train on Karpathy's restval images too, as papers do: 113,287 training images
            instead of 82,783.
    """

    name = "coco"
    description = "COCO captions: photographs of common objects, five human captions each"
    licence_note = (
        "captions: CC BY 4.0, the COCO Consortium; photographs: Flickr's terms of use and the "
        "licence that the annotations name for each, many of them non-commercial"
    )
    usual_files = (KARPATHY, *(_FILE.format(p, y) for y, p in product(YEARS, PARTS)))

    year: int | None = None
    restval: bool = True

    def caption_files(self) -> list[CaptionFile]:
        karpathy = self.captions_file
        if karpathy is None and self.year is None:
            karpathy = first_file(self.input_dir, KARPATHY)
        if karpathy is not None:
            restval = "in train" if self.restval else "left out"
            self.split_rule = f"Karpathy's splits ({karpathy.name}), restval {restval}"
            return [(karpathy, None)]
        for year in YEARS if self.year is None else (self.year,):
            self.split_rule = (
                f"COCO {year}'s own train and val; test is empty, since COCO keeps the captions "
                f"of its test images (Karpathy's {KARPATHY} has a test split)"
            )
            found: list[CaptionFile] = []
            for part in PARTS:
                if path := first_file(self.input_dir, _FILE.format(part, year)):
                    found.append((path, part))
            if found:
                return found
        raise DataError(
            f"{self.input_dir} is not COCO: it has neither annotations/"
            f"{_FILE.format('train', self.year or YEARS[0])} nor {KARPATHY} "
            "(vlm-data download coco prints how to get them)"
        )

    def records(
        self, images: ImageFiles, skipped: Skipped
    ) -> Iterator[tuple[CaptionRecord, CaptionFile]]:
        left_out = 0
        for record, file in super().records(images, skipped):
            if record.part == RESTVAL and not self.restval:
                left_out += 1
            else:
                yield record, file
        if left_out:
            self.rejected.append(Rejected("restval", f"{left_out} images left out (--no-restval)"))

    def find_image(self, images: ImageFiles, name: str, beside: Path) -> str | None:
        """Return the name of an image's file by its name of either year."""
        match = _IMAGE_NAME.fullmatch(name.rpartition("/")[2])
        if match is None:
            return images.find(name)
        names = (f"{prefix}{match[1]}.jpg" for prefix in ("", "COCO_train2014_", "COCO_val2014_"))
        return next((found for name in names if (found := images.find(name)) is not None), None)

    def image_id(self, name: str) -> str:
        match = _IMAGE_NAME.fullmatch(Path(name).name)
        return match[1] if match else Path(name).stem
