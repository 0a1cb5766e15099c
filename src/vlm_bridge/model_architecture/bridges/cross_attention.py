"""The published single-block cross-attention bridge: each text position looks once at the image."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import CrossAttentionOptions
from vlm_bridge.model_architecture.bridges.base import (
    ImageInputs,
    TextShape,
    entered_layer,
    mean_attention_weights,
)


class CrossAttentionBridge(nn.Module):
    """``x + attention(norm(x), image)``, then ``x + feed_forward(norm(x))``, on text x.

    At layer 0, x are rows of the embedding matrix, before a model such as Gemma scales them.
    Dropout is as published: of attention weights, after GELU and after the feed-forward network.
    Both residual branches end in layers that start at zero: an untrained bridge is the identity.
    With D=1024 and H=2304 it has 66,092,544 parameters.
    """

    num_soft_tokens = 0

    def __init__(
        self,
        options: CrossAttentionOptions,
        vision_dim: int,
        text: TextShape,
        num_image_tokens: int,
    ):
        super().__init__()
        text_dim = text.width
        if text_dim % options.num_heads:
            raise ValueError(
                f"bridge.num_heads={options.num_heads} does not divide the text width {text_dim}"
            )
        self.first_layer = entered_layer(options.enter_at_layer, text)
        self.num_heads = options.num_heads
        self.dropout = options.dropout
        self.vision_projection = nn.Linear(vision_dim, text_dim)
        self.attention_norm = nn.LayerNorm(text_dim)
        self.query = nn.Linear(text_dim, text_dim)
        self.key = nn.Linear(text_dim, text_dim)
        self.value = nn.Linear(text_dim, text_dim)
        self.attention_output = nn.Linear(text_dim, text_dim)
        self.feed_forward_norm = nn.LayerNorm(text_dim)
        hidden = options.feed_forward_multiplier * text_dim
        self.feed_forward_in = nn.Linear(text_dim, hidden)
        self.feed_forward_out = nn.Linear(hidden, text_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.attention_output, self.feed_forward_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return an edit of the text that attends to features [B, N, D]."""
        edit = partial(self._edit, *self._keys_values(features_bnd))
        return ImageInputs(len(features_bnd), edit=edit, edit_layer=self.first_layer)

    def _keys_values(self, features_bnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B, heads, N, head_dim]."""
        projected_bnh = self.vision_projection(features_bnd)
        return self._heads(self.key(projected_bnh)), self._heads(self.value(projected_bnh))

    def _edit(
        self, keys_bhnd: torch.Tensor, values_bhnd: torch.Tensor, text_bth: torch.Tensor
    ) -> torch.Tensor:
        """Return text [B, T, H] with what each position saw, in the bridge's precision."""
        text_bth = text_bth.to(self.query.weight.dtype)
        attended_bhtd = F.scaled_dot_product_attention(
            self._heads(self.query(self.attention_norm(text_bth))),
            keys_bhnd,
            values_bhnd,
            dropout_p=self.dropout if self.training else 0.0,
        )
        text_bth = text_bth + self.attention_output(attended_bhtd.transpose(1, 2).flatten(2))
        hidden = self._drop(F.gelu(self.feed_forward_in(self.feed_forward_norm(text_bth))))
        return text_bth + self._drop(self.feed_forward_out(hidden))

    def image_attention(self, features_bnd: torch.Tensor, text_bth: torch.Tensor) -> torch.Tensor:
        """Return its own attention weights [B, T, N], averaged over heads."""
        query_bhtd = self._heads(self.query(self.attention_norm(text_bth)))
        return mean_attention_weights(query_bhtd, self._keys_values(features_bnd)[0])

    def _heads(self, x_bth: torch.Tensor) -> torch.Tensor:
        return x_bth.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)
