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
from vlm_bridge.errors import UsageError

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
    "iter_pictures",
    "make_source",
]


def make_source(name: str, options: SourceOptions) -> Source:
    """Return the source called ``name``; UsageError where there is none or an option is missing."""
    if name not in SOURCES:
        raise UsageError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name].from_options(options)
