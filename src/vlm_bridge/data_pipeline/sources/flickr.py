"""Flickr8k in its own layout, with its official splits (Hodosh, Young and Hockenmaier, JAIR 2013)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vlm_bridge.data_pipeline.caption_folder import inside, is_inside
from vlm_bridge.data_pipeline.captions import CaptionStyle
from vlm_bridge.data_pipeline.sources.base import (
    Rejected,
    SourceItem,
    SourceOptions,
    read_lines,
    read_token_lines,
)
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError

CAPTIONS_FILE = "Flickr8k.token.txt"
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
    description: ClassVar[str] = "Flickr8k: photographs of people and dogs, five human captions each"
    licence_note: ClassVar[str] = (
        "Flickr photographs of many owners: research use only, not to be redistributed"
    )
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True

    input_dir: Path
    split_rule: str | None = field(default="official lists (train, dev as val, test)", init=False)
    rejected: list[Rejected] = field(default_factory=list, init=False)

    @classmethod
    def from_options(cls, options: SourceOptions) -> Flickr8k:
        return cls(options.require_input_dir(cls.name))

    @property
    def default_split_rule(self) -> SplitRule:
        return SplitRule()

    def items(self) -> list[SourceItem]:
        """Return the images in the order of the official lists."""
        self.rejected = []
        captions = self._read_captions()
        images = self._image_folder()
        on_disk = {path.name for path in images.iterdir()}
        resolved = images.resolve()
        items: list[SourceItem] = []
        split_of: dict[str, str] = {}
        for split, file_name, where in self._listed_images():
            if file_name in split_of:
                raise DataError(f"{where}: {file_name} is listed twice (also in {split_of[file_name]})")
            split_of[file_name] = split
            image_id = Path(file_name).stem
            if file_name not in on_disk:
                self.rejected.append(Rejected(image_id, f"listed in {split}, but its picture is missing"))
            elif not is_inside(resolved, images / file_name):
                self.rejected.append(Rejected(image_id, f"its picture is a link that leads out of {images}"))
            elif file_name not in captions:
                self.rejected.append(Rejected(image_id, "it has no caption"))
            else:
                items.append(SourceItem(image_id, captions[file_name], split, path=images / file_name))
        for file_name in captions.keys() - split_of.keys():
            reason = "it is in no split list" if file_name in on_disk else "captions of a missing picture"
            self.rejected.append(Rejected(Path(file_name).stem, reason))
        self.rejected.sort(key=lambda rejected: rejected.id)
        if not items:
            raise DataError(f"no listed picture of {self.input_dir} exists in {images}")
        return items

    def _read_captions(self) -> dict[str, list[str]]:
        """Read ``name.jpg#number<TAB>caption`` lines: captions by file name, in file order."""
        path = self.input_dir / CAPTIONS_FILE
        if not path.is_file():
            raise DataError(f"{self.input_dir} is not Flickr8k: it has no {CAPTIONS_FILE}")
        captions: dict[str, list[str]] = {}
        for where, file_name, caption in read_token_lines(path):
            captions.setdefault(_checked(self.input_dir, file_name, where), []).append(caption)
        return captions

    def _image_folder(self) -> Path:
        for name in IMAGE_FOLDERS:
            if (self.input_dir / name).is_dir():
                return self.input_dir / name
        raise DataError(f"{self.input_dir} has no folder of pictures (looked for {', '.join(IMAGE_FOLDERS)})")

    def _listed_images(self) -> list[tuple[SplitName, str, str]]:
        lists: dict[SplitName, Path] = {split: self.input_dir / name for split, name in SPLIT_FILES.items()}
        if not any(path.is_file() for path in lists.values()):
            raise DataError(f"{self.input_dir} has none of the split lists {', '.join(SPLIT_FILES.values())}")
        return [
            (split, _checked(self.input_dir, line.strip(), where), where)
            for split, path in lists.items()
            if path.is_file()
            for where, line in read_lines(path)
        ]


def _checked(folder: Path, file_name: str, where: str) -> str:
    try:
        inside(folder, file_name)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return file_name
