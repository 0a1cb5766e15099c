"""Flickr8k (Hodosh et al. 2013), Flickr30k (Young et al. 2014), COCO (Chen et al. 2015).

COCO of 2014 and of 2017 have the same 123,287 images and split them differently. The number in a
file name is the image's id in both: ``train2014/COCO_train2014_000000000009.jpg`` is
``train2017/000000000009.jpg``. Images are found by id, also where Karpathy's file names 2014's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.samples import Skipped, SkippedSample
from vlm_bridge.data_pipeline.sources import SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import CaptionRecord
from vlm_bridge.data_pipeline.sources.local import (
    CaptionedFiles,
    CaptionFile,
    ImageFiles,
    first_file,
)
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError

YEARS = (2017, 2014)
PARTS: tuple[SplitName, ...] = ("train", "val")  # the captions of COCO's test part are not public
KARPATHY = "dataset_coco.json"
_COCO_IMAGE = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})")


@dataclass
class _Flickr(CaptionedFiles):
    """Photographs with five human captions each, from the first of the usual files that is there.

    Splits come from official lists, or else with the captions where that file has some.
    """

    split_lists: ClassVar[dict[str, SplitName]] = {}

    def caption_files(self) -> list[CaptionFile]:
        # Kaggle's captions.txt may be of any images: a folder is not recognized by it.
        names = (*self.usual_files, "captions.txt")
        path = self.captions_file or first_file(self.input_dir, *names)
        if path is None:
            raise DataError(f"{self.input_dir} is not {self.name}: no {', '.join(names)} in it")
        return [(path, None)]

    def items(self) -> list[SourceItem]:
        items = super().items()
        by_name = {Path(item.image_id).name: item for item in items}
        for name, item in by_name.items():
            item.image_id = Path(name).stem
        listed: dict[str, SplitName] = {}
        for name, split in self.split_lists.items():
            if (path := self.input_dir / name).is_file():
                listed |= dict.fromkeys(path.read_text("utf-8", errors="replace").split(), split)
        self.split_rule = None
        if listed:
            self.split_rule = "official lists (train, dev as val, test)"
            unlisted = sorted(by_name.keys() - listed.keys())
            self.rejected += [SkippedSample(name, "it is in no split list") for name in unlisted]
            for name, item in by_name.items():
                item.split = listed.get(name)
            items = [by_name[name] for name in listed if name in by_name]
        elif all(item.split is not None for item in items):
            self.split_rule = f"Karpathy's splits ({self.caption_files()[0][0].name})"
        return items


@dataclass
class Flickr8k(_Flickr):
    """8,000 photographs; an absent list file leaves its split empty."""

    name = "flickr8k"
    description = "Flickr8k: photographs of people and dogs, five human captions each"
    licence_note = "Flickr photographs of many owners: research use only, not to be shared"
    usual_files = ("dataset_flickr8k.json", "Flickr8k.token.txt")
    split_lists: ClassVar = {
        "Flickr_8k.trainImages.txt": "train",
        "Flickr_8k.devImages.txt": "val",
        "Flickr_8k.testImages.txt": "test",
    }


@dataclass
class Flickr30k(_Flickr):
    """31,783 photographs; 31,014 of them are in Karpathy's splits."""

    name = "flickr30k"
    description = "Flickr30k: photographs of everyday life, five human captions each"
    licence_note = "Flickr's terms of use: non-commercial research and education, not to be shared"
    usual_files = (
        "dataset_flickr30k.json", "flickr_annotations_30k.csv", "results_20130124.token",
        "results.csv",
    )  # fmt: skip


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
    licence_note = "captions: CC BY 4.0; photographs: one license each, many non-commercial"
    usual_files = (KARPATHY, *(f"captions_{part}{year}.json" for year in YEARS for part in PARTS))

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
            found: list[CaptionFile] = []
            for part in PARTS:
                if path := first_file(self.input_dir, f"captions_{part}{year}.json"):
                    found.append((path, part))
            if found:
                self.split_rule = (
                    f"COCO {year}'s own train and val; test is empty, since COCO keeps the "
                    f"captions of its test images (Karpathy's {KARPATHY} has a test split)"
                )
                return found
        raise DataError(
            f"{self.input_dir} is not COCO: it has neither annotations/captions_train"
            f"{self.year or YEARS[0]}.json nor {KARPATHY} (vlm-data download coco prints how to "
            "get them)"
        )

    def records(
        self, images: ImageFiles, skipped: Skipped
    ) -> Iterator[tuple[CaptionRecord, CaptionFile]]:
        """Yield every record with its file, the image by its name of the year that is there."""
        for record, file in super().records(images, skipped):
            if match := _COCO_IMAGE.fullmatch(Path(record.image).stem):
                starts = ("", "COCO_train2014_", "COCO_val2014_")
                names = (f"{start}{match[1]}.jpg" for start in starts)
                there = next((n for n in names if images.find(n, self.input_dir)), record.image)
                record = replace(record, image=there)
            if self.restval or not record.is_restval:
                yield record, file

    def items(self) -> list[SourceItem]:
        items = super().items()
        for item in items:
            stem = Path(item.image_id).stem
            match = _COCO_IMAGE.fullmatch(stem)
            item.image_id = match[1] if match else stem
        return items
