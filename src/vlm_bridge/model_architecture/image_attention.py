"""Where in the image each text position looks, read off the attention of bridge and language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.bridges import Bridge, ImageInputs
from vlm_bridge.model_architecture.captioner import CaptionerModel
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.prefix_attention import ATTENTION


@torch.inference_mode()
def image_attention(
    model: CaptionerModel, features_bnd: torch.Tensor, input_ids_bt: torch.Tensor
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
    state = model.image_state(features_bnd)
    with _recorded_attention(model.language_model) as outputs:
        model.text_states(input_ids_bt, state)
    attention_btp = _attention_to(bridge.image_inputs(state), outputs[-1], input_ids_bt.shape[1])
    features_bnd = model.bridge_features(features_bnd)
    text_bth = model.text_at_bridge(input_ids_bt).to(features_bnd.dtype)
    if attention_btp is not None:
        attention_btp = attention_btp.to(features_bnd.dtype)
    return bridge.image_attention(features_bnd, text_bth, attention_btp).float()


@contextmanager
def _recorded_attention(language_model: LanguageModel) -> Iterator[list[Any]]:
    """Within the block, append to the list what each pass of the body returns, attention weights included.

    Only `eager` attention has weights to return: another implementation is switched to it, and back afterwards.
    """
    causal_lm, outputs = language_model.causal_lm, []
    usual = causal_lm.config._attn_implementation
    eager = ATTENTION.format("eager") if usual == ATTENTION.format("sdpa") else "eager"
    switch = usual not in ("eager", ATTENTION.format("eager"))
    body = causal_lm.base_model
    hooks = (
        body.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "output_attentions": True}), with_kwargs=True
        ),
        body.register_forward_hook(lambda _module, _args, output: outputs.append(output)),
    )
    try:
        if switch:
            causal_lm.set_attn_implementation(eager)
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
        if switch:
            causal_lm.set_attn_implementation(usual)


def _attention_to(of_image: ImageInputs, output: Any, length: int) -> torch.Tensor | None:
    """Mean attention [B, T, P] of the last T = ``length`` positions to what the bridge handed over; None if nothing."""
    if of_image.encoder_hidden_states is not None:
        layers, columns = output.cross_attentions, slice(None)
    elif of_image.soft_tokens is not None:
        # The start token stands before the soft tokens.
        layers, columns = output.attentions, slice(1, 1 + of_image.soft_tokens.shape[1])
    elif (prefix := of_image.key_value_prefix) is not None:
        layers, columns = (output.attentions or ())[prefix.first_layer :], slice(prefix.states.shape[4])
    else:
        return None
    if not layers:
        raise ModelError(
            "the language model does not return its attention weights: its captions cannot be explained"
        )
    return torch.stack([layer[:, :, -length:, columns].float().mean(1) for layer in layers]).mean(0)
