"""Where captioned pictures come from."""

from __future__ import annotations

from vlm_bridge.data_pipeline.sources.base import (
    Described,
    Rejected,
    Source,
    SourceItem,
    SourceOptions,
    iter_pictures,
)
from vlm_bridge.data_pipeline.sources.coco import Coco
from vlm_bridge.data_pipeline.sources.conceptual import Conceptual
from vlm_bridge.data_pipeline.sources.flickr import Flickr8k
from vlm_bridge.data_pipeline.sources.flickr30k import Flickr30k
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.errors import DataError, UsageError

SOURCES: dict[str, type[Source]] = {
    GroundCap.name: GroundCap,
    Flickr8k.name: Flickr8k,
    Flickr30k.name: Flickr30k,
    Coco.name: Coco,
    Conceptual.name: Conceptual,
    LocalFolder.name: LocalFolder,
    Scenes.name: Scenes,
}

__all__ = [
    "SOURCES",
    "Described",
    "Rejected",
    "Source",
    "SourceItem",
    "SourceOptions",
    "find_source",
    "iter_pictures",
    "make_source",
]


def find_source(options: SourceOptions) -> tuple[str, str]:
    """Return the name of the source that reads the input folder, and the name of the file that tells it.

    Raises:
        DataError: no such folder, or nothing in it tells what it is.
    """
    folder = options.input_dir
    if folder is None:
        return (
            (LocalFolder.name, "")
            if options.captions_file is not None
            else (GroundCap.name, "the hub")
        )
    if folder.is_file():
        return Conceptual.name if folder.suffix.lower() == ".tsv" else GroundCap.name, folder.name
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder} (--input-dir)")
    if options.captions_file is not None:
        named = options.captions_file.stem.removeprefix(
            "dataset_"
        )  # as Karpathy's files are called
        return named if named in (
            Coco.name,
            Flickr30k.name,
        ) else LocalFolder.name, options.captions_file.name
    for name, source in SOURCES.items():
        if file := source.recognize(folder):
            return name, file
    raise DataError(
        f"cannot tell which dataset {folder} holds: it has no caption file, no text files beside images, no parquet "
        "file and no shards; name it with --source, and its captions with --captions-file"
    )


def make_source(name: str, options: SourceOptions) -> Source:
    """Return the source called ``name``; UsageError where there is none or an option is missing."""
    if name not in SOURCES:
        raise UsageError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name].from_options(options)
