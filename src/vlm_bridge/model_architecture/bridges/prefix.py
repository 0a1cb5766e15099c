"""Bridges with learned queries: soft tokens, or keys and values for the layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import BridgeOptions
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import (
    Bridge,
    ImageInputs,
    KeyValuePrefix,
    TextShape,
    entered_layer,
    in_heads,
    mean_attention_weights,
)


class ResamplerBridge(Bridge):
    """Base of bridges that read an image through learned queries."""

    def __init__(self, options: BridgeOptions, vision_dim: int, width: int, num_tokens: int):
        super().__init__()
        self.resampler = Resampler(options, vision_dim, width, num_tokens)

    def image_attention(self, features_bnd: torch.Tensor, seen_bt: torch.Tensor) -> torch.Tensor:
        """Roll attention out in two steps: text to queries [B, T, P], queries to image tokens."""
        return seen_bt @ self.resampler.image_attention(features_bnd)


class PrefixBridge(ResamplerBridge):
    """Soft tokens from the image (ClipCap, Mokady et al. 2021, with a resampler as the mapping).

    They leave through a layer norm whose gain starts at the size of the language model's own
    embeddings (`set_output_scale`).
    """

    def __init__(
        self, options: BridgeOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        width = options.width or text.width
        super().__init__(options, vision_dim, width, num_image_tokens)
        self.num_soft_tokens = options.num_queries
        self.output_projection = nn.Linear(width, text.width)
        self.output_norm = nn.LayerNorm(text.width)

    def set_output_scale(self, embedding_std: float) -> None:
        nn.init.constant_(self.output_norm.weight, embedding_std)

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return soft tokens [B, P, H] made of features [B, N, D]."""
        soft_bph = self.output_norm(self.output_projection(self.resampler(features_bnd)))
        return ImageInputs(len(features_bnd), soft_tokens=soft_bph)


class DeepPrefixBridge(ResamplerBridge):
    """Prefix tuning (Li & Liang 2021) with a prefix made from the image.

    A query of the resampler becomes one key and one value per layer and head, beside the text's
    own. Values start at zero. Entering above the first layers leaves the position untouched on
    which language models park idle attention (as LLaMA-Adapter, Zhang et al. 2023).
    """

    output = "key_value_prefix"

    def __init__(
        self, options: BridgeOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        width = options.width or text.width
        super().__init__(options, vision_dim, width, num_image_tokens)
        self.first_layer = entered_layer(options.enter_at_layer, text)
        layers = text.num_layers - self.first_layer
        self.shape = (layers, 2, text.num_key_value_heads, text.head_dim)
        self.output_norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, layers * 2 * text.num_key_value_heads * text.head_dim)
        nn.init.normal_(self.keys_values.weight, std=0.02)
        nn.init.zeros_(self.keys_values.bias)
        with torch.no_grad():
            self.keys_values.weight.unflatten(0, self.shape)[:, 1] = 0

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return keys and values [B, layers, 2, heads, P, head_dim] of features [B, N, D]."""
        flat_bpo = self.keys_values(self.output_norm(self.resampler(features_bnd)))
        states = flat_bpo.unflatten(-1, self.shape).permute(0, 2, 3, 4, 1, 5).contiguous()
        prefix = KeyValuePrefix(states, self.first_layer)
        return ImageInputs(len(features_bnd), key_value_prefix=prefix)


class Resampler(nn.Module):
    """Queries attend to [queries; image tokens] (Jaegle et al. 2021; Alayrac et al. 2022).

    Features [B, N, D] become [B, P, W] for P queries of width W.
    """

    def __init__(self, options: BridgeOptions, vision_dim: int, width: int, num_image_tokens: int):
        super().__init__()
        if width % options.num_heads:
            raise ConfigurationError(
                f"bridge.num_heads={options.num_heads} does not divide the bridge's width {width}"
            )
        self.dropout = options.dropout
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.vision_projection = nn.Linear(vision_dim, width)
        self.vision_norm = nn.LayerNorm(width)
        self.positions = None
        if options.position_embeddings:
            self.positions = nn.Parameter(torch.empty(num_image_tokens, width))
        self.layers = nn.ModuleList(ResamplerLayer(options, width) for _ in range(options.depth))
        # Near the size of the normalized image tokens: attention tells them apart at once.
        nn.init.normal_(self.queries, std=1.0)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.5)

    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        x_bpw, image_bnw = self._inputs(features_bnd)
        for layer in self.layers:
            x_bpw = layer(x_bpw, image_bnw)
        return x_bpw

    def image_attention(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return the share [B, P, N] of each image token in each query (Abnar & Zuidema 2020).

        Half of a layer's output counts as its input, because of the residual connection.
        """
        x_bpw, image_bnw = self._inputs(features_bnd)
        sizes = (x_bpw.shape[1], image_bnw.shape[1])
        share_bpn = x_bpw.new_zeros(len(x_bpw), *sizes)
        for layer in self.layers:
            weights = layer.attention_weights(x_bpw, image_bnw)  # type: ignore[reportCallIssue]
            to_queries_bpp, to_image_bpn = weights.split(sizes, dim=-1)
            share_bpn = (share_bpn + to_queries_bpp @ share_bpn + to_image_bpn) / 2
            x_bpw = layer(x_bpw, image_bnw)
        return share_bpn

    def _inputs(self, features_bnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [B, P, W] and image tokens [B, N, W]."""
        image_bnw = self.vision_norm(self.vision_projection(features_bnd))
        if self.positions is not None:
            image_bnw = image_bnw + self.positions
        image_bnw = F.dropout(image_bnw, self.dropout, self.training)
        return self.queries.expand(len(features_bnd), -1, -1), image_bnw


class ResamplerLayer(nn.Module):
    """Pre-norm attention of queries [B, P, W] over [queries; image tokens], then feed-forward."""

    def __init__(self, options: BridgeOptions, width: int):
        super().__init__()
        self.num_heads, self.dropout = options.num_heads, options.dropout
        hidden = options.feed_forward_multiplier * width
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, hidden)
        self.feed_forward_out = nn.Linear(hidden, width)

    def forward(self, x_bpw: torch.Tensor, image_bnw: torch.Tensor) -> torch.Tensor:
        query, key, value = self._query_key_value(x_bpw, image_bnw)
        attended = F.scaled_dot_product_attention(query, key, value)
        x_bpw = x_bpw + self._drop(self.attention_output(attended.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x_bpw)))
        return x_bpw + self._drop(self.feed_forward_out(hidden))

    def attention_weights(self, x_bpw: torch.Tensor, image_bnw: torch.Tensor) -> torch.Tensor:
        """Return weights [B, P, P + N] over [queries; image tokens], averaged over heads."""
        query, key, _ = self._query_key_value(x_bpw, image_bnw)
        return mean_attention_weights(query, key)

    def _query_key_value(self, x_bpw: torch.Tensor, image_bnw: torch.Tensor) -> list[torch.Tensor]:
        normed_bpw = self.attention_norm(x_bpw)
        keys, values = self.key_value(torch.cat((normed_bpw, image_bnw), dim=1)).chunk(2, dim=-1)
        return [in_heads(x, self.num_heads) for x in (self.query(normed_bpw), keys, values)]

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)
