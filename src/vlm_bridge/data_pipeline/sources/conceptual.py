"""Conceptual Captions (Sharma et al., ACL 2018) as shards of images fetched from its URLs.

The dataset is a list of captions and URLs; img2dataset fetches the images and writes shards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from vlm_bridge.data_pipeline.samples import SkippedSample, main_causes
from vlm_bridge.data_pipeline.shards import read_shard
from vlm_bridge.data_pipeline.sources import Source, SourceItem
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule, normalise_split
from vlm_bridge.errors import DataError

# The end of a shard's name, unlike that of images.tar or train2017.tar.
_NUMBERED = re.compile(r"(?:^|[-_.])\d{4,}$")


@dataclass
class Conceptual(Source):
    """3.3 million images of the web with their cleaned alternative texts, one caption each."""

    name = "conceptual"
    description = "Conceptual Captions: images of the web with their alternative texts"
    licence_note = "captions: free, credit to Google LLC is asked for; images: their owners'"
    finds_near_duplicates = False

    input_dir: Path
    default_split_rule: SplitRule = field(default=SplitRule("hash", 0.01, 0.01), init=False)

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        shard = next((path for path in folder.rglob("*.tar") if _NUMBERED.search(path.stem)), None)
        return shard.relative_to(folder).as_posix() if shard is not None else None

    def items(self) -> list[SourceItem]:
        """Return the whole samples of all shards, in the order of their paths.

        Where no shard is of the validation part, the images of the training part are left to the
        split rule. About 1 kB of memory a sample, whatever the size of the shards.
        """
        self.rejected, self.split_rule = [], None
        names = sorted(path.relative_to(self.input_dir) for path in self.input_dir.rglob("*.tar"))
        if not names:
            raise DataError(
                f"no shard (*.tar) in {self.input_dir}: give the folder that img2dataset wrote "
                "(vlm-data download conceptual prints how to fetch the images of a list)"
            )
        items: dict[str, SourceItem] = {}
        parts: list[SplitName | None] = [_part_of(name) for name in names]
        for name, part in zip(names, parts, strict=True):
            split = part if part != "train" or "val" in parts else None
            content = read_shard(self.input_dir / name)
            for key, why in content.skipped:
                self.rejected.append(SkippedSample(f"{name.as_posix()}:{key}".rstrip(":"), why))
            for image in content.images:
                # Every run of img2dataset counts from zero: train/ and val/ have the same keys.
                item_id = (name.parent / image.original_id).as_posix()
                if item_id in items:
                    where = f"{name.as_posix()}:{image.original_id}"
                    self.rejected.append(SkippedSample(where, "an earlier sample has this key"))
                else:
                    items[item_id] = SourceItem(item_id, [*image.captions], split, image.path)
        if not items:
            where = f"{len(names)} shards of {self.input_dir}"
            raise DataError(f"no whole sample in {where}: {main_causes(self.rejected)}")
        if all(item.split is not None for item in items.values()):
            self.split_rule = "the dataset's own parts, from the names of the shards"
        return list(items.values())


def _part_of(shard: Path) -> SplitName | None:
    """Return the part that a shard's path names: ``cc3m-train-0000.tar``, ``validation/0.tar``."""
    words = re.split(r"[-_./]", shard.with_suffix("").as_posix())
    return next((split for split in map(normalise_split, words) if split is not None), None)
