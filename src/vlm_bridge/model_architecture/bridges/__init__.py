"""Bridges: the part that is trained. One file a family, and a dict from kind to class."""

from __future__ import annotations

import torch

from vlm_bridge.configuration import BridgeOptions
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges.base import (
    Bridge,
    ImageInputs,
    KeyValuePrefix,
    TextShape,
)
from vlm_bridge.model_architecture.bridges.cross_attention import CrossAttentionBridge
from vlm_bridge.model_architecture.bridges.prefix import DeepPrefixBridge, PrefixBridge
from vlm_bridge.model_architecture.bridges.projection import ProjectionBridge

__all__ = [
    "BRIDGES",
    "Bridge",
    "CrossAttentionBridge",
    "DeepPrefixBridge",
    "ImageInputs",
    "KeyValuePrefix",
    "ProjectionBridge",
    "TextShape",
    "build_bridge",
]

BRIDGES = {
    "cross_attention": CrossAttentionBridge,
    "deep_prefix": DeepPrefixBridge,
    "prefix": PrefixBridge,
    "projection": ProjectionBridge,
}


def build_bridge(
    options: BridgeOptions,
    vision_dim: int,
    text: TextShape,
    num_image_tokens: int,
    *,
    meta: bool = False,
) -> Bridge:
    """Build a bridge on the CPU or the meta device. Raises ConfigurationError for its options."""
    try:
        with torch.device("meta" if meta else "cpu"):
            return BRIDGES[options.kind](options, vision_dim, text, num_image_tokens)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
