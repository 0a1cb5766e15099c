"""What a bridge hands to the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape


class ImageInputs(NamedTuple):
    """What of an image the language model reads beside the text, each None where a bridge has none.

    Attributes:
        soft_tokens: [B, P, H] that stand before the text.
        key_value_prefix: keys and values that its layers attend to beside the text's own.
        encoder_hidden_states: [B, N, W] that the layers of a cross-attending decoder look at.
    """

    soft_tokens: torch.Tensor | None = None
    key_value_prefix: KeyValuePrefix | None = None
    encoder_hidden_states: torch.Tensor | None = None


def entered_layer(layer: int, text: TextShape) -> int:
    """The layer at which a bridge enters a language model. Raises ValueError where it has no such layer."""
    if layer >= text.num_layers:
        raise ValueError(
            f"bridge.enter_at_layer={layer} is beyond the language model's last layer, {text.num_layers - 1}"
        )
    return layer


def mean_attention_weights(query_bhqd: torch.Tensor, key_bhkd: torch.Tensor) -> torch.Tensor:
    """The weights [B, Q, K] by which `scaled_dot_product_attention` mixes values, averaged over heads."""
    scores_bhqk = query_bhqd @ key_bhkd.transpose(2, 3) * query_bhqd.shape[-1] ** -0.5
    return scores_bhqk.softmax(-1).mean(1)
