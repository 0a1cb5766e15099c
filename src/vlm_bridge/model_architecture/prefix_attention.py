"""Self-attention of a frozen language model over [keys and values made from an image; the text's own].

Written for transformers' attention interface (`attach` registers it): no layer is patched, the KV cache holds text
alone, and text positions are those of plain text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F


@dataclass
class KeyValuePrefix:
    """Keys and values [B, layers, 2, heads, P, head_dim] of B images for the layers from ``first_layer`` on.

    Keys carry no rotary embedding: an image stands nowhere in the text. Text may have more rows than there are images,
    as many for each: the beams of an image stand next to each other and share what it gave.
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


def _of_module(
    module: Any, prefix: KeyValuePrefix | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prefix's keys and values [B, heads, P, head_dim] for an attention module, in the text's precision."""
    states = prefix.of_layer(module.layer_idx) if prefix is not None else None
    return None if states is None else (states[0].to(dtype), states[1].to(dtype))


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
    """Attention [B, T, heads, head_dim] by plain matrix products; query heads that share a key are one product.

    So are the beams of an image with the keys of its prefix: scores of prefix and text are put together, of which a
    decode step has far fewer than keys.
    """
    batch, heads, length, head_dim = query.shape
    of_image = _of_module(module, image_prefix, key.dtype)
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scores = _scores(grouped, key, scale, softcap).view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask[..., : scores.shape[-1]])
    if of_image is not None:
        on_image = _scores(_per_image(grouped, len(of_image[0])), of_image[0], scale, softcap)
        scores = torch.cat(
            (_per_row(on_image, batch).reshape(batch, heads, length, -1), scores), dim=-1
        )
    weights = scores.softmax(dim=-1)  # computed in float32, whatever it is stored in
    weights = F.dropout(weights, dropout, module.training)
    grouped_weights = weights.view(batch, key.shape[1], -1, weights.shape[-1])
    if of_image is not None:
        # One product over all values: two would be rounded one by one, and bfloat16 captions change with that.
        value = torch.cat((_for_rows(of_image[1], batch), value), dim=2)
    attended = grouped_weights @ value
    return attended.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), weights


def _scores(
    query_bhgd: torch.Tensor, key_bhkd: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Attention scores [B, heads, G, K] before any mask."""
    if (
        math.frexp(scale)[0] == 0.5
    ):  # a power of two rounds nothing, and there are fewer queries than scores
        scores = (query_bhgd * scale) @ key_bhkd.transpose(2, 3)
    else:
        scores = query_bhgd @ key_bhkd.transpose(2, 3) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _per_image(x_rhgd: torch.Tensor, num_images: int) -> torch.Tensor:
    """[rows, heads, G, D] as [images, heads, rows/images x G, D]; a view where an image has one row."""
    return x_rhgd.unflatten(0, (num_images, -1)).transpose(1, 2).flatten(2, 3)


def _per_row(x_bhgd: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The inverse of `_per_image`."""
    return x_bhgd.unflatten(2, (num_rows // len(x_bhgd), -1)).transpose(1, 2).flatten(0, 1)


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
    if (of_image := _of_module(module, image_prefix, key.dtype)) is not None:
        key, value = (
            torch.cat((_for_rows(states, len(text)), text), dim=2)
            for states, text in zip(of_image, (key, value), strict=True)
        )
        if attention_mask is not None:  # every token sees the prefix
            attention_mask = F.pad(attention_mask, (of_image[0].shape[2], 0), value=0.0)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout if module.training else 0.0,
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None


def _for_rows(states_bhpd: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each image's states once per row that reads it; themselves where an image has one row."""
    beams = num_rows // len(states_bhpd)
    return states_bhpd if beams == 1 else states_bhpd.repeat_interleave(beams, dim=0)
