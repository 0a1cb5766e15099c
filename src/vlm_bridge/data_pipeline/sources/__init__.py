"""Where captioned pictures come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.sources.base import (
    Rejected,
    Source,
    SourceItem,
    iter_pictures,
)
from vlm_bridge.data_pipeline.sources.coco import Coco
from vlm_bridge.data_pipeline.sources.conceptual import Conceptual
from vlm_bridge.data_pipeline.sources.flickr import Flickr8k, Flickr30k
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.errors import DataError, UsageError

SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (GroundCap, Flickr8k, Flickr30k, Coco, Conceptual, LocalFolder, Scenes)
}

__all__ = [
    "SOURCES",
    "Rejected",
    "Source",
    "SourceItem",
    "find_source",
    "iter_pictures",
    "make_source",
]


def find_source(
    input_dir: Path | None = None, captions_file: Path | None = None
) -> tuple[str, str]:
    """Return the name of the source that reads the input folder, and the file that tells it.

    Raises:
        DataError: no such folder, or nothing in it tells what it is.
    """
    folder, captions = input_dir, captions_file
    if folder is None:
        return (LocalFolder.name, "") if captions is not None else (GroundCap.name, "the hub")
    if folder.is_file():
        return Conceptual.name if folder.suffix.lower() == ".tsv" else GroundCap.name, folder.name
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder} (--input-dir)")
    if captions is not None:
        named = captions.stem.removeprefix("dataset_")  # as Karpathy's files are called
        is_known = named in (Coco.name, Flickr30k.name)
        return named if is_known else LocalFolder.name, captions.name
    for name, source in SOURCES.items():
        if file := source.recognize(folder):
            return name, file
    raise DataError(
        f"cannot tell which dataset {folder} holds: it has no caption file, no text files beside "
        "images, no parquet file and no shards; name it with --source, and its captions with "
        "--captions-file"
    )


def make_source(name: str, **options: Any) -> Source:
    """Return the source called ``name``; UsageError where there is none or an option is missing."""
    if name not in SOURCES:
        raise UsageError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name].from_options(**options)
