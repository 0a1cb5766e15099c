"""Language models behind one small adapter: Hugging Face causal models, decoders that cross-attend, GGUF files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import ATTENTION, install_hook, states_entering
from vlm_bridge.model_architecture.body import Body
from vlm_bridge.model_architecture.plain_text import encode_as_text
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
        attention: its attention implementation, as transformers names it.
        body: its layers, as training runs them.
        is_compiled: whether compiled code may run in it; attached images are then kept where that can read them.
    """

    def __init__(
        self,
        causal_lm: Any,
        tokenizer: Any,
        fresh_parameters: frozenset[str] = frozenset(),
        attention: str = "eager",
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.text_config: Any = causal_lm.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.fresh_parameters = fresh_parameters
        self.embed_dim: int = causal_lm.get_input_embeddings().weight.shape[1]
        self.final_logit_softcap: float | None = getattr(
            causal_lm.config, "final_logit_softcapping", None
        )
        self.is_blip = causal_lm.config.model_type == BLIP_TEXT
        self.eos_id: Any
        self.start_id: Any
        self.eos_id, self.start_id = self._ends(tokenizer) if tokenizer else (None, None)
        # The recipe has the decode settings; those of a checkpoint are dropped.
        causal_lm.generation_config = GenerationConfig(
            bos_token_id=self.start_id, eos_token_id=self.eos_id, pad_token_id=self.eos_id
        )
        self.attention = attention
        self._reads_prefix = False
        self._set_attention(attention)
        self._open_layers: set[int] = set()
        self.body = Body(causal_lm)
        self.is_compiled = False

    def _ends(self, tokenizer: Any) -> tuple[int | None, int | None]:
        if self.is_blip:  # its tokenizer is BERT's, which does not know the decoder's start token
            return self.text_config.sep_token_id, self.text_config.bos_token_id
        eos = (
            tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        )
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
        return eos, next((start for start in starts if start is not None), None)

    @property
    def shape(self) -> TextShape:
        return TextShape.of(self.text_config, self.embed_dim)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def decoder_options(self) -> dict[str, Any]:
        """Options of every call: BLIP's text model masks later tokens only with ``is_decoder``."""
        return {"is_decoder": True} if self.is_blip else {}

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
        """Token embeddings [B, T, H], as the first layer reads them."""
        return self.causal_lm.get_input_embeddings()(ids_bt)

    def token_vectors(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, H] before the model scales them: rows of its matrix."""
        return F.embedding(ids_bt, self.causal_lm.get_input_embeddings().weight)

    @property
    def embedding_scale(self) -> torch.Tensor | float:
        """What the embedding layer multiplies rows of its matrix by: sqrt(H) in Gemma's families, else mostly 1."""
        layer = self.causal_lm.get_input_embeddings()
        scale = getattr(layer, "embed_scale", 1.0)
        return scale.to(layer.weight.dtype) if isinstance(scale, torch.Tensor) else scale

    @torch.no_grad()
    def check_embedding_scale(self) -> None:
        """Raise ModelError if the embedding layer does more to rows of its matrix than to scale them."""
        ids = torch.arange(
            min(4, self.vocab_size), device=self.causal_lm.get_input_embeddings().weight.device
        )
        if ids.is_meta or torch.allclose(
            self.embed(ids), self.token_vectors(ids) * self.embedding_scale
        ):
            return
        raise ModelError(
            f"{type(self.causal_lm.get_input_embeddings()).__name__} is no scaled matrix: its embeddings cannot be "
            "changed before they are scaled; use bridge.enter_at_layer=1"
        )

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        from_layer: int = 0,
        **inputs: Any,
    ) -> torch.Tensor:
        """The body's last states [B, T, H] before the head.

        Args:
            attention_mask: None (plain causal) or what `packed_mask` makes.
            from_layer: the layers below do not run; only where text that enters it is attached.
            inputs: what else the body takes, such as ``inputs_embeds`` instead of ``input_ids``.
        """
        return self.body.variant(from_layer, is_packed=attention_mask is not None)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **(self.decoder_options | inputs),
        ).last_hidden_state

    def open_layer(self, layer: int) -> None:
        """Let images be attached where text enters a layer (`attach`).

        Raises:
            ModelError: the model does not say which of its modules are layers.
        """
        if layer not in self._open_layers:
            module = self.body.layers()[layer] if layer else self.causal_lm.get_input_embeddings()
            install_hook(self, layer, module)
            self._open_layers.add(layer)

    @torch.no_grad()
    def states_entering(
        self,
        layer: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states [B, T, H] that enter a layer that was opened (`open_layer`); it does not run, nor those above."""

        def run() -> None:
            self.causal_lm.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **self.decoder_options,
            )

        return states_entering(self, layer, run).view(*input_ids.shape, -1)

    def new_cache(self) -> dict[str, Any]:
        """Arguments of `generate` with the empty cache of a decoder that cross-attends; none for other decoders.

        It also keeps the image's keys and values, and transformers does not make one for every family.
        """
        if self.shape.cross_attention_width is None:
            return {}
        config = self.text_config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        takes = inspect.signature(self.causal_lm.forward).parameters
        return {
            "cache" if "cache" in takes else "past_key_values": cache
        }  # its name since 5.24, and before

    def accept_prefix(self) -> None:
        """Switch to the attention that reads a `KeyValuePrefix`, of the same kind as now (`eager` or `sdpa`)."""
        if self.attention not in ("eager", "sdpa"):
            raise ModelError(
                f"bridge.kind=deep_prefix works with language_model.attention=eager or sdpa, not {self.attention}"
            )
        self._reads_prefix = True
        self._set_attention(self.attention)

    @contextmanager
    def use_attention(self, attention: str) -> Iterator[None]:
        """Use another attention implementation within a block; only `eager` can return its weights."""
        self._set_attention(attention)
        try:
            yield
        finally:
            self._set_attention(self.attention)

    def _set_attention(self, attention: str) -> None:
        self.causal_lm.set_attn_implementation(
            ATTENTION.format(attention) if self._reads_prefix else attention
        )

    def compile_body(self) -> None:
        """Compile the body for packed rows: those of training and validation; generation runs as before.

        Lengths are symbols of the compiled code, so that no batch compiles it anew. Weights keep their names.
        """
        self.body.compiles = self.is_compiled = True

    def checkpoint_activations(self) -> None:
        """Keep only the input of every layer for back-propagation, and compute the layer again when it is needed.

        About a third more time for a fraction of the memory (Chen et al. 2016); the same loss and gradients.
        transformers' own switch works in training mode alone, and frozen layers stay in evaluation mode.

        Raises:
            ModelError: the model does not say which of its modules are layers.
        """
        self.body.layers(remedy="gradient_checkpointing=false")
        self.body.checkpoints = True

    def packed_mask(
        self, segments_bt: torch.Tensor, num_soft_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask of packed rows (`causal_block_mask`), by kind of layer where a model mixes kinds.

        transformers applies no sliding window to a mask that it is given: packed rows must carry it, or a
        caption would see further back in training than in generation.

        Raises:
            ModelError: a kind of layer that no mask can keep from mixing the captions of a row.
        """
        window: int | None = getattr(self.text_config, "sliding_window", None)
        kinds = set(getattr(self.text_config, "layer_types", None) or ())
        if foreign := kinds - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"cannot train through {', '.join(sorted(foreign))} layers: choose a language model whose layers "
                "are all full or sliding attention"
            )
        if "sliding_attention" not in kinds:
            # Without layer kinds, a window holds for every layer (Mistral, Phi-3).
            return causal_block_mask(
                segments_bt, num_soft_tokens, self.dtype, window=None if kinds else window
            )
        windows = {"full_attention": None, "sliding_attention": window}
        return {
            kind: causal_block_mask(segments_bt, num_soft_tokens, self.dtype, window=windows[kind])
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
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of each text, without any special token, also where a text spells one."""
        return encode_as_text(self.tokenizer, texts)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; word pieces are joined as English is written."""
        is_word_piece = (
            self.tokenizer.mask_token is not None
        )  # BERT's family puts a space before every mark
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=is_word_piece
        ).strip()

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: the size of input the frozen layers are used to."""
        weight = self.causal_lm.get_input_embeddings().weight
        return weight.float().std().item() * float(self.embedding_scale)


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
    allowed &= (segments != 0)[:, None, :] | torch.eye(
        total, dtype=torch.bool, device=segments.device
    )
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
