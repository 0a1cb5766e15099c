"""Samples of a data folder: images with their captions, and those that were skipped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from vlm_bridge.errors import DataError, ImageError, on_one_line
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import shown

MAX_SKIPPED_SHARE = 0.01
MIN_SKIPPED_ROWS = 3
NUM_CAUSES, NUM_NAMED = 5, 3  # causes that a message names, and samples of each

# What differs from sample to sample within one cause: quoted names, numbers, paths.
_PARTICULARS = re.compile(r"'[^']*'|\d[\d,.]*|\S*/\S*")


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image in an uncompressed tar; it has the methods of `Path` that images need.

    Attributes:
        offset: where the content begins, in bytes.
        member: its name in the tar, for messages only.
    """

    file: Path
    offset: int
    size: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.file}/{self.member or self.offset}"

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2] or str(self.offset)

    def is_file(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size >= self.offset + self.size

    def resolve(self) -> TarImage:
        return replace(self, file=self.file.resolve())

    def stat(self) -> os.stat_result:
        return self.file.stat()

    def read_bytes(self) -> bytes:
        """Read the image's file. Raises ImageError where the tar is gone or was cut off."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            reason = f"its shard cannot be read ({error.strerror or error})"
            raise ImageError(self, reason) from None
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


def state_of(paths: Iterable[ImageFile]) -> str:
    """Hash names, sizes and times of image files. Raises DataError where one is missing."""
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise DataError(f"image {path} is missing: make the data folder again") from None
        state = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(state.encode(errors="surrogateescape"))
    return digest.hexdigest()


def remembered(place: Path, compute: Callable[[], str]) -> str:
    """Return the text in a file; compute and write it where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return place.read_text()
    text = compute()
    with contextlib.suppress(OSError):  # a read-only folder
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text.encode())
    return text


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``; ValueError where ``name`` is absolute or climbs out of ``folder``.

    Windows forms are refused everywhere, so that a folder that works here does no harm there.
    """
    windows = PureWindowsPath(name)
    leaves = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    if leaves or ".." in windows.parts or "\0" in name or not name.strip():
        raise ValueError(f"image path {shown(name)} must be relative and stay inside {folder}")
    return folder / name


def is_inside(resolved: Path, path: Path) -> bool:
    """Return whether a file is below a resolved folder, and not elsewhere by a symbolic link."""
    try:
        return path.resolve().is_relative_to(resolved)
    except (OSError, RuntimeError):  # links in a circle
        return False


class SkippedSample(NamedTuple):
    """A skipped sample (a file, or "file:line") and the reason."""

    where: str
    reason: str


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

    def refuse(self, cure: str) -> None:
        """Raise DataError for the first sample, if there is one."""
        for where, reason in self.samples:
            raise DataError(f"{where}: {reason}; {cure}")

    def check(
        self,
        max_share: float = MAX_SKIPPED_SHARE,
        *,
        at_least: int = 1,
        listing: Path | None = None,
        setting: str | None = None,
    ) -> None:
        """Raise DataError if more than ``max_share`` of the samples are skipped.

        Args:
            at_least: fewer are no error, whatever their share.
            listing: the file that names all of them.
            setting: the recipe's key for the share.
        """
        if len(self) < at_least or len(self) <= max_share * self.total:
            return
        limit = f"{setting}={max_share:g}" if setting else f"{max_share:.3g} of them"
        way_out = f", or raise {setting}" if setting else ""
        raise DataError(
            f"{len(self):,} of {self.total:,} {self.kind} cannot be used, more than {limit}: "
            f"{self.summary(listing)}; mend or remove them{way_out}"
        )

    def summary(self, listing: Path | None = None) -> str:
        """Return the causes on one line, each with a count and a few samples."""
        causes = by_cause(self.samples)
        more = f"; and {len(causes) - NUM_CAUSES:,} more causes" if len(causes) > NUM_CAUSES else ""
        place = f" (all in {listing})" if listing is not None else ""
        return on_one_line("; ".join(causes[:NUM_CAUSES])) + more + place


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
        (first, reason), names = found[0], ", ".join(what for what, _ in found[:NUM_NAMED])
        more = f" and {len(found) - NUM_NAMED:,} more" if len(found) > NUM_NAMED else ""
        several = f"{len(found):,} times {reason}: {names}{more}"
        lines.append(several if len(found) > 1 else f"{first}: {reason}")
    return lines


def write_listing(path: Path, parts: Sequence[Skipped]) -> None:
    """Write every skipped sample as a line of JSON, or remove a listing of nothing."""
    lines = [json.dumps({"kind": p.kind, **s._asdict()}) for p in parts for s in p.samples]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)
