"""The contract of sources: images with captions, and what was skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from PIL import Image

from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.parsing import lines_of

Picture = PictureFile | bytes | Callable[[], Image.Image]
"""A file, the bytes of a file, or what draws the picture."""


class StoredPicture(Protocol):
    """Where a picture lies within a large file: a row of a parquet file, a member of a tar."""

    @classmethod
    def read_in_order(cls, pictures: Iterable[Self]) -> Iterator[bytes | None]:
        """Yield the bytes of each, None where there are none; each file is opened once and read forward.

        Raises:
            DataError: a file is missing, damaged or changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image: its captions as found, its split if the dataset decides it, and its picture.

    The picture is a file (``path``), something that draws it (``draw``, picklable: any process can), or part of a
    large file (``stored``; items come in the order of their files then, so that these are read once).
    ``film`` names the film that it is a frame of, if its id tells.
    """

    image_id: str
    captions: list[str]
    split: SplitName | None
    path: PictureFile | None = None
    draw: Callable[[], Image.Image] | None = None
    stored: StoredPicture | None = None
    film: str | None = None


@dataclass(frozen=True)
class Rejected:
    """Something that is not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class SourceOptions:
    """Everything the command line can say about a source; each source takes what it knows."""

    input_dir: Path | None = None
    captions_file: Path | None = None
    num_train: int = 10_000
    num_val: int = 500
    num_test: int = 1_000
    seed: int = 0
    wordings: int = 2
    official_split: bool = False
    keep_tags: bool = False
    year: int | None = None
    restval: bool = True
    follow_links: bool = False

    def require_input_dir(self, source: str) -> Path:
        """Return the input folder; UsageError where none was named, DataError where it does not exist."""
        if self.input_dir is None:
            raise UsageError(f"source {source} needs --input-dir")
        if not self.input_dir.is_dir():
            raise DataError(f"no such folder: {self.input_dir} (--input-dir)")
        return self.input_dir


class Source(Protocol):
    """A dataset in its own layout, read as a list of :class:`SourceItem`."""

    name: ClassVar[str]
    description: ClassVar[str]
    licence_note: ClassVar[str]
    default_caption_style: ClassVar[CaptionStyle]

    @property
    def split_rule(self) -> str | None:
        """How the dataset decides its splits; None where it leaves some or all images to a rule."""
        ...

    @property
    def default_split_rule(self) -> SplitRule:
        """Splits images that the dataset leaves undecided, unless the command line says otherwise."""
        ...

    finds_near_duplicates: ClassVar[bool]
    """False where a perceptual hash (which sees brightness, not colour) says nothing about the pictures, and
    where they are too many to compare every pair."""
    rejected: list[Rejected]
    """What ``items`` skipped (captions of a missing image, an image without caption ...)."""

    @classmethod
    def from_options(cls, options: SourceOptions) -> Source: ...

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of what tells that a folder holds this dataset, None where nothing does."""
        ...

    def items(self) -> list[SourceItem]:
        """Read the dataset; DataError with file and line where it is malformed."""
        ...


@runtime_checkable
class Described(Protocol):
    """A source whose files say something of themselves: sizes, fields and their types."""

    def facts(self) -> dict[str, Any]: ...


def iter_pictures(items: Iterable[SourceItem]) -> Iterator[Picture | None]:
    """Yield the picture of each item when it is asked for, None where a large file holds none for it.

    What lies in large files is read in their order and dropped again: memory does not grow with the dataset.
    """
    items = list(items)
    by_kind = groupby((item.stored for item in items if item.stored is not None), key=type)
    stored = (content for kind, pictures in by_kind for content in kind.read_in_order(pictures))
    for item in items:
        yield next(stored) if item.stored is not None else item.path or item.draw


def read_lines(
    path: Path, bad: BadSamples | None = None, *, keep_blank: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line that is not blank.

    Args:
        bad: takes the lines that are not UTF-8 or far too long; without it, the first of them is a DataError.
        keep_blank: yield blank lines too, and leave it to the caller to count what it makes of the lines.
    """
    for number, _, raw in lines_of(path):
        where = f"{path}:{number}"
        try:
            if raw is None:
                raise ValueError("the line is too long for a caption")
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except ValueError as error:
            problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            if bad is None:
                raise DataError(
                    f"{where}: {problem}; save the file as UTF-8, a line each"
                ) from None
            bad.total += 1
            bad.set_aside(where, problem)
            continue
        if keep_blank or line.strip():
            if bad is not None and not keep_blank:
                bad.total += 1
            yield where, line.rstrip("\r\n")


def read_token_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield ("file:line", file name, caption) for the ``name.jpg#number<TAB>caption`` lines of Flickr8k and Flickr30k.

    Raises:
        DataError: a line is not of that form, or not UTF-8.
    """
    for where, line in read_lines(path):
        key, tab, caption = line.partition("\t")
        file_name, hash_sign, _ = key.partition("#")
        if not (tab and hash_sign):
            raise DataError(f"{where}: expected name.jpg#number<TAB>caption")
        yield where, file_name, caption
