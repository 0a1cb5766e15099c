"""Self-attention of a frozen language model over [keys and values made from an image; the text's own].

The prefix travels to every layer as a keyword argument and is put before the text inside transformers' attention
interface: no layer is patched, the KV cache holds text alone, and text positions are those of plain text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "vlm_bridge_{}"
"""Name under which a base implementation (`eager` or `sdpa`) with a prefix is known to transformers."""


@dataclass
class KeyValuePrefix:
    """Keys and values [B, layers, 2, heads, P, head_dim] for the layers from ``first_layer`` on.

    Keys carry no rotary embedding: an image stands nowhere in the text.
    """

    states: torch.Tensor
    first_layer: int
    layers_that_read: set[int] = field(default_factory=set)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [B, heads, P, head_dim] of a layer, or None below the first."""
        self.layers_that_read.add(layer)
        if layer < self.first_layer:
            return None
        keys, values = self.states[:, layer - self.first_layer].unbind(1)
        return keys, values


def _with_prefix(
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: KeyValuePrefix | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values [B, heads, P + S, head_dim] and the mask that lets every token see the prefix."""
    states = prefix.of_layer(layer) if prefix is not None else None
    if states is None:
        return key, value, mask
    keys, values = (state.to(key.dtype) for state in states)
    if mask is not None:
        mask = F.pad(mask, (keys.shape[2], 0), value=0.0)
    return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2), mask


def eager_prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    image_prefix: KeyValuePrefix | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, T, heads, head_dim] by plain matrix products; query heads that share a key are one product."""
    key, value, mask = _with_prefix(module.layer_idx, key, value, attention_mask, image_prefix)
    batch, heads, length, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = grouped @ key.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(batch, heads, length, -1)
    if mask is not None:
        scores = scores + mask[..., : scores.shape[-1]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    attended = weights.view(batch, key.shape[1], -1, weights.shape[-1]) @ value
    return attended.view(batch, heads, length, -1).transpose(1, 2).contiguous(), weights


def sdpa_prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    image_prefix: KeyValuePrefix | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same by `scaled_dot_product_attention`."""
    key, value, mask = _with_prefix(module.layer_idx, key, value, attention_mask, image_prefix)
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, dropout if module.training else 0.0, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


# The additive mask, always made: without one, `sdpa` would take the prefix for text that only late tokens may see.
for _base, _function in {"eager": eager_prefix_attention, "sdpa": sdpa_prefix_attention}.items():
    AttentionInterface.register(ATTENTION.format(_base), _function)
    AttentionMaskInterface.register(ATTENTION.format(_base), eager_mask)
