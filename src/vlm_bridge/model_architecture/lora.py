"""LoRA adapters in a frozen language model, by peft."""

from __future__ import annotations

import warnings
from typing import Any

from vlm_bridge.configuration import LoraOptions
from vlm_bridge.errors import ModelError


def add_lora(causal_lm: Any, options: LoraOptions) -> None:
    """Put float32 adapters, which start as the identity, beside linear layers of a decoder.

    Raises:
        ModelError: peft is missing, or the decoder has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError(
            "language_model.lora needs peft: pip install 'vlm-bridge[lora]'"
        ) from error

    names = list(options.target_modules or ())
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if names == ["all-linear"] else names or None,
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # it corrects its own default for GPT-2
            inject_adapter_in_model(config, causal_lm)
    except ValueError as error:
        raise ModelError(
            f"language_model.lora: {type(causal_lm).__name__} has no layers "
            f"{', '.join(names) or 'that peft would choose'}: give target_modules, ends of the "
            "names of its linear layers, or all-linear"
        ) from error
    for end in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        if any("lora_" in name for name, _ in end.named_parameters()):
            raise ModelError(
                f"language_model.lora: target_modules {', '.join(names)} are embeddings or "
                "the head, which attached images need as they are: choose layers between them"
            )
    for name, parameter in causal_lm.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
