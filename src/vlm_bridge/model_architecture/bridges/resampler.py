"""The resampler: learned queries read an image through a small transformer. The trunk of the prefix bridges."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import ResamplerOptions
from vlm_bridge.model_architecture.bridges.base import mean_attention_weights


class Resampler(nn.Module):
    """Queries attend to [queries; image tokens] (Jaegle et al. 2021; Alayrac et al. 2022).

    Features [B, N, D] become [B, P, W] for P queries of width W.
    """

    def __init__(
        self, options: ResamplerOptions, vision_dim: int, width: int, num_image_tokens: int
    ):
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
            nn.Parameter(torch.empty(num_image_tokens, width))
            if options.position_embeddings
            else None
        )
        self.layers = nn.ModuleList(ResamplerLayer(options, width) for _ in range(options.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Both of the size of the layer-normalised image tokens, or nearly: attention tells them apart at once.
        nn.init.normal_(self.queries, std=1.0)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.5)

    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        image_bnw = self._image_tokens(features_bnd)
        x_bpw = self.queries.expand(len(features_bnd), -1, -1)
        for layer in self.layers:
            x_bpw = layer(x_bpw, image_bnw)
        return x_bpw

    def image_attention(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """How much of each image token [B, P, N] is in each query, by attention rollout (Abnar & Zuidema 2020).

        Half of a layer's output counts as its attention and half as its input, because of the residual connection. Rows
        sum to less than one: the rest is in the learned queries.
        """
        image_bnw = self._image_tokens(features_bnd)
        x_bpw = self.queries.expand(len(features_bnd), -1, -1)
        share_bpn = x_bpw.new_zeros(*x_bpw.shape[:2], image_bnw.shape[1])
        for layer in self.layers:
            weights = layer.attention_weights(x_bpw, image_bnw)  # type: ignore[reportCallIssue]
            to_queries_bpp, to_image_bpn = weights.split(
                (x_bpw.shape[1], image_bnw.shape[1]), dim=-1
            )
            share_bpn = (share_bpn + to_queries_bpp @ share_bpn + to_image_bpn) / 2
            x_bpw = layer(x_bpw, image_bnw)
        return share_bpn

    def _image_tokens(self, features_bnd: torch.Tensor) -> torch.Tensor:
        image_bnw = self.vision_norm(self.vision_projection(features_bnd))
        if self.positions is not None:
            image_bnw = image_bnw + self.positions
        return F.dropout(image_bnw, self.dropout, self.training)


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
        attended = F.scaled_dot_product_attention(*self._query_key_value(x_bpw, image_bnw))
        x_bpw = x_bpw + self._drop(self.attention_output(attended.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x_bpw)))
        return x_bpw + self._drop(self.feed_forward_out(hidden))

    def attention_weights(self, x_bpw: torch.Tensor, image_bnw: torch.Tensor) -> torch.Tensor:
        """Weights [B, P, P + N] of the queries over [queries; image tokens], averaged over heads."""
        query, key, _ = self._query_key_value(x_bpw, image_bnw)
        return mean_attention_weights(query, key)

    def _query_key_value(
        self, x_bpw: torch.Tensor, image_bnw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed_bpw = self.attention_norm(x_bpw)
        keys, values = self.key_value(torch.cat((normed_bpw, image_bnw), dim=1)).chunk(2, dim=-1)
        return self._heads(self.query(normed_bpw)), self._heads(keys), self._heads(values)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)
