"""A folder of images with captions in one of the usual forms, or in Hugging Face's layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.sources.base import SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import FORMS, CaptionRecord, read_sidecars
from vlm_bridge.data_pipeline.sources.captioned_files import CaptionedFiles, CaptionFile, ImageFiles
from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError

CAPTION_FILES = (
    *(f"captions{suffix}" for suffix in (*FORMS, ".parquet")),
    *(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")),
    "annotations.json",
)


@dataclass
class LocalFolder(CaptionedFiles):
    """Your own images; splits come from folders, a ``split`` column or else from image ids."""

    name = "local"
    description = "A folder of images with captions (CSV, TSV, JSON, parquet, text files)"
    licence_note = "Your own images and captions: under whatever licence you hold them"
    default_caption_style = "raw"
    is_complete = True

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        if here := _candidates(folder) or [path for path, _ in _files_of_splits(folder)]:
            return here[0].relative_to(folder).as_posix()
        return "text files beside images" if _has_sidecars(ImageFiles(folder)) else None

    def caption_files(self) -> list[CaptionFile]:
        if self.captions_file is not None:
            return [(self.captions_file, None)]
        here: list[CaptionFile] = [(path, None) for path in _candidates(self.input_dir)]
        return here or _files_of_splits(self.input_dir)

    def records(
        self, images: ImageFiles, skipped: Skipped
    ) -> Iterator[tuple[CaptionRecord, CaptionFile]]:
        if self.caption_files():
            yield from super().records(images, skipped)
        elif _has_sidecars(images):
            for record in read_sidecars(self.input_dir, images.paths, skipped):
                yield record, (self.input_dir / "text files", None)
        else:
            raise DataError(
                f"no caption file in {self.input_dir} (looked for {', '.join(CAPTION_FILES)}, "
                "*.parquet, and text files beside images): name it with --captions-file"
            )

    def split_of_folder(self, name: str) -> SplitName | None:
        """Return the split that the first folder of an image's path names."""
        splits = map(normalise_split, PurePosixPath(name).parts[:-1])
        return next((split for split in splits if split is not None), None)

    def image_id(self, name: str) -> str:
        return name

    def items(self) -> list[SourceItem]:
        """Return the images; ids are paths without suffix unless two would then be equal."""
        items = super().items()
        stems = [PurePosixPath(item.image_id).with_suffix("").as_posix() for item in items]
        uses, names = Counter(stems), Counter(item.image_id for item in items)
        for number, (item, stem) in enumerate(zip(items, stems, strict=True)):
            if names[item.image_id] > 1:  # images within parquet files may share a name
                items[number] = replace(item, image_id=f"{item.image_id}-{number:06d}")
            elif uses[stem] == 1:
                items[number] = replace(item, image_id=stem)
        return items


def _has_sidecars(images: ImageFiles) -> bool:
    return any(path.with_suffix(".txt").is_file() for path in images.paths.values())


def _candidates(folder: Path) -> list[Path]:
    """Return the caption file in a folder, if there is one. Raises DataError for several."""
    files = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(
            f"{folder} has several caption files ({names}): choose one with --captions-file"
        )
    return files


def _files_of_splits(folder: Path) -> list[CaptionFile]:
    """Return the caption file of each split folder (``validation/`` ...), or all parquet files."""
    found: list[CaptionFile] = []
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        split = normalise_split(below.name)
        if split is not None and (here := _candidates(below)):
            found.append((here[0], split))
    tables = [*sorted(folder.glob("*.parquet")), *sorted((folder / "data").glob("*.parquet"))]
    return found or [(path, normalise_split(path.stem.split("-")[0])) for path in tables]
