"""Match image files with the caption files that name them."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.caption_folder import FORMAT, MANIFEST_NAME, UNFINISHED_NAME
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.parquet import ParquetImage
from vlm_bridge.data_pipeline.samples import (
    MIN_SKIPPED_ROWS,
    NUM_CAUSES,
    Skipped,
    by_cause,
    is_inside,
)
from vlm_bridge.data_pipeline.sources.base import Rejected, Source, SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import (
    CaptionRecord,
    read_captions,
    without_number,
)
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import shown

LEADS_OUT = (
    "a link that leads out of the dataset's folder: copy the file there, or give --follow-links"
)
_SUBFOLDERS = ("", "images/", "Images/")  # below the folder of the caption file

CaptionFile = tuple[Path, SplitName | None]
"""A caption file, and the split that it decides."""


def first_file(folder: Path, *names: str) -> Path | None:
    """Return the first of the files that is in a folder or in one below it."""
    places = (path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}"))))
    return next(filter(Path.is_file, places), None)


class ImageFiles:
    """The image files below a folder, except those of caption folders made of the dataset.

    Links that lead out of the folder are skipped unless ``follow_links``.

    Attributes:
        paths: the files by their names relative to the folder, with slashes.
        linked_out: the names of the links that are skipped.
    """

    def __init__(self, root: Path, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self.paths: dict[str, Path] = {}
        self.linked_out: list[str] = []
        self._seen: set[Path] = set()
        self._found: dict[tuple[str, Path], str | None] = {}
        self._resolved = root.resolve()
        self._scan(root, "")

    def _scan(self, folder: Path, below: str) -> None:
        real = folder.resolve()
        if real in self._seen or (folder != self.root and _is_caption_folder(folder)):
            return  # a link in a circle, or a caption folder made of the dataset
        self._seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path, name = folder / entry.name, below + entry.name
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if entry.name.startswith(".") or not (is_image or entry.is_dir()):
                continue
            is_free = not entry.is_symlink() or self.follow_links
            if not (is_free or is_inside(self._resolved, path)):
                self.linked_out.append(name)
            elif entry.is_dir():
                self._scan(path, f"{name}/")
            elif entry.is_file():
                self.paths[name] = path

    def find(self, name: str, beside: Path | None = None) -> str | None:
        """Return the name in ``paths`` that a caption file means, None where there is none.

        A name may lack folders, its suffix or nothing but spelling (Unicode form, case, kind of
        slashes, the number of a caption) where exactly one file fits.

        Args:
            beside: the folder of the caption file.

        Raises:
            ValueError: several files fit.
        """
        bare, folder = without_number(name).replace("\\", "/"), beside or self.root
        if (bare, folder) not in self._found:
            is_below = folder != self.root and folder.is_relative_to(self.root)
            below = f"{folder.relative_to(self.root).as_posix()}/" if is_below else ""
            self._found[bare, folder] = self._search(bare, below)
        return self._found[bare, folder]

    def _search(self, bare: str, below: str) -> str | None:
        for known in (top + folder + bare for top in (below, "") for folder in _SUBFOLDERS):
            if known in self.paths:
                return known
        wanted = f"/{_folded(bare)}"
        for by_end in self._by_end:
            known = by_end.get(wanted.rpartition("/")[2], ())
            fits = [found for found in known if found[0].endswith(wanted)]
            fits = [found for found in fits if found[0].startswith(f"/{_folded(below)}")] or fits
            if len(fits) > 1:
                files = ", ".join(found for _, found in fits[:3])
                raise ValueError(f"image name {shown(bare)} fits several files ({files})")
            if fits:
                return fits[0][1]
        return None

    @cached_property
    def _by_end(self) -> tuple[dict[str, list[tuple[str, str]]], ...]:
        """(folded, name) of each file by the end of its name, with and without the suffix."""
        whole, stems = defaultdict(list), defaultdict(list)
        for name in self.paths:
            for by_end, spelled in ((whole, name), (stems, name.rpartition(".")[0])):
                folded = f"/{_folded(spelled)}"
                by_end[folded.rpartition("/")[2]].append((folded, name))
        return whole, stems


def _is_caption_folder(folder: Path) -> bool:
    manifest = folder / MANIFEST_NAME
    is_made = manifest.is_file() and FORMAT in manifest.read_text("utf-8", errors="replace")[:1000]
    return is_made or (folder / UNFINISHED_NAME).is_dir()


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFD", name.removeprefix("./")).casefold()
    return unicodedata.normalize("NFC", decomposed)


@dataclass
class _Found:
    """An image with its captions; each split with the place that states it."""

    name: str
    captions: list[str] = field(default_factory=list)
    splits: dict[SplitName | None, str] = field(default_factory=dict)


@dataclass
class CaptionedFiles(Source):
    """A folder of images with caption files, which a subclass finds."""

    is_complete: ClassVar[bool] = False  # few have all images of a published dataset
    usual_files: ClassVar[tuple[str, ...]] = ()  # by which a folder is recognized

    input_dir: Path
    captions_file: Path | None = None
    follow_links: bool = False

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        found = first_file(folder, *cls.usual_files)
        return found.relative_to(folder).as_posix() if found is not None else None

    def caption_files(self) -> list[CaptionFile]:
        """Return the caption files. Raises DataError without one."""
        raise NotImplementedError

    def records(
        self, images: ImageFiles, skipped: Skipped
    ) -> Iterator[tuple[CaptionRecord, CaptionFile]]:
        """Yield every record with its file."""
        for file in self.caption_files():
            for record in read_captions(file[0], skipped):
                yield record, file

    def find_image(self, images: ImageFiles, name: str, beside: Path) -> str | None:
        """Return the name of a captioned image's file; ValueError where it is unclear."""
        return images.find(name, beside)

    def split_of_folder(self, name: str) -> SplitName | None:
        """Return the split that an image's path decides."""
        return None

    def image_id(self, name: str) -> str:
        return Path(name).stem

    def items(self) -> list[SourceItem]:
        """Return the images in the order of their first caption.

        Rows that cannot be used are skipped, up to two or a share (`MAX_SKIPPED_SHARE`).

        Raises:
            DataError: there is no caption file, nothing in it can be used, or more is damaged.
        """
        self.rejected = []
        images = ImageFiles(self.input_dir, self.follow_links)
        skipped = Skipped("captions in the caption file")
        missing: dict[str, str] = {}
        found: dict[Path | ParquetImage, _Found] = {}
        for record, (file, split) in self.records(images, skipped):
            name, place = record.image, record.stored
            if place is None:
                try:
                    known = self.find_image(images, name, file.parent)
                except ValueError as error:
                    skipped.add(record.where, str(error))
                    continue
                if known is None:
                    missing.setdefault(without_number(name), record.where)
                    continue
                name, place = known, images.paths[known]
            one = found.setdefault(place, _Found(name))
            one.captions += record.captions
            if of_folder := self.split_of_folder(name):
                one.splits.setdefault(of_folder, "its folder")
            for stated in filter(None, (split, record.split)):
                one.splits.setdefault(stated, _end_of(record.where))
            if len(one.splits) > 1:
                named = ", ".join(f"{split} by {by}" for split, by in one.splits.items())
                raise DataError(f"{record.where}: {name} is in several splits ({named})")
        skipped.check(at_least=MIN_SKIPPED_ROWS)
        self._report(images, skipped, missing, {p for p, one in found.items() if one.captions})
        return [
            SourceItem(
                self.image_id(one.name),
                one.captions,
                next(iter(one.splits), None),
                path=place if isinstance(place, Path) else None,
                stored=place if isinstance(place, ParquetImage) else None,
            )
            for place, one in found.items()
            if one.captions
        ]

    def _report(
        self,
        images: ImageFiles,
        skipped: Skipped,
        missing: dict[str, str],
        captioned: set[Path | ParquetImage],
    ) -> None:
        """List what is skipped; raise DataError where too many images are missing."""
        lost = Skipped("captioned images", len(missing) + len(captioned))
        for name, where in missing.items():
            lost.add(where, f"its image {name!r} is missing")
        skips = [(_end_of(s.where), s.reason) for s in (*skipped.samples, *lost.samples)]
        skips += [(name, LEADS_OUT) for name in images.linked_out]
        if not captioned:
            causes = "; ".join(by_cause(skips)[:NUM_CAUSES]) or "all captions are empty"
            raise DataError(f"no image in {self.input_dir} has a caption: {causes}")
        if self.is_complete:
            if not images.linked_out:  # which may be the missing ones
                lost.check(at_least=MIN_SKIPPED_ROWS)
            others = (name for name, path in images.paths.items() if path not in captioned)
            skips += [(name, "it has no caption") for name in others]
        self.rejected += [Rejected(*skip) for skip in skips]


def _end_of(where: str) -> str:
    return where.replace("\\", "/").rpartition("/")[2]
