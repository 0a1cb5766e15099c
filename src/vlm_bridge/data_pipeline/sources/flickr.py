"""Flickr8k (Hodosh, Young and Hockenmaier, JAIR 2013) in the layouts that people have it in.

Captions come from the first of these that is there:

- ``Flickr8k.token.txt``: the dataset's own, lines of ``name.jpg#number<TAB>caption``;
- ``dataset_flickr8k.json``: Karpathy's file, with the splits;
- ``captions.txt``: CSV with the columns image, caption, as copies on Kaggle have it.

The official lists decide the splits where one of them is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.bad_samples import MAX_BAD_SHARE, MIN_BAD_ROWS, BadSamples
from vlm_bridge.data_pipeline.caption_folder import inside
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources.base import (
    Rejected,
    SourceItem,
    SourceOptions,
    read_lines,
    read_token_lines,
)
from vlm_bridge.data_pipeline.sources.caption_forms import read_captions
from vlm_bridge.data_pipeline.sources.image_files import LEADS_OUT, MISSING, ImageFiles
from vlm_bridge.data_pipeline.sources.karpathy import find_karpathy_file, read_karpathy_file
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError

CAPTIONS_FILE, KAGGLE_FILE = "Flickr8k.token.txt", "captions.txt"
# The second name (spelled so) is that of the folder in the authors' archive.
IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
SPLIT_FILES: Mapping[SplitName, str] = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass
class Flickr8k:
    """8,000 photographs with five human captions each; an absent list file leaves its split empty."""

    name: ClassVar[str] = "flickr8k"
    description: ClassVar[str] = (
        "Flickr8k: photographs of people and dogs, five human captions each"
    )
    licence_note: ClassVar[str] = (
        "Flickr photographs of many owners: research use only, not to be redistributed"
    )
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True

    input_dir: Path
    follow_links: bool = False
    split_rule: str | None = field(default="official lists (train, dev as val, test)", init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Flickr8k:
        return cls(options.require_input_dir(cls.name), options.follow_links)

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the file that tells Flickr8k, None where there is none."""
        if (folder / CAPTIONS_FILE).is_file():
            return CAPTIONS_FILE
        karpathy = find_karpathy_file(folder, cls.name)
        return karpathy.name if karpathy else None

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the official lists, or else of the caption file."""
        self.rejected = []
        captions, split_of = self._read_captions()
        images = ImageFiles(
            self.input_dir, self._image_folder(), self.follow_links, recursive=False
        )
        listed = self._listed_images(split_of)
        items: list[SourceItem] = []
        for file_name, split in listed.items():
            path, problem = images.look_up(file_name)
            image_id = Path(file_name).stem
            if path is None:
                self.rejected.append(Rejected(image_id, problem))
            elif file_name not in captions:
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, captions[file_name], split, path=path))
        for file_name in captions.keys() - listed.keys():
            reason = "it is in no split list" if file_name in images.paths else MISSING
            self.rejected.append(Rejected(Path(file_name).stem, reason))
        self.rejected.sort(key=lambda rejected: rejected.id)
        if not items:
            why = (
                f": {', '.join(images.linked_out[:3])} is {LEADS_OUT}" if images.linked_out else ""
            )
            raise DataError(
                f"no listed image of {self.input_dir} can be used{why or f'; looked in {images.folder}'}"
            )
        return items

    def _read_captions(self) -> tuple[dict[str, list[str]], dict[str, SplitName | None]]:
        """Return captions by file name, in file order, and the splits that the caption file knows."""
        captions: dict[str, list[str]] = {}
        path = self.input_dir / CAPTIONS_FILE
        if path.is_file():
            for where, file_name, caption in read_token_lines(path):
                captions.setdefault(_checked(self.input_dir, file_name, where), []).append(caption)
            return captions, dict.fromkeys(captions)
        if karpathy := find_karpathy_file(self.input_dir, self.name):
            known = read_karpathy_file(karpathy, self.name)
            self.split_rule = f"Karpathy's splits ({karpathy.name})"
            return {image.file_name: image.captions for image in known}, {
                i.file_name: i.split for i in known
            }
        path = self.input_dir / KAGGLE_FILE
        if not path.is_file():
            raise DataError(
                f"{self.input_dir} is not Flickr8k: it has none of {CAPTIONS_FILE}, "
                f"dataset_flickr8k.json, {KAGGLE_FILE}"
            )
        bad = BadSamples(f"rows of {path.name}")
        for record in read_captions(path, bad):
            captions.setdefault(record.image, []).extend(record.captions)
        bad.check(MAX_BAD_SHARE, at_least=MIN_BAD_ROWS)
        self.rejected += [
            Rejected(Path(sample.where).name, sample.reason) for sample in bad.samples
        ]
        self.split_rule = None
        return captions, dict.fromkeys(captions)

    def _image_folder(self) -> Path:
        for name in IMAGE_FOLDERS:
            if (self.input_dir / name).is_dir():
                return self.input_dir / name
        raise DataError(
            f"{self.input_dir} has no folder of images (looked for {', '.join(IMAGE_FOLDERS)})"
        )

    def _listed_images(self, split_of: dict[str, SplitName | None]) -> dict[str, SplitName | None]:
        """Return the split of every image: of the official lists, or else what the caption file says."""
        lists: dict[SplitName, Path] = {
            split: self.input_dir / name for split, name in SPLIT_FILES.items()
        }
        if not any(path.is_file() for path in lists.values()):
            if (self.input_dir / CAPTIONS_FILE).is_file():
                raise DataError(
                    f"{self.input_dir} has none of the split lists {', '.join(SPLIT_FILES.values())}"
                )
            return split_of
        self.split_rule = "official lists (train, dev as val, test)"
        listed: dict[str, SplitName | None] = {}
        for split, path in lists.items():
            for where, line in read_lines(path) if path.is_file() else ():
                file_name = _checked(self.input_dir, line.strip(), where)
                if file_name in listed:
                    raise DataError(
                        f"{where}: {file_name} is listed twice (also in {listed[file_name]})"
                    )
                listed[file_name] = split
        return listed


def _checked(folder: Path, file_name: str, where: str) -> str:
    try:
        inside(folder, file_name)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return file_name
