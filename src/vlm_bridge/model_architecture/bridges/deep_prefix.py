"""The deep-prefix bridge: an image as keys and values for the language model's attention, from a chosen layer on."""

from __future__ import annotations

import torch
from torch import nn

from vlm_bridge.configuration import DeepPrefixOptions
from vlm_bridge.model_architecture.bridges.base import ImageInputs, entered_layer
from vlm_bridge.model_architecture.bridges.resampler import Resampler
from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape


class DeepPrefixBridge(nn.Module):
    """Prefix tuning (Li & Liang 2021) in which the image makes the prefix: keys and values for each layer.

    No soft token runs through the language model: a query of the resampler becomes one key and one value per
    layer and head, which the text attends to beside its own. Values start at zero, so that the text reads as if
    no image were there, and entering above the first layers leaves the position on which language models park
    idle attention untouched (as LLaMA-Adapter, Zhang et al. 2023, which adapts the upper layers only).
    """

    num_soft_tokens = 0

    def __init__(
        self, options: DeepPrefixOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        super().__init__()
        third = text.num_layers // 3
        first = entered_layer(
            third if options.enter_at_layer is None else options.enter_at_layer, text
        )
        width = options.width or text.width
        self.first_layer = first
        self.shape = (text.num_layers - first, 2, text.num_key_value_heads, text.head_dim)
        self.resampler = Resampler(options, vision_dim, width, num_image_tokens)
        self.output_norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, self.shape[0] * 2 * self.shape[2] * self.shape[3])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys_values.weight, std=0.02)
        nn.init.zeros_(self.keys_values.bias)
        with torch.no_grad():
            self.keys_values.weight.unflatten(0, self.shape)[:, 1] = 0

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return keys and values [B, layers, 2, heads, P, head_dim] made of features [B, N, D]."""
        flat_bpo = self.keys_values(self.output_norm(self.resampler(features_bnd)))
        states = flat_bpo.unflatten(-1, self.shape).permute(0, 2, 3, 4, 1, 5).contiguous()
        return ImageInputs(
            len(features_bnd), key_value_prefix=KeyValuePrefix(states, self.first_layer)
        )

    def image_attention(
        self, features_bnd: torch.Tensor, text_bth: torch.Tensor, attention_btp: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention rollout in two steps, [B, T, N]: text to prefix keys, their queries to image tokens."""
        assert attention_btp is not None, "the language model reads prefix keys"
        return attention_btp @ self.resampler.image_attention(features_bnd)
