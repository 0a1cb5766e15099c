"""What a bridge hands to the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape


@dataclass(frozen=True)
class ImageInputs:
    """What a language model reads of B images beside the text; None where a bridge has none of it.

    Attributes:
        num_images: B.
        soft_tokens: [B, P, H], before the text.
        key_value_prefix: keys and values that its layers attend to beside the text's own.
        encoder_hidden_states: [B, N, W], for the layers of a decoder that cross-attends.
        edit: changes text [B, T, H] as it enters the bridge's first layer, one position at a time.
    """

    num_images: int
    soft_tokens: torch.Tensor | None = None
    key_value_prefix: KeyValuePrefix | None = None
    encoder_hidden_states: torch.Tensor | None = None
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None


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
