"""Images with their captions, samples that were skipped, and the folders that hold them."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError, ImageError, on_one_line
from vlm_bridge.parsing import shown

MAX_SKIPPED_SHARE = 0.01
MIN_SKIPPED_ROWS = 3
NUM_CAUSES, NUM_NAMED = 5, 3  # causes that a message names, and samples of each

# What differs from sample to sample within one cause: quoted names, numbers, paths.
_PARTICULARS = re.compile(r"'[^']*'|\d[\d,.]*|\S*/\S*")


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image in an uncompressed tar; it has the methods of `Path` that images need."""

    file: Path
    offset: int  # of the content, in bytes
    size: int
    member: str = ""  # name in the tar, for messages

    def __str__(self) -> str:
        return f"{self.file}/{self.member or self.offset}"

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2] or str(self.offset)

    def stat(self) -> os.stat_result:
        return self.file.stat()

    def read_bytes(self) -> bytes:
        """Read the image's file. Raises ImageError where the tar is gone or was cut off."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(self, f"its shard cannot be read ({error.strerror})") from None
        if len(content) < self.size:
            raise ImageError(self, "its shard became shorter: fetch the shard again")
        return content


ImageFile = Path | TarImage


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image with all its captions."""

    path: ImageFile
    captions: tuple[str, ...]
    original_id: str


def stays_inside(name: str) -> bool:
    """Return whether a relative path stays inside its folder, on Windows too."""
    path = PureWindowsPath(name)  # knows / and \\
    return bool(name.strip()) and not (path.anchor or ".." in path.parts or "\0" in name)


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``. Raises ValueError where it leads out of ``folder``."""
    if not stays_inside(name):
        raise ValueError(f"image path {shown(name)} must be relative and stay inside {folder}")
    return folder / name


def is_inside(resolved: Path, path: Path) -> bool:
    """Return whether a file is below a resolved folder, and not elsewhere by a symbolic link."""
    try:
        return path.resolve().is_relative_to(resolved)
    except (OSError, RuntimeError):  # links in a circle
        return False


class SkippedSample(NamedTuple):
    """A skipped image, caption or file (such as "file:line"), and the reason."""

    id: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"id": self.id, "reason": self.reason}


@dataclass
class Skipped:
    """The skipped ones among ``total`` samples of a kind, such as "train images"."""

    kind: str
    total: int = 0
    samples: list[SkippedSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, where: object, reason: str) -> None:
        self.samples.append(SkippedSample(str(where), reason))

    def check(
        self, max_share: float = MAX_SKIPPED_SHARE, *, at_least: int = 1, setting: str = ""
    ) -> None:
        """Raise DataError if more than ``max_share`` of the samples are skipped.

        Args:
            at_least: fewer are no error, whatever their share.
            setting: the recipe's key for the share.
        """
        if len(self) < at_least or len(self) <= max_share * self.total:
            return
        limit = f"{setting}={max_share:g}" if setting else f"{max_share:.3g} of them"
        raise DataError(
            f"{len(self):,} of {self.total:,} {self.kind} cannot be used, more than {limit}: "
            f"{self.summary()}; mend or remove them{f', or raise {setting}' if setting else ''}"
        )

    def summary(self) -> str:
        """Return `main_causes`."""
        return main_causes(self.samples)


def by_cause(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each cause, the most frequent first: count, reason, first samples.

    Args:
        skipped: (what, reason) of each; reasons that differ in numbers and names are one cause.
    """
    causes: dict[str, list[tuple[str, str]]] = {}
    for what, reason in skipped:
        causes.setdefault(_PARTICULARS.sub("", reason), []).append((what, reason))
    lines = []
    for found in sorted(causes.values(), key=len, reverse=True):
        names, reason = ", ".join(what for what, _ in found[:NUM_NAMED]), found[0][1]
        more = f" and {len(found) - NUM_NAMED:,} more" if len(found) > NUM_NAMED else ""
        several = f"{len(found):,} times {reason}: {names}{more}"
        lines.append(several if len(found) > 1 else f"{names}: {reason}")
    return lines


def main_causes(skipped: Iterable[tuple[str, str]]) -> str:
    """Return the most frequent causes on one line, each with a count and a few samples."""
    return on_one_line("; ".join(by_cause(skipped)[:NUM_CAUSES]))


class DataFolder(ABC):
    """Captioned images in splits: a `CaptionFolder` or a `ShardFolder`."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Source, counts of each split and fingerprint, at least."""
        return self._load_manifest()

    @property
    def fingerprint(self) -> str:
        """Hash of captions and images, as recorded."""
        return self.manifest["fingerprint"]

    @property
    def splits(self) -> list[str]:
        """The splits that hold at least one image, in the order train, val, test."""
        counts = self.manifest["counts"]
        return [split for split in SPLITS if counts.get(split, {}).get("images", 0) > 0]

    def split(self, name: SplitName, skipped: Skipped | None = None) -> list[CaptionedImage]:
        """Return the images of a split with their captions, in the order of the files.

        Args:
            skipped: takes the samples that cannot be used; without it, the first is an error.

        Raises:
            DataError: no such split, or a sample that cannot be used, with its place.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"data folder {self.root} has no {name} images (it has: {known})")
        found = Skipped(name) if skipped is None else skipped
        images = self._read(name, found)
        if skipped is None and found.samples:
            raise DataError(": ".join(found.samples[0]) + "; make the data folder again")
        return images

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the files as they are now."""

    @abstractmethod
    def _load_manifest(self) -> dict[str, Any]: ...

    @abstractmethod
    def _read(self, split: SplitName, skipped: Skipped) -> list[CaptionedImage]: ...
