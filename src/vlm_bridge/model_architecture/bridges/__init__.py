"""Bridges: the only part that is trained. One file each; a plain dict from kind to class."""

from __future__ import annotations

from typing import Protocol

import torch

from vlm_bridge.model_architecture.bridges.base import ImageInputs
from vlm_bridge.model_architecture.bridges.cross_attention import CrossAttentionBridge
from vlm_bridge.model_architecture.bridges.deep_prefix import DeepPrefixBridge
from vlm_bridge.model_architecture.bridges.prefix import PrefixBridge
from vlm_bridge.model_architecture.bridges.projection import ProjectionBridge

__all__ = [
    "BRIDGES",
    "Bridge",
    "CrossAttentionBridge",
    "DeepPrefixBridge",
    "ImageInputs",
    "PrefixBridge",
    "ProjectionBridge",
]


class Bridge(Protocol):
    """What the captioner asks of a bridge between features [B, N, D] and text embeddings [B, T, H].

    A bridge is built from ``(options, vision_dim=D, text=TextShape, num_image_tokens=N)``, also on the meta device.
    What depends on the image alone happens in ``encode``, once per image: captions and beams share it.

    Attributes:
        first_layer: the layer of the language model, from 0, below which nothing depends on the image.
        num_soft_tokens: P, how many soft tokens stand before the text; 0 for most bridges.
    """

    first_layer: int
    num_soft_tokens: int

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return what the language model reads of images, from their features [B, N, D].

        An edit of the text never mixes positions: causality.
        """
        ...

    def image_attention(
        self, features_bnd: torch.Tensor, text_bth: torch.Tensor, attention_btp: torch.Tensor | None
    ) -> torch.Tensor:
        """How the look of each text position at the image spreads over the N image tokens: [B, T, N], not normalised.

        Args:
            features_bnd: as for ``encode``.
            text_bth: as it enters ``first_layer``.
            attention_btp: how much the language model attends to each of the P soft tokens, prefix keys or
                encoder states that ``encode`` gives it; None where it gives none.
        """
        ...


BRIDGES = {
    "cross_attention": CrossAttentionBridge,
    "deep_prefix": DeepPrefixBridge,
    "prefix": PrefixBridge,
    "projection": ProjectionBridge,
}
