"""Karpathy's splits of Flickr8k, Flickr30k and COCO, which papers on captioning compare on.

``dataset_flickr30k.json`` and ``dataset_coco.json`` (Karpathy and Fei-Fei, CVPR 2015) hold captions and splits::

    {"dataset": "coco", "images": [{"filename": "COCO_val2014_000000391895.jpg", "filepath": "val2014",
     "cocoid": 391895, "split": "test", "sentences": [{"raw": "A man with ...", "tokens": [...]}]}]}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.splits import SplitName, normalise_split
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, parse_json, shown

FOLDERS = ("", "annotations", "karpathy", "caption_datasets")
"""Where people put the file, below the dataset's folder."""

RESTVAL = "restval"
"""Images of COCO's validation part that are neither val nor test; papers train on them."""


@dataclass(frozen=True, slots=True)
class KarpathyImage:
    """One image of the file; ``part`` is its split or ``restval``."""

    file_name: str
    captions: list[str]
    part: str
    coco_id: int | None = None
    folder: str = ""

    @property
    def file_path(self) -> str:
        """The name with the folder that the file gives for it, as COCO's images have one."""
        return f"{self.folder}/{self.file_name}" if self.folder else self.file_name

    @property
    def split(self) -> SplitName | None:
        """The split with restval as training images."""
        return "train" if self.part == RESTVAL else normalise_split(self.part)


def find_karpathy_file(folder: Path, dataset: str) -> Path | None:
    """Return ``dataset_DATASET.json`` at or below ``folder``, None where it is in none of the usual places."""
    candidates = (folder / sub / f"dataset_{dataset}.json" for sub in FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def read_karpathy_file(path: Path, dataset: str) -> list[KarpathyImage]:
    """Return the images in file order.

    Raises:
        DataError: not JSON, of another dataset, or an image lacks a field (named with its position).
    """
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): get it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path} is not one of Karpathy's split files: it has no list of images")
    if content.get("dataset", dataset) != dataset:
        raise DataError(f"{path} splits {content['dataset']!s:.80}, not {dataset}")
    return karpathy_images(path, content)


def karpathy_images(path: Path, content: dict[str, Any]) -> list[KarpathyImage]:
    """Return the images of the content of a file, of whichever dataset; DataError as `read_karpathy_file`."""
    return [
        _image(record, f"{path}: image {number}") for number, record in enumerate(content["images"])
    ]


def _image(record: Any, where: str) -> KarpathyImage:
    try:
        image = KarpathyImage(
            file_name=record["filename"],
            captions=[sentence["raw"] for sentence in record["sentences"]],
            part=record["split"],
            coco_id=record.get("cocoid"),
            folder=record.get("filepath") or "",
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} lacks filename, split or sentences with their raw text ({shown(error)})"
        ) from None
    if not all(
        is_text(text) for text in (image.file_name, image.part, image.folder, *image.captions)
    ):
        raise DataError(f"{where}: filename, split and captions must be texts")
    if image.split is None:
        raise DataError(f"{where}: unknown split {image.part!r}")
    return image
