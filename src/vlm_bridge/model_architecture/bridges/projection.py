"""The projection bridge: image tokens in the width that a cross-attending decoder looks at."""

from __future__ import annotations

from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import BridgeOptions
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import Bridge, ImageInputs, TextShape


class ProjectionBridge(Bridge):
    """Features [B, N, D] become the encoder states [B, N, W] of a decoder with cross-attention.

    The decoder's cross-attention layers (BLIP's, Li et al. 2022) must be pretrained or trained too.
    From 512 to 768, `conv3x3` has 3,539,712 parameters.
    """

    output = "encoder_hidden_states"

    def __init__(
        self, options: BridgeOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        super().__init__()
        width = text.cross_attention_width
        if width is None:
            raise ConfigurationError(
                "bridge.kind=projection needs a decoder that cross-attends (BLIP's, or "
                "language_model.add_cross_attention=true with GPT-2 or BERT's family); for other "
                "language models choose deep_prefix, prefix or cross_attention"
            )
        self.dropout = options.dropout
        if options.projection == "conv3x3":
            self.projection = GridConvolution(vision_dim, width, num_image_tokens)
        elif options.projection == "mlp":
            layers = (nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width))
            self.projection = nn.Sequential(*layers)
        else:
            self.projection = nn.Linear(vision_dim, width)
        self.positions = None
        if options.position_embeddings:
            self.positions = nn.Parameter(torch.empty(num_image_tokens, width))
            nn.init.normal_(self.positions, std=0.02)  # as BERT's and ViT's

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return encoder states [B, N, W] made of features [B, N, D]."""
        states_bnw = self.projection(features_bnd)
        if self.positions is not None:
            states_bnw = states_bnw + self.positions
        states_bnw = F.dropout(states_bnw, self.dropout, self.training)
        return ImageInputs(len(features_bnd), encoder_hidden_states=states_bnw)

    def image_attention(self, features_bnd: torch.Tensor, seen_bt: torch.Tensor) -> torch.Tensor:
        """Return the decoder's cross-attention [B, T, N]: encoder state n is image token n."""
        return seen_bt


class GridConvolution(nn.Conv2d):
    """A 3x3 convolution over tokens [B, N, D] that lie row by row on a square grid."""

    def __init__(self, vision_dim: int, width: int, num_image_tokens: int):
        self.side = isqrt(num_image_tokens)
        if self.side**2 != num_image_tokens:
            raise ConfigurationError(
                f"bridge.projection=conv3x3 needs a square grid of image tokens, not "
                f"{num_image_tokens} (a class token has no place on a grid): choose linear or mlp"
            )
        super().__init__(vision_dim, width, kernel_size=3, padding=1)

    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        grid_bdhw = features_bnd.transpose(1, 2).unflatten(2, (self.side, self.side))
        return super().forward(grid_bdhw).flatten(2).transpose(1, 2)
