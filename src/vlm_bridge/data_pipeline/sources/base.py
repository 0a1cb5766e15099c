"""What a source is: a dataset in its own layout, read as images with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image

from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.parquet import ParquetImage, read_images
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError, UsageError

# An image file, the bytes of one, or a function that draws the image.
Picture = ImageFile | bytes | Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image with its captions as found.

    Attributes:
        split: None where the dataset does not decide it.
        path, draw, stored: the image: a file, a picklable function that draws it, or a row of a
            parquet file. Exactly one is given; stored images come in the order of their files.
        film: the film that the image is a frame of, if its id names one.
    """

    image_id: str
    captions: list[str]
    split: SplitName | None
    path: ImageFile | None = None
    draw: Callable[[], Image.Image] | None = None
    stored: ParquetImage | None = None
    film: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A skipped image, caption or file, and the reason."""

    id: str
    reason: str


@dataclass
class Source:
    """A dataset in its own layout.

    Attributes:
        finds_near_duplicates: whether perceptual hashes, which see brightness, tell its images
            apart and are few enough to compare every pair.
        split_rule: how the dataset decides its splits; None where it leaves images to a rule.
        rejected: what ``items`` skipped.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    licence_note: ClassVar[str]
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True
    needs_input_dir: ClassVar[bool] = True

    split_rule: str | None = field(default=None, init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(
        cls, input_dir: Path | None = None, captions_file: Path | None = None, **options: Any
    ) -> Self:
        """Return the source with those of the options that are its fields.

        Raises UsageError or DataError if a folder or file is not named or does not exist.
        """
        if input_dir is None and cls.needs_input_dir:
            raise UsageError(f"source {cls.name} needs --input-dir")
        if input_dir is not None and not input_dir.exists():
            raise DataError(f"no such folder: {input_dir} (--input-dir)")
        if captions_file is not None and not captions_file.is_file():
            raise DataError(f"no such caption file: {captions_file} (--captions-file)")
        options |= {"input_dir": input_dir, "captions_file": captions_file}
        known = {field.name for field in fields(cls) if field.init}
        return cls(**{name: value for name, value in options.items() if name in known})

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the file by which a folder is recognized as this dataset, or None."""
        return None

    @property
    def default_split_rule(self) -> SplitRule:
        """Rule for images whose split the dataset does not decide."""
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Read the dataset. Raises DataError, with file and line, where it is malformed."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return sizes, fields and types that the files state; empty where they state nothing."""
        return {}


def iter_pictures(items: Iterable[SourceItem]) -> Iterator[Picture | None]:
    """Yield the image of each item, None where a parquet file holds none for it.

    Raises DataError if a parquet file is missing or damaged.
    """
    for is_stored, group in groupby(items, key=lambda item: item.stored is not None):
        if is_stored:
            yield from read_images(item.stored for item in group if item.stored)
        else:
            yield from (item.path or item.draw for item in group)
