"""Where in the image each text position looks, read off the attention of bridge and language model."""

from __future__ import annotations

from typing import Any

import torch

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import Bridge, ImageInputs
from vlm_bridge.model_architecture.captioner import CaptionModel


@torch.inference_mode()
def image_attention(
    model: CaptionModel, features_bnd: torch.Tensor, input_ids_bt: torch.Tensor
) -> torch.Tensor:
    """How the look of each text position at the image spreads over the image tokens: float32 [B, T, N], not normalised.

    Row t belongs to the position that reads token t and predicts token t + 1. Heads and layers count alike; attention
    to the text, and to the start token on which language models park what they do not need, is left out.

    Args:
        features_bnd: as the vision encoder gives them.
        input_ids_bt: rows of one caption without pads.

    Raises:
        ModelError: the language model does not return its attention weights.
    """
    bridge: Bridge = model.bridge  # type: ignore[assignment]
    language_model, image = model.language_model, model.image_inputs(features_bnd)
    body = language_model.causal_lm.base_model
    with (
        language_model.use_attention("eager"),
        attach(language_model, image, bridge.first_layer) as attached,
    ):
        output = body(**attached.inputs(input_ids_bt), output_attentions=True, use_cache=False)
    attention_btp = _attention_to(image, output, input_ids_bt.shape[1])
    features_bnd = model.bridge_features(features_bnd)
    text_bth = model.text_at_bridge(input_ids_bt).to(features_bnd.dtype)
    if attention_btp is not None:
        attention_btp = attention_btp.to(features_bnd.dtype)
    return bridge.image_attention(features_bnd, text_bth, attention_btp).float()


def _attention_to(of_image: ImageInputs, output: Any, length: int) -> torch.Tensor | None:
    """Mean attention [B, T, P] of the last T = ``length`` positions to what the bridge handed over; None if nothing."""
    if of_image.encoder_hidden_states is not None:
        layers, columns = output.cross_attentions, slice(None)
    elif of_image.soft_tokens is not None:
        # The start token stands before the soft tokens.
        layers, columns = output.attentions, slice(1, 1 + of_image.soft_tokens.shape[1])
    elif (prefix := of_image.key_value_prefix) is not None:
        layers, columns = (
            (output.attentions or ())[prefix.first_layer :],
            slice(prefix.states.shape[4]),
        )
    else:
        return None
    if not layers:
        raise ModelError(
            "the language model does not return its attention weights: its captions cannot be explained"
        )
    return torch.stack([layer[:, :, -length:, columns].float().mean(1) for layer in layers]).mean(0)
