"""Where captioned images come from: a class for each dataset's layout, and a line for it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.sources.base import Rejected, Source, SourceItem, iter_pictures
from vlm_bridge.data_pipeline.sources.coco import Coco
from vlm_bridge.data_pipeline.sources.conceptual import Conceptual
from vlm_bridge.data_pipeline.sources.flickr import Flickr8k, Flickr30k
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.errors import DataError, UsageError

# In the order in which a folder is recognized.
_KINDS = (GroundCap, Flickr8k, Flickr30k, Coco, Conceptual, LocalFolder, Scenes)
SOURCES: dict[str, type[Source]] = {kind.name: kind for kind in _KINDS}

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
    """Return the name of the source that reads a folder or file, and the file that tells it.

    Raises:
        DataError: no such folder, or nothing in it tells what it is.
    """
    if input_dir is None:
        return ("groundcap", "the hub") if captions_file is None else ("local", "")
    if input_dir.is_file():
        is_list = input_dir.suffix.lower() == ".tsv"
        return "conceptual" if is_list else "groundcap", input_dir.name
    if not input_dir.is_dir():
        raise DataError(f"no such folder: {input_dir} (--input-dir)")
    if captions_file is not None:
        name = captions_file.stem.removeprefix("dataset_")  # as Karpathy's files are called
        return name if name in ("coco", "flickr30k") else "local", captions_file.name
    for name, source in SOURCES.items():
        if file := source.recognize(input_dir):
            return name, file
    raise DataError(
        f"cannot tell which dataset {input_dir} holds: no caption file, text files beside images, "
        "parquet file or shards; name it with --source, and its captions with --captions-file"
    )


def make_source(name: str, **options: Any) -> Source:
    """Return the source called ``name``; UsageError where there is none or an option is missing."""
    if name not in SOURCES:
        raise UsageError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name].from_options(**options)
