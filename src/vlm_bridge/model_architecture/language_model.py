"""Language models behind one small adapter: Hugging Face causal models, decoders that cross-attend, GGUF files."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, EncoderDecoderCache

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.prefix_attention import ATTENTION, KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape

BLIP_TEXT = "blip_text_model"
"""transformers' name of BLIP's text decoder."""


class LanguageModel(nn.Module):
    """A transformers decoder, split where the captioner needs it: embed | body | head.

    Attributes:
        embed_dim: H, the width of its embeddings.
        start_id: first input token of every caption: BLIP's [DEC]; BOS, or BERT's [CLS]; EOS for models without
            either, as GPT-2 uses it.
        eos_id: the token that ends a caption (EOS, or BERT's [SEP]). Pads are never told from token ids: a pad is
            often EOS itself.
        fresh_parameters: names of parameters that no checkpoint held: they know nothing until they are trained.
    """

    def __init__(self, causal_lm: Any, tokenizer: Any, fresh_parameters: frozenset[str] = frozenset()):
        super().__init__()
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.fresh_parameters = fresh_parameters
        self.embed_dim: int = causal_lm.get_input_embeddings().weight.shape[1]
        self.final_logit_softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.is_blip = causal_lm.config.model_type == BLIP_TEXT
        self.eos_id, self.start_id = self._ends(tokenizer) if tokenizer else (None, None)

    def _ends(self, tokenizer: Any) -> tuple[int | None, int | None]:
        if self.is_blip:  # its tokenizer is BERT's, which does not know the decoder's start token
            return self.text_config.sep_token_id, self.text_config.bos_token_id
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
        return eos, next((start for start in starts if start is not None), None)

    @property
    def text_config(self) -> Any:
        return self.causal_lm.config.get_text_config(decoder=True)

    @property
    def shape(self) -> TextShape:
        return TextShape.of(self.text_config, self.embed_dim)

    @property
    def is_trained(self) -> bool:
        """Whether any of its own weights are."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def head_module(self) -> nn.Module:
        """What makes logits of states: BERT's and BLIP's heads transform them first."""
        head = getattr(self.causal_lm, "cls", None)
        return head if head is not None else self.causal_lm.get_output_embeddings()

    @property
    def max_positions(self) -> int | None:
        """How many positions it knows, prompt and soft tokens included; None where its configuration does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

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
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The body's last states [B, T, H] before the head. A given cache is extended in place.

        Args:
            attention_mask: None (plain causal) or what `packed_mask` makes.
            prefix: what the layers attend to beside the text; only after `accept_prefix`.
            encoder_hidden_states: [B, N, W] that a cross-attending decoder reads; W is ``shape.cross_attention_width``.
        """
        of_image: dict[str, Any] = {}
        if prefix is not None:
            of_image["image_prefix"] = prefix
        if encoder_hidden_states is not None:
            of_image["encoder_hidden_states"] = encoder_hidden_states
            if isinstance(
                past_key_values, DynamicCache
            ):  # what `generate` makes unless it is given a `new_cache`
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        if self.is_blip:
            of_image["is_decoder"] = True
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

    def new_cache(self) -> Any:
        """An empty KV cache; a cross-attending decoder's also keeps the image's keys and values, computed once."""
        cache = DynamicCache(config=self.text_config)
        if self.shape.cross_attention_width is None:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=self.text_config))

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
            # Frozen layers draw no random numbers (dropout): there is no state to keep.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=self.is_trained
            )

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
        logits = self.head_module(hidden)
        if self.final_logit_softcap is not None:
            logits = self.final_logit_softcap * torch.tanh(logits / self.final_logit_softcap)
        return logits

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; word pieces are joined as English is written."""
        is_word_piece = self.tokenizer.mask_token is not None  # BERT's family puts a space before every mark
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=is_word_piece
        ).strip()

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: the size of input the frozen layers are used to."""
        return self.causal_lm.get_input_embeddings().weight.float().std().item()


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
    """Position ids [B, P+T]: soft tokens count 0..P-1, and every caption goes on from P as if it were alone.

    Pads are all at P: counted on, many of them would run past the positions of a model that has a table of them.
    """
    batch, length = segments_bt.shape
    index = torch.arange(length, device=segments_bt.device).expand(batch, length)
    starts_here = torch.ones_like(segments_bt, dtype=torch.bool)
    starts_here[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
    start = torch.where(starts_here, index, 0).cummax(dim=1).values
    in_caption = torch.where(segments_bt == 0, 0, index - start)
    soft = torch.arange(num_soft_tokens, device=segments_bt.device).expand(batch, num_soft_tokens)
    return torch.cat((soft, num_soft_tokens + in_caption), dim=1)
