"""Conceptual Captions (Sharma, Ding, Goodman and Soricut, ACL 2018) as shards of pictures fetched from its URLs.

The dataset is a list of captions and URLs. img2dataset fetches the pictures and writes WebDataset shards
(``00000.tar`` beside ``00000.parquet`` and ``00000_stats.json``, which are not needed); these are read here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.bad_samples import NUM_CAUSES, by_cause
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.shards import ShardLoss, read_shard
from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem, SourceOptions
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule, normalise_split
from vlm_bridge.errors import DataError, UsageError

_NUMBERED = re.compile(r"(?:^|[-_.])\d{4,}$")
"""The end of a shard's name, unlike that of ``images.tar`` or ``train2017.tar``."""


def shards_command(tsv: Path, shards: Path) -> str:
    """Return the shell line that fetches the pictures of a ``caption<TAB>url`` file, which has no header, as shards.

    Pictures are stored with 384 pixels on their shorter side at most, what PVT + BLIP sees, and pages that forbid
    such use are respected.
    """
    listed = tsv.with_name(f"{tsv.stem}.with-header.tsv")
    return (
        f"(printf 'caption\\turl\\n'; cat {_quoted(tsv)}) > {_quoted(listed)} && "
        f"img2dataset --url_list {_quoted(listed)} --input_format tsv --url_col url --caption_col caption "
        f"--output_format webdataset --output_folder {_quoted(shards)} --image_size 384 "
        "--resize_mode keep_ratio --resize_only_if_bigger True --processes_count 16 --thread_count 64"
    )


@dataclass
class Conceptual:
    """3.3 million pictures of the web with their cleaned alternative texts, one caption each."""

    name: ClassVar[str] = "conceptual"
    description: ClassVar[str] = (
        "Conceptual Captions: pictures of the web with their alternative texts"
    )
    licence_note: ClassVar[str] = (
        "captions and URLs: free for any purpose, credit to Google LLC is asked for; "
        "each picture belongs to its owner and is not to be redistributed"
    )
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = False

    input_dir: Path
    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Conceptual:
        given = options.input_dir
        if given is not None and given.suffix.lower() == ".tsv" and given.is_file():
            raise _needs_shards(given, given.parent)
        return cls(options.require_input_dir(cls.name))

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of a numbered shard below a folder, None where there is none."""
        shard = next((path for path in folder.rglob("*.tar") if _NUMBERED.search(path.stem)), None)
        return shard.relative_to(folder).as_posix() if shard is not None else None

    @property
    def default_split_rule(self) -> SplitRule:
        """Held-out shares of 1 %, and 100 images or a tenth of fewer; the official validation part is 0.5 %."""
        return SplitRule(val_fraction=0.01, test_fraction=0.01, held_out_at_least=100)

    def items(self) -> list[SourceItem]:
        """Return the whole samples of all shards, in the order of their paths; pictures are not read yet.

        Where no shard is of the validation part, the images of the training part are left to the split rule.
        About 1 kB of memory a sample, whatever the size of the shards.
        """
        self.rejected = []
        shards = sorted(
            self.input_dir.rglob("*.tar"), key=lambda path: path.relative_to(self.input_dir).parts
        )
        if not shards:
            tables = sorted(self.input_dir.glob("*.tsv"))
            raise (
                _needs_shards(tables[0], self.input_dir)
                if tables
                else DataError(
                    f"no shard (*.tar) in {self.input_dir}: --input-dir is the folder that img2dataset wrote"
                )
            )
        items: dict[str, SourceItem] = {}
        names = [shard.relative_to(self.input_dir) for shard in shards]
        has_validation = any(_part_of(name) == "val" for name in names)
        for shard, name in zip(shards, names, strict=True):
            split = _part_of(name)
            if split == "train" and not has_validation:
                split = None
            # Keys count from zero again in every run of img2dataset: train/ and val/ have the same ones.
            prefix = "" if name.parent == Path() else f"{name.parent.as_posix()}/"
            for sample in read_shard(shard):
                if isinstance(sample, ShardLoss):
                    lost = (
                        name.as_posix()
                        if sample.name is None
                        else f"{name.as_posix()}:{sample.name}"
                    )
                    self.rejected.append(Rejected(lost, sample.reason))
                    continue
                image_id = prefix + sample.key
                if image_id in items:
                    reason = "a sample with this key came before, in another place or shard"
                    self.rejected.append(Rejected(f"{name.as_posix()}:{sample.key}", reason))
                    continue
                items[image_id] = SourceItem(
                    image_id, [sample.caption], split, stored=sample.picture
                )
        if not items:
            causes = by_cause((item.id, item.reason) for item in self.rejected)[:NUM_CAUSES]
            why = f": {'; '.join(causes)}" if causes else ""
            raise DataError(f"no whole sample in the {len(shards)} shards of {self.input_dir}{why}")
        decided = all(item.split is not None for item in items.values())
        self.split_rule = (
            "the dataset's own parts, from the names of the shards" if decided else None
        )
        return list(items.values())


def _part_of(shard: Path) -> SplitName | None:
    """Return the part that a shard's name or folders tell: ``cc3m-train-0000.tar``, ``validation/00000.tar``."""
    words = (
        word for part in (*shard.parent.parts, shard.stem) for word in re.split(r"[-_.]", part)
    )
    return next((split for word in words if (split := normalise_split(word)) is not None), None)


def _needs_shards(tsv: Path, folder: Path) -> UsageError:
    shards = folder / "shards"
    return UsageError(
        f"{tsv} lists pictures by URL; fetch them as shards first: pip install img2dataset, then "
        f"{shards_command(tsv, shards)}; then --input-dir {_quoted(shards)}"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
