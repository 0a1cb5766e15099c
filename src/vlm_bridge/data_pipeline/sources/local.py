"""A folder of images with captions in one of the usual forms, or in Hugging Face's layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.parquet import ParquetPicture
from vlm_bridge.data_pipeline.samples import (
    MAX_SKIPPED_SHARE,
    MIN_SKIPPED_ROWS,
    NUM_CAUSES,
    Skipped,
    by_cause,
)
from vlm_bridge.data_pipeline.sources.base import Rejected, Source, SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import (
    READERS,
    CaptionRecord,
    read_captions,
    read_sidecars,
)
from vlm_bridge.data_pipeline.sources.image_files import (
    LEADS_OUT,
    MISSING,
    ImageFiles,
    LeadsOutError,
)
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError

CAPTION_FILES = (
    *(f"captions{suffix}" for suffix in READERS),
    *(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")),
    "annotations.json",
)


@dataclass
class _Found:
    """An image with the records that caption it."""

    name: str
    place: Path | ParquetPicture
    records: list[CaptionRecord] = field(default_factory=list)


@dataclass
class LocalFolder(Source):
    """Your own images; splits come from folders, a ``split`` column or else from image ids."""

    name: ClassVar[str] = "local"
    description: ClassVar[str] = (
        "A folder of images with captions (CSV, TSV, JSON, parquet, text files)"
    )
    licence_note: ClassVar[str] = (
        "Your own images and captions: under whatever licence you hold them"
    )
    default_caption_style: ClassVar[CaptionStyle] = "raw"

    input_dir: Path
    captions_file: Path | None = None
    follow_links: bool = False

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the caption file, or of its substitute."""
        here = _candidates(folder) or [path for path, _ in _files_of_splits(folder)]
        if here:
            return here[0].relative_to(folder).as_posix()
        return "text files beside images" if _has_sidecars(ImageFiles(folder)) else None

    def items(self) -> list[SourceItem]:
        """Return the images in the order of their first caption.

        Rows that cannot be used and missing images are skipped, up to two of each or a share
        (`MAX_SKIPPED_SHARE`).

        Raises:
            DataError: there is no caption file, nothing in it can be used, or more is missing.
        """
        self.rejected = []
        images = ImageFiles(self.input_dir, follow_links=self.follow_links)
        bad = Skipped("captions in the caption file")
        found, missing = self._match(images, bad)
        bad.check(MAX_SKIPPED_SHARE, at_least=MIN_SKIPPED_ROWS)
        self._check_missing(images, len(found), missing)
        captioned = [one for one in found if any(record.captions for record in one.records)]
        skipped = [Rejected(Path(sample.where).name, sample.reason) for sample in bad.samples]
        if not captioned:
            if images.linked_out:
                raise DataError(
                    f"the images of {self.input_dir} cannot be used, each is {LEADS_OUT}"
                )
            causes = by_cause((item.id, item.reason) for item in [*skipped, *self.rejected])
            why = f": {'; '.join(causes[:NUM_CAUSES])}" if causes else ""
            raise DataError(f"the caption file in {self.input_dir} has no captions{why}")
        self.rejected += skipped
        for record in missing:
            name = f"{record.image} ({Path(record.where).name})"
            self.rejected.append(Rejected(name, MISSING))
        self.rejected += [Rejected(name, LEADS_OUT) for name in images.linked_out]
        places = {one.place for one in captioned}
        self.rejected += [
            Rejected(name, "it has no caption")
            for name, path in images.paths.items()
            if path not in places
        ]
        ids = _image_ids(captioned)
        return [_item(image_id, one) for image_id, one in zip(ids, captioned, strict=True)]

    def _match(self, images: ImageFiles, bad: Skipped) -> tuple[list[_Found], list[CaptionRecord]]:
        """Return the images with their records, and the records whose image is missing."""
        found: dict[Path | ParquetPicture, _Found] = {}
        missing: list[CaptionRecord] = []
        for record, beside in self._records(images, bad):
            name, place = record.image, record.stored
            if place is None:
                try:
                    place = images.find(record.image, beside)
                except LeadsOutError:
                    continue  # images.linked_out names it
                except ValueError as error:
                    bad.add(record.where, str(error))
                    continue
                if place is None:
                    missing.append(record)
                    continue
                name = place.relative_to(self.input_dir).as_posix()
            found.setdefault(place, _Found(name, place)).records.append(record)
            where = Path(record.where).name
            self.rejected += [Rejected(where, reason) for reason in record.skipped]
        return list(found.values()), missing

    def _records(self, images: ImageFiles, bad: Skipped) -> Iterator[tuple[CaptionRecord, Path]]:
        """Yield every record with the folder of its file, whose split becomes the record's."""
        files = self._caption_files(images)
        if not files:
            for record in read_sidecars(self.input_dir, images.paths, bad):
                yield record, self.input_dir
        for path, of_file in files:

            def is_image(name: str, beside: Path = path.parent) -> bool:
                try:
                    return images.find(name, beside) is not None
                except ValueError:
                    return True

            for record in read_captions(path, bad, is_image):
                if of_file is not None and record.split not in (None, of_file):
                    raise DataError(
                        f"{record.where}: {record.image} is in several splits ({record.split} by "
                        f"its row, {of_file} by {path}): correct one of them"
                    )
                yield replace(record, split=of_file or record.split), path.parent

    def _caption_files(self, images: ImageFiles) -> list[tuple[Path, SplitName | None]]:
        """Return the caption file, or one of each split, or none where text files are captions.

        Raises:
            DataError: there is nothing of these, or several caption files.
        """
        if self.captions_file is not None:
            return [(self.captions_file, None)]
        if here := _candidates(self.input_dir):
            return [(_only(here), None)]
        if found := _files_of_splits(self.input_dir):
            return found
        if not _has_sidecars(images):
            raise DataError(
                f"no caption file in {self.input_dir} (looked for {', '.join(CAPTION_FILES)}, "
                "*.parquet, and text files beside images): name it with --captions-file"
            )
        return []

    def _check_missing(
        self, images: ImageFiles, num_found: int, missing: list[CaptionRecord]
    ) -> None:
        """Raise DataError where more than a few images are missing."""
        names = list(dict.fromkeys(record.image for record in missing))
        total = len(names) + num_found
        allowed = max(MIN_SKIPPED_ROWS - 1, MAX_SKIPPED_SHARE * total) if num_found else 0
        if len(names) <= allowed:
            return
        near = images.nearest(names[0])
        hint = f"the nearest files are {', '.join(near)}" if near else "no file has a similar name"
        raise DataError(
            f"{len(names):,} of {total:,} images in the caption file are missing under "
            f"{self.input_dir}; the first is {names[0]} ({Path(missing[0].where).name}), {hint}: "
            "correct the names or remove these captions"
        )


def _has_sidecars(images: ImageFiles) -> bool:
    return any(path.with_suffix(".txt").is_file() for path in images.paths.values())


def _candidates(folder: Path) -> list[Path]:
    return [folder / name for name in CAPTION_FILES if (folder / name).is_file()]


def _files_of_splits(folder: Path) -> list[tuple[Path, SplitName | None]]:
    """Return the caption file of each split folder (``validation/`` ...), or all parquet files."""
    found: list[tuple[Path, SplitName | None]] = []
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        split = normalise_split(below.name)
        if split is not None and (here := _candidates(below)):
            found.append((_only(here), split))
    if not found:
        tables = [*sorted(folder.glob("*.parquet")), *sorted((folder / "data").glob("*.parquet"))]
        found = [(path, normalise_split(path.stem.split("-")[0])) for path in tables]
    return found


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(
            f"{files[0].parent} has several caption files ({names}): "
            "choose one with --captions-file"
        )
    return files[0]


def _item(image_id: str, found: _Found) -> SourceItem:
    captions = [caption for record in found.records for caption in record.captions]
    place = found.place
    if isinstance(place, Path):
        return SourceItem(image_id, captions, _one_split(found), path=place)
    return SourceItem(image_id, captions, _one_split(found), stored=place)


def _one_split(found: _Found) -> SplitName | None:
    """Return the split of an image's folders and records; DataError where they differ."""
    stated: dict[SplitName, str] = {}
    for folder in PurePosixPath(found.name).parts[:-1] if isinstance(found.place, Path) else ():
        if (split := normalise_split(folder)) is not None:
            stated[split] = f"by its folder {folder}"
            break
    for record in found.records:
        if record.split is not None:
            stated.setdefault(record.split, f"by {Path(record.where).name}")
        if len(stated) > 1:
            named = ", ".join(f"{split} {by}" for split, by in stated.items())
            raise DataError(
                f"{record.where}: {found.name} is in several splits ({named}): correct one of them"
            )
    return next(iter(stated), None)


def _image_ids(found: list[_Found]) -> list[str]:
    """Return paths below the input folder, without suffix unless two would then be equal."""
    stems = [PurePosixPath(one.name).with_suffix("").as_posix() for one in found]
    uses, names = Counter(stems), Counter(one.name for one in found)
    ids = []
    for number, (one, stem) in enumerate(zip(found, stems, strict=True)):
        if names[one.name] > 1:  # images within parquet files may share a name
            ids.append(f"{one.name}-{number:06d}")
        else:
            ids.append(stem if uses[stem] == 1 else one.name)
    return ids
