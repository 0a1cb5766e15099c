"""Bridges: the only part that is trained. One file each; a plain dict from name to (options, class)."""

from __future__ import annotations

from typing import Protocol

import torch

from vlm_bridge.model_architecture.bridges.cross_attention import CrossAttentionBridge, CrossAttentionOptions
from vlm_bridge.model_architecture.bridges.deep_prefix import DeepPrefixBridge, DeepPrefixOptions
from vlm_bridge.model_architecture.bridges.prefix import PrefixBridge, PrefixOptions
from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix

__all__ = ["BRIDGES", "Bridge", "CrossAttentionBridge", "DeepPrefixBridge", "PrefixBridge"]


class Bridge(Protocol):
    """What the captioner asks of a bridge between features [B, N, D] and text embeddings [B, T, H].

    A bridge is built from ``(options, vision_dim=D, text=TextShape, num_image_tokens=N)``, also on the meta device.
    What depends on the image alone happens in ``encode_image``, once per image: captions and beams share it.
    """

    def output_num_tokens(self, num_image_tokens: int) -> int:
        """How many soft tokens stand before the text, given N image tokens (0 for a bridge that edits the text)."""
        ...

    def encode_image(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Image state [B, ...] from features [B, N, D]."""
        ...

    def soft_tokens(self, image_state: torch.Tensor) -> torch.Tensor | None:
        """Soft tokens [B, P, H] that stand before the text, or None."""
        ...

    def key_value_prefix(self, image_state: torch.Tensor) -> KeyValuePrefix | None:
        """Keys and values that the language model's layers attend to beside the text's own, or None."""
        ...

    def edit_text(self, text_bth: torch.Tensor, image_state: torch.Tensor) -> torch.Tensor:
        """Text embeddings [B, T, H], edited position by position (never across positions: causality)."""
        ...


BRIDGES = {
    "cross_attention": (CrossAttentionOptions, CrossAttentionBridge),
    "deep_prefix": (DeepPrefixOptions, DeepPrefixBridge),
    "prefix": (PrefixOptions, PrefixBridge),
}
