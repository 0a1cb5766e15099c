"""Folders of image files with caption files that name them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from vlm_bridge.data_pipeline.caption_folder import FORMAT, MANIFEST_NAME, UNFINISHED_NAME
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.samples import (
    MIN_SKIPPED_ROWS,
    Skipped,
    SkippedSample,
    is_inside,
    main_causes,
)
from vlm_bridge.data_pipeline.sources import ParquetImage, Source, SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import (
    FORMS,
    CaptionRecord,
    captioned_by_text,
    read_captions,
    without_number,
)
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError

LEADS_OUT = (
    "a link that leads out of the dataset's folder: copy the file there, or give --follow-links"
)
CAPTION_FILES = (
    *(f"captions{suffix}" for suffix in FORMS),
    *(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")),
    "annotations.json",
)

CaptionFile = tuple[Path, SplitName | None]
"""A caption file, and the split that it decides."""


def first_file(folder: Path, *names: str) -> Path | None:
    """Return the first of the files that is in a folder or in one below it."""
    places = (path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}"))))
    return next(filter(Path.is_file, places), None)


class ImageFiles:
    """The image files below a folder, except those of caption folders made of the dataset.

    Attributes:
        paths: the files by their names relative to the folder, with slashes.
        linked_out: names of links out of the folder, which are skipped unless ``follow_links``.
    """

    def __init__(self, root: Path, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self.paths: dict[str, Path] = {}
        self.linked_out: list[str] = []
        for top, folders, files in os.walk(root, followlinks=follow_links):
            folder = Path(top)
            inner = sorted(name for name in folders if not _is_caption_folder(folder / name))
            folders[:] = (name for name in inner if self._is_taken(folder / name))
            images = (name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
            for path in (folder / name for name in sorted(images)):
                if self._is_taken(path):
                    self.paths[path.relative_to(root).as_posix()] = path

    def _is_taken(self, path: Path) -> bool:
        if path.name.startswith("."):
            return False
        if path.is_symlink() and not (self.follow_links or is_inside(self.root.resolve(), path)):
            self.linked_out.append(path.relative_to(self.root).as_posix())
            return False
        return True

    def find(self, name: str, beside: Path) -> list[str]:
        """Return the names in ``paths`` that a caption file in ``beside`` may mean.

        A name may lack folders, its suffix or nothing but spelling (Unicode form, case, kind of
        slashes, the number of a caption).
        """
        bare, below = without_number(name).replace("\\", "/").removeprefix("./"), ""
        if beside != self.root and beside.is_relative_to(self.root):
            below = f"{beside.relative_to(self.root).as_posix()}/"
        for known in (
            t + inner + bare for t in (below, "") for inner in ("", "images/", "Images/")
        ):
            if known in self.paths:
                return [known]
        fits = self._by_end.get(_folded(bare), [])
        return [known for known in fits if known.startswith(below)] or fits

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """The names of the files that end in a folded name, with or without the suffix."""
        by_end = defaultdict(list)
        for name in self.paths:
            parts = _folded(name).split("/")
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                for spelled in (end, end.rpartition(".")[0]):
                    by_end[spelled].append(name)
        return by_end


def _is_caption_folder(folder: Path) -> bool:
    manifest = folder / MANIFEST_NAME
    is_made = manifest.is_file() and FORMAT in manifest.read_text("utf-8", errors="replace")[:1000]
    return is_made or (folder / UNFINISHED_NAME).is_dir()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


@dataclass
class CaptionedFiles(Source):
    """A folder of images with caption files, which a subclass finds."""

    usual_files: ClassVar[tuple[str, ...]] = ()  # by which a folder is recognized
    is_own: ClassVar[bool] = False  # folders decide splits, and every image has a caption

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

    def items(self) -> list[SourceItem]:
        """Return the images by their names, in the order of their first caption.

        Rows that cannot be used are skipped, up to two or a share (`MAX_SKIPPED_SHARE`).

        Raises:
            DataError: there is no caption file, nothing in it can be used, or more is damaged.
        """
        images = ImageFiles(self.input_dir, self.follow_links)
        skipped, lost = Skipped("captions in the caption file"), Skipped("captioned images")
        missing: set[str] = set()
        found: dict[Path | ParquetImage, SourceItem] = {}
        for record, (file, split) in self.records(images, skipped):
            name, place = record.image, record.stored
            if place is None:
                fits = images.find(name, file.parent)
                bare = without_number(name)
                if len(fits) > 1:
                    files = ", ".join(fits[:3])
                    skipped.add(record.where, f"image name {bare!r} fits several files ({files})")
                elif not fits and bare not in missing:
                    missing.add(bare)
                    lost.add(record.where, f"its image {bare!r} is missing")
                if len(fits) != 1:
                    continue
                name, place = fits[0], images.paths[fits[0]]
            item = found.setdefault(place, SourceItem(name, [], None, place))
            item.captions.extend(record.captions)
            folder = _split_of_folder(name) if self.is_own else None
            for stated in filter(None, (folder, split, record.split)):
                if item.split not in (None, stated):
                    splits = f"{item.split} before, {stated} here"
                    raise DataError(f"{record.where}: {name} is in several splits ({splits})")
                item.split = stated
        skipped.check(at_least=MIN_SKIPPED_ROWS)
        items = {place: item for place, item in found.items() if item.captions}
        outside = [SkippedSample(name, LEADS_OUT) for name in images.linked_out]
        self.rejected = [*skipped.samples, *lost.samples, *outside]
        if not items:
            causes = main_causes(self.rejected) or "all captions are empty"
            raise DataError(f"no image in {self.input_dir} has a caption: {causes}")
        if self.is_own:
            lost.total = len(lost) + len(items)
            if not outside:  # which may be the missing ones
                lost.check(at_least=MIN_SKIPPED_ROWS)
            others = (name for name, path in images.paths.items() if path not in items)
            self.rejected += [SkippedSample(name, "it has no caption") for name in others]
        return list(items.values())


@dataclass
class LocalFolder(CaptionedFiles):
    """Your own images; splits come from folders, a ``split`` column or else from image ids."""

    name = "local"
    description = "A folder of images with captions (CSV, TSV, JSON, parquet, text files)"
    licence_note = "Your own images and captions: under whatever licence you hold them"
    default_caption_style = "raw"
    is_own = True

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        for path, _ in cls(folder).caption_files():
            is_file = path != folder
            return path.relative_to(folder).as_posix() if is_file else "text files beside images"
        return None

    def caption_files(self) -> list[CaptionFile]:
        """Return the file named or in the folder, else those of split folders, else parquet files.

        Where only text files beside images are there, return the folder itself.
        """
        folder = self.input_dir
        if path := self.captions_file or _caption_file_in(folder):
            return [(path, None)]
        found: list[CaptionFile] = []
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            split = normalise_split(below.name)
            if split is not None and (path := _caption_file_in(below)):
                found.append((path, split))
        tables = [*sorted(folder.glob("*.parquet")), *sorted((folder / "data").glob("*.parquet"))]
        found = found or [(path, normalise_split(path.stem.split("-")[0])) for path in tables]
        has_texts = not found and any(captioned_by_text(folder))
        return [(folder, None)] if has_texts else found

    def items(self) -> list[SourceItem]:
        """Return the images; ids are paths without suffix unless two would then be equal."""
        if not self.caption_files():
            raise DataError(
                f"no caption file in {self.input_dir} (looked for {', '.join(CAPTION_FILES)}, "
                "*.parquet, and text files beside images): name it with --captions-file"
            )
        items = super().items()
        stems = [PurePosixPath(item.image_id).with_suffix("").as_posix() for item in items]
        uses = Counter(stems)
        for item, stem in zip(items, stems, strict=True):
            item.image_id = stem if uses[stem] == 1 else item.image_id
        return items


def _split_of_folder(name: str) -> SplitName | None:
    """Return the split that the first folder of an image's path names."""
    splits = map(normalise_split, PurePosixPath(name).parts[:-1])
    return next((split for split in splits if split is not None), None)


def _caption_file_in(folder: Path) -> Path | None:
    """Return the caption file in a folder. Raises DataError for several."""
    files = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{folder} has several caption files ({names}): choose --captions-file")
    return next(iter(files), None)
