"""The prefix bridge: a resampler's queries become soft tokens before the text."""

from __future__ import annotations

import torch
from torch import nn

from vlm_bridge.configuration import PrefixOptions
from vlm_bridge.model_architecture.bridges.base import ImageInputs
from vlm_bridge.model_architecture.bridges.resampler import Resampler
from vlm_bridge.model_architecture.text_shape import TextShape


class PrefixBridge(nn.Module):
    """Soft tokens made from the image (as in ClipCap, Mokady et al. 2021, with a resampler for the mapping).

    They leave through a layer norm whose gain starts at the size of the language model's own embeddings
    (`set_output_scale`): the frozen layers then see inputs of a familiar size from the first step.
    """

    first_layer = 0

    def __init__(
        self, options: PrefixOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        super().__init__()
        width = options.width or text.width
        self.num_soft_tokens = options.num_queries
        self.resampler = Resampler(options, vision_dim, width, num_image_tokens)
        self.output_projection = nn.Linear(width, text.width)
        self.output_norm = nn.LayerNorm(text.width)

    def set_output_scale(self, embedding_std: float) -> None:
        """Start the soft tokens at the standard deviation of the language model's token embeddings."""
        nn.init.constant_(self.output_norm.weight, embedding_std)

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return soft tokens [B, P, H] made of features [B, N, D]."""
        soft_bph = self.output_norm(self.output_projection(self.resampler(features_bnd)))
        return ImageInputs(len(features_bnd), soft_tokens=soft_bph)

    def image_attention(
        self, features_bnd: torch.Tensor, text_bth: torch.Tensor, attention_btp: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention rollout in two steps, [B, T, N]: text to soft tokens, their queries to image tokens."""
        assert attention_btp is not None, "the language model reads soft tokens"
        return attention_btp @ self.resampler.image_attention(features_bnd)
