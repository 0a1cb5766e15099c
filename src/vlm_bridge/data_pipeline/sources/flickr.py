"""Flickr8k (Hodosh et al., JAIR 2013) and Flickr30k (Young et al., TACL 2014).

Captions come from the first of a dataset's usual files that is there, and splits with them where
it has some. Of Flickr8k, the official lists decide the splits where one of them is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.samples import MAX_SKIPPED_SHARE, MIN_SKIPPED_ROWS, Skipped
from vlm_bridge.data_pipeline.sources.base import Rejected, Source, SourceItem
from vlm_bridge.data_pipeline.sources.caption_forms import find_karpathy_file, read_captions
from vlm_bridge.data_pipeline.sources.image_files import (
    LEADS_OUT,
    MISSING,
    ImageFiles,
    without_number,
)
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import DataError


@dataclass
class _Flickr(Source):
    """Photographs from Flickr with five human captions each.

    Attributes:
        captions_file: one of the usual files, by whatever name; None finds it.
    """

    caption_files: ClassVar[tuple[str, ...]]
    image_folders: ClassVar[tuple[str, ...]]
    split_lists: ClassVar[dict[str, SplitName]] = {}

    input_dir: Path
    captions_file: Path | None = None
    follow_links: bool = False

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the caption file; ``captions.txt`` may be of any images."""
        found = cls._find_captions(folder)
        return found.name if found is not None and found.name != "captions.txt" else None

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the official lists, or else of the caption file."""
        self.rejected = []
        path = self.captions_file or self._find_captions(self.input_dir)
        if path is None:
            names = ", ".join((f"dataset_{self.name}.json", *self.caption_files))
            raise DataError(f"{self.input_dir} is not {self.name}: it has none of {names}")
        captions, split_of = self._read_captions(path)
        listed = self._split_lists() or split_of
        images = self._images()
        items: list[SourceItem] = []
        for name, split in listed.items():
            image, problem = images.look_up(name)
            image_id = Path(name).stem
            if image is None:
                self.rejected.append(Rejected(image_id, problem))
            elif not captions.get(name):
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, captions[name], split, path=image))
        if not items:
            linked = ", ".join(images.linked_out[:3])
            why = f": {linked} is {LEADS_OUT}" if linked else f"; looked in {images.folder}"
            raise DataError(f"none of the {len(listed)} images of {path} can be used{why}")
        for name in captions.keys() - listed.keys():
            reason = "it is in no split list" if name in images.paths else MISSING
            self.rejected.append(Rejected(Path(name).stem, reason))
        self.rejected += [
            Rejected(Path(name).stem, f"it is not in {path.name}")
            for name in images.paths.keys() - captions.keys() - listed.keys()
        ]
        self.rejected.sort(key=lambda rejected: rejected.id)
        if self.split_rule is None and all(item.split is not None for item in items):
            self.split_rule = f"Karpathy's splits ({path.name})"
        return items

    @classmethod
    def _find_captions(cls, folder: Path) -> Path | None:
        if karpathy := find_karpathy_file(folder, cls.name):
            return karpathy
        folders = [folder, *(folder / name for name in cls.image_folders)]
        candidates = (below / name for name in cls.caption_files for below in folders)
        return next((path for path in candidates if path.is_file()), None)

    def _read_captions(
        self, path: Path
    ) -> tuple[dict[str, list[str]], dict[str, SplitName | None]]:
        """Return captions and splits by file name, in file order."""
        bad = Skipped(f"rows of {path.name}")
        captions: dict[str, list[str]] = {}
        split_of: dict[str, SplitName | None] = {}
        for record in read_captions(path, bad):
            name = without_number(record.image)
            captions.setdefault(name, []).extend(record.captions)
            split_of.setdefault(name, record.split)
        bad.check(MAX_SKIPPED_SHARE, at_least=MIN_SKIPPED_ROWS)
        if not captions:
            raise DataError(f"{path} has no captions: {bad.summary() or 'it is empty'}")
        self.rejected += [Rejected(Path(skip.where).name, skip.reason) for skip in bad.samples]
        return captions, split_of

    def _split_lists(self) -> dict[str, SplitName | None]:
        """Return the split of every listed image; empty without lists."""
        listed: dict[str, SplitName | None] = {}
        self.split_rule = None
        for name, split in self.split_lists.items():
            path = self.input_dir / name
            if not path.is_file():
                continue
            self.split_rule = "official lists (train, dev as val, test)"
            for number, line in enumerate(
                path.read_text("utf-8", errors="replace").splitlines(), start=1
            ):
                if not (image := line.strip()):
                    continue
                if image in listed:
                    raise DataError(
                        f"{path}:{number}: {image} is listed twice (also in {listed[image]}): "
                        "remove it from one of the lists"
                    )
                listed[image] = split
        return listed

    def _images(self) -> ImageFiles:
        # A folder within another of its name is a usual accident of unpacking.
        names = self.image_folders
        folders = [self.input_dir / name / inner for name in names for inner in ("", name)]
        for folder in (*folders, self.input_dir):
            if folder.is_dir():
                images = ImageFiles(self.input_dir, folder, self.follow_links, recursive=False)
                if images.paths or images.linked_out:
                    return images
        raise DataError(
            f"{self.input_dir} has no folder of images (looked for {', '.join(names)} and in itself)"
        )


@dataclass
class Flickr8k(_Flickr):
    """8,000 photographs; an absent list file leaves its split empty."""

    name: ClassVar[str] = "flickr8k"
    description: ClassVar[str] = (
        "Flickr8k: photographs of people and dogs, five human captions each"
    )
    licence_note: ClassVar[str] = (
        "Flickr photographs of many owners: research use only, not to be redistributed"
    )
    caption_files: ClassVar[tuple[str, ...]] = ("Flickr8k.token.txt", "captions.txt")
    # The second name (spelled so) is that of the folder in the authors' archive.
    image_folders: ClassVar[tuple[str, ...]] = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    split_lists: ClassVar[dict[str, SplitName]] = {
        "Flickr_8k.trainImages.txt": "train",
        "Flickr_8k.devImages.txt": "val",
        "Flickr_8k.testImages.txt": "test",
    }


@dataclass
class Flickr30k(_Flickr):
    """31,783 photographs; 31,014 of them are in Karpathy's splits."""

    name: ClassVar[str] = "flickr30k"
    description: ClassVar[str] = "Flickr30k: photographs of everyday life, five human captions each"
    licence_note: ClassVar[str] = (
        "Flickr photographs of many owners under Flickr's terms of use: for non-commercial "
        "research and education only, not to be redistributed"
    )
    caption_files: ClassVar[tuple[str, ...]] = (
        "flickr_annotations_30k.csv",
        "results_20130124.token",
        "results.csv",
        "captions.txt",
    )
    image_folders: ClassVar[tuple[str, ...]] = (
        "flickr30k-images",
        "flickr30k_images",
        "Images",
        "images",
        "flickr30k",
    )
