"""Flickr8k (Hodosh et al., JAIR 2013) and Flickr30k (Young et al., TACL 2014).

Captions come from the first of a dataset's usual files that is there, and splits with them where
it has some. Of Flickr8k, the official lists decide the splits where one of them is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem
from vlm_bridge.data_pipeline.sources.captioned_files import CaptionedFiles, CaptionFile, first_file
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError


@dataclass
class _Flickr(CaptionedFiles):
    """Photographs from Flickr with five human captions each."""

    split_lists: ClassVar[dict[str, SplitName]] = {}

    def caption_files(self) -> list[CaptionFile]:
        # Kaggle's captions.txt may be of any images: a folder is not recognized by it.
        names = (*self.usual_files, "captions.txt")
        path = self.captions_file or first_file(self.input_dir, *names)
        if path is None:
            raise DataError(f"{self.input_dir} is not {self.name}: no {', '.join(names)} in it")
        return [(path, None)]

    def items(self) -> list[SourceItem]:
        items, self.split_rule = super().items(), None
        if listed := self._listed():
            self.split_rule = "official lists (train, dev as val, test)"
            by_name = {item.path.name: item for item in items if item.path}
            unlisted = by_name.keys() - listed.keys()
            self.rejected += [Rejected(name, "it is in no split list") for name in sorted(unlisted)]
            return [replace(by_name[n], split=listed[n]) for n in listed if n in by_name]
        if all(item.split is not None for item in items):
            self.split_rule = f"Karpathy's splits ({self.caption_files()[0][0].name})"
        return items

    def _listed(self) -> dict[str, SplitName]:
        """Return the split of every listed image; empty without lists."""
        listed: dict[str, SplitName] = {}
        for name, split in self.split_lists.items():
            path = self.input_dir / name
            lines = path.read_text("utf-8", errors="replace").split() if path.is_file() else ()
            for image in lines:
                if listed.setdefault(image, split) != split:
                    raise DataError(f"{path}: {image} is also in the list of {listed[image]}")
        return listed


@dataclass
class Flickr8k(_Flickr):
    """8,000 photographs; an absent list file leaves its split empty."""

    name = "flickr8k"
    description = "Flickr8k: photographs of people and dogs, five human captions each"
    licence_note = "Flickr photographs of many owners: research use only, not to be redistributed"
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
    licence_note = (
        "Flickr photographs of many owners under Flickr's terms of use: for non-commercial "
        "research and education only, not to be redistributed"
    )
    usual_files = (
        "dataset_flickr30k.json",
        "flickr_annotations_30k.csv",
        "results_20130124.token",
        "results.csv",
    )
