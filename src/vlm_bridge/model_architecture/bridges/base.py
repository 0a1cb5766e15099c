"""What a bridge hands to the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix


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
