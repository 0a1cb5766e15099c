"""Bridges: the part that is trained. One file a family, and a dict from kind to class."""

from __future__ import annotations

from vlm_bridge.model_architecture.bridges.base import (
    Bridge,
    ImageInputs,
    KeyValuePrefix,
    TextShape,
)
from vlm_bridge.model_architecture.bridges.cross_attention import CrossAttentionBridge
from vlm_bridge.model_architecture.bridges.prefix import DeepPrefixBridge, PrefixBridge
from vlm_bridge.model_architecture.bridges.projection import ProjectionBridge

__all__ = ["BRIDGES", "Bridge", "ImageInputs", "KeyValuePrefix", "TextShape"]

BRIDGES = {
    "cross_attention": CrossAttentionBridge,
    "deep_prefix": DeepPrefixBridge,
    "prefix": PrefixBridge,
    "projection": ProjectionBridge,
}
