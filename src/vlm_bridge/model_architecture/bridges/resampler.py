"""The resampler: learned queries read an image through a small transformer. The trunk of the prefix bridges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.limits import check_at_least, check_dropout


@dataclass(frozen=True)
class ResamplerOptions:
    """Options of a resampler.

    Attributes:
        num_queries: how many vectors an image becomes.
        depth: layers of the small transformer.
        width: its hidden size; None means the language model's.
        num_heads: attention heads, of queries over [queries; image tokens].
        feed_forward_multiplier: hidden size of its feed-forward layers, as a multiple of the width.
        position_embeddings: tell the image tokens where they are; encoders whose features do not say so by
            themselves (convolutional ones) need it for words such as "above" or "left".
        dropout: on both residual branches and on the image tokens, while training.
    """

    num_queries: int = 16
    depth: int = 2
    width: int | None = None
    num_heads: int = 8
    feed_forward_multiplier: int = 4
    position_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "num_queries", "depth", "width", "num_heads", "feed_forward_multiplier", prefix="bridge."
        )
        check_dropout(self.dropout, "bridge.dropout")


class Resampler(nn.Module):
    """Queries attend to [queries; image tokens] (Jaegle et al. 2021; Alayrac et al. 2022).

    Features [B, N, D] become [B, P, W] for P queries of width W.
    """

    def __init__(self, options: ResamplerOptions, vision_dim: int, width: int, num_image_tokens: int):
        super().__init__()
        if width % options.num_heads:
            raise ValueError(
                f"bridge.num_heads={options.num_heads} does not divide the bridge's width {width}"
            )
        self.dropout = options.dropout
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.vision_projection = nn.Linear(vision_dim, width)
        self.vision_norm = nn.LayerNorm(width)
        self.positions = (
            nn.Parameter(torch.empty(num_image_tokens, width)) if options.position_embeddings else None
        )
        self.layers = nn.ModuleList(ResamplerLayer(options, width) for _ in range(options.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Both of the size of the layer-normalised image tokens, or nearly: attention tells them apart at once.
        nn.init.normal_(self.queries, std=1.0)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.5)

    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        image_bnw = self.vision_norm(self.vision_projection(features_bnd))
        if self.positions is not None:
            image_bnw = image_bnw + self.positions
        image_bnw = F.dropout(image_bnw, self.dropout, self.training)
        x_bpw = self.queries.expand(len(features_bnd), -1, -1)
        for layer in self.layers:
            x_bpw = layer(x_bpw, image_bnw)
        return x_bpw


class ResamplerLayer(nn.Module):
    """Pre-norm attention of queries [B, P, W] over [queries; image tokens], then a GELU feed-forward layer."""

    def __init__(self, options: ResamplerOptions, width: int):
        super().__init__()
        self.num_heads = options.num_heads
        self.dropout = options.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, options.feed_forward_multiplier * width)
        self.feed_forward_out = nn.Linear(options.feed_forward_multiplier * width, width)

    def forward(self, x_bpw: torch.Tensor, image_bnw: torch.Tensor) -> torch.Tensor:
        normed_bpw = self.attention_norm(x_bpw)
        keys, values = self.key_value(torch.cat((normed_bpw, image_bnw), dim=1)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(normed_bpw)), self._heads(keys), self._heads(values)
        )
        x_bpw = x_bpw + self._drop(self.attention_output(attended.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x_bpw)))
        return x_bpw + self._drop(self.feed_forward_out(hidden))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)
