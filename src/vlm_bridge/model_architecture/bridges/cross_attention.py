"""The published single-block cross-attention bridge: each text position looks once at the image."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import BridgeOptions
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import (
    Bridge,
    ImageInputs,
    TextShape,
    entered_layer,
    in_heads,
    mean_attention_weights,
)


class CrossAttentionBridge(Bridge):
    """``x + attention(norm(x), image)``, then ``x + feed_forward(norm(x))``, on text x.

    At layer 0, x are rows of the embedding matrix, before a model such as Gemma scales them.
    Dropout is as published: of attention weights, after GELU and after the feed-forward network.
    Both residual branches end in layers that start at zero: an untrained bridge is the identity.
    With D=1024 and H=2304 it has 66,092,544 parameters.
    """

    output = "edit"

    def __init__(
        self, options: BridgeOptions, vision_dim: int, text: TextShape, num_image_tokens: int
    ):
        super().__init__()
        width, hidden = text.width, options.feed_forward_multiplier * text.width
        if width % options.num_heads:
            raise ConfigurationError(
                f"bridge.num_heads={options.num_heads} does not divide the text width {width}"
            )
        self.first_layer = entered_layer(options.enter_at_layer or 0, text)
        self.num_heads, self.dropout = options.num_heads, options.dropout
        self.vision_projection = nn.Linear(vision_dim, width)
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, hidden)
        self.feed_forward_out = nn.Linear(hidden, width)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.attention_output, self.feed_forward_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return an edit of the text that attends to features [B, N, D]."""
        projected_bnh = self.vision_projection(features_bnd)
        keys_bhnd = in_heads(self.key(projected_bnh), self.num_heads)
        values_bhnd = in_heads(self.value(projected_bnh), self.num_heads)
        edit = partial(self._edit, keys_bhnd, values_bhnd)
        return ImageInputs(len(features_bnd), edit=edit, edit_layer=self.first_layer)

    def _edit(
        self, keys_bhnd: torch.Tensor, values_bhnd: torch.Tensor, text_bth: torch.Tensor
    ) -> torch.Tensor:
        """Return text [B, T, H] with what each position saw, in the bridge's precision."""
        text_bth = text_bth.to(self.query.weight.dtype)
        dropout = self.dropout if self.training else 0.0
        attended_bhtd = F.scaled_dot_product_attention(
            self._queries(text_bth), keys_bhnd, values_bhnd, dropout_p=dropout
        )
        text_bth = text_bth + self.attention_output(attended_bhtd.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(text_bth)))
        out_bth = self.feed_forward_out(F.dropout(hidden, dropout))
        return text_bth + F.dropout(out_bth, dropout)

    def image_attention(self, features_bnd: torch.Tensor, seen_bt: torch.Tensor) -> torch.Tensor:
        """Return its own attention weights [B, T, N], averaged over heads."""
        keys_bhnd = in_heads(self.key(self.vision_projection(features_bnd)), self.num_heads)
        return mean_attention_weights(self._queries(seen_bt), keys_bhnd)

    def _queries(self, text_bth: torch.Tensor) -> torch.Tensor:
        return in_heads(self.query(self.attention_norm(text_bth)), self.num_heads)
