"""Bridges with learned queries: soft tokens, or keys and values for the layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import DeepPrefixOptions, PrefixOptions, ResamplerOptions
from vlm_bridge.model_architecture.bridges.base import (
    ImageInputs,
    KeyValuePrefix,
    TextShape,
    entered_layer,
    mean_attention_weights,
)


class PrefixBridge(nn.Module):
    """Soft tokens from the image (ClipCap, Mokady et al. 2021, with a resampler as the mapping).

    They leave through a layer norm whose gain starts at the size of the language model's own
    embeddings (`set_output_scale`).
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
        nn.init.constant_(self.output_norm.weight, embedding_std)

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return soft tokens [B, P, H] made of features [B, N, D]."""
        soft_bph = self.output_norm(self.output_projection(self.resampler(features_bnd)))
        return ImageInputs(len(features_bnd), soft_tokens=soft_bph)

    def image_attention(
        self, features_bnd: torch.Tensor, attention_btp: torch.Tensor
    ) -> torch.Tensor:
        """Roll attention out in two steps: text to soft tokens, their queries to image tokens."""
        return attention_btp @ self.resampler.image_attention(features_bnd)


class DeepPrefixBridge(nn.Module):
    """Prefix tuning (Li & Liang 2021) with a prefix made from the image.

    A query of the resampler becomes one key and one value per layer and head, beside the text's
    own. Values start at zero, so that the text reads as if no image were there. Entering above the
    first layers leaves the position untouched on which language models park idle attention (as
    LLaMA-Adapter, Zhang et al. 2023).
    """

    num_soft_tokens = 0

    def __init__(
        self, options: DeepPrefixOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        super().__init__()
        layer = options.enter_at_layer
        self.first_layer = entered_layer(text.num_layers // 3 if layer is None else layer, text)
        width = options.width or text.width
        layers = text.num_layers - self.first_layer
        self.shape = (layers, 2, text.num_key_value_heads, text.head_dim)
        self.resampler = Resampler(options, vision_dim, width, num_image_tokens)
        self.output_norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, layers * 2 * text.num_key_value_heads * text.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
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

    def image_attention(
        self, features_bnd: torch.Tensor, attention_btp: torch.Tensor
    ) -> torch.Tensor:
        """Roll attention out in two steps: text to prefix keys, their queries to image tokens."""
        return attention_btp @ self.resampler.image_attention(features_bnd)


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
        has_positions = options.position_embeddings
        self.positions = (
            nn.Parameter(torch.empty(num_image_tokens, width)) if has_positions else None
        )
        self.layers = nn.ModuleList(ResamplerLayer(options, width) for _ in range(options.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Near the size of the normalized image tokens: attention tells them apart at once.
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
        """Return the share [B, P, N] of each image token in each query (Abnar & Zuidema 2020).

        Half of a layer's output counts as its attention and half as its input, because of the
        residual connection. Rows sum to less than one: the rest is in the learned queries.
        """
        image_bnw = self._image_tokens(features_bnd)
        x_bpw = self.queries.expand(len(features_bnd), -1, -1)
        sizes = (x_bpw.shape[1], image_bnw.shape[1])
        share_bpn = x_bpw.new_zeros(len(x_bpw), *sizes)
        for layer in self.layers:
            weights = layer.attention_weights(x_bpw, image_bnw)  # type: ignore[reportCallIssue]
            to_queries_bpp, to_image_bpn = weights.split(sizes, dim=-1)
            share_bpn = (share_bpn + to_queries_bpp @ share_bpn + to_image_bpn) / 2
            x_bpw = layer(x_bpw, image_bnw)
        return share_bpn

    def _image_tokens(self, features_bnd: torch.Tensor) -> torch.Tensor:
        image_bnw = self.vision_norm(self.vision_projection(features_bnd))
        if self.positions is not None:
            image_bnw = image_bnw + self.positions
        return F.dropout(image_bnw, self.dropout, self.training)


class ResamplerLayer(nn.Module):
    """Pre-norm attention of queries [B, P, W] over [queries; image tokens], then feed-forward."""

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
        """Return weights [B, P, P + N] over [queries; image tokens], averaged over heads."""
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
