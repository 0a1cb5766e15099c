"""Language models of Hugging Face behind one small adapter: causal, or with cross-attention."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import ATTENTION, install_hook, keep_attached
from vlm_bridge.model_architecture.bridges.base import TextShape

BLIP_TEXT = "blip_text_model"  # transformers' model_type of BLIP's text decoder


class LanguageModel(nn.Module):
    """A transformers decoder, split where the captioner needs it: embed | body | head.

    Attributes:
        start_id: first input token of every caption: BLIP's [DEC]; BOS, or BERT's [CLS]; EOS for
            models without either, as GPT-2 uses it.
        eos_id: the token that ends a caption (EOS, or BERT's [SEP]); a pad is often the same.
        fresh_parameters: names of parameters that no checkpoint held.
        is_compiled: whether compiled code may run in it (see `attach`).
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
        self.softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.is_blip = self.text_config.model_type == BLIP_TEXT
        self.eos_id: Any
        self.start_id: Any
        self.eos_id, self.start_id = _ends(self.text_config, tokenizer)
        # The recipe has the decode settings; those of a checkpoint are dropped.
        causal_lm.generation_config = GenerationConfig(
            bos_token_id=self.start_id, eos_token_id=self.eos_id, pad_token_id=self.eos_id
        )
        self.attention = attention
        self._reads_prefix = False
        self._set_attention(attention)
        self._open_layers: set[int] = set()
        self._packed_body: Any = causal_lm.base_model.forward
        self.is_compiled = False

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
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def head_module(self) -> nn.Module:
        """Module from states to logits; BERT's and BLIP's transform the states first."""
        head = getattr(self.causal_lm, "cls", None)
        return head if head is not None else self.causal_lm.get_output_embeddings()

    @property
    def max_positions(self) -> int | None:
        """Positions that it knows, prompt and soft tokens included; None: no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_input_embeddings().weight.shape[0]

    def embed(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Return token embeddings [B, T, H], as the first layer reads them."""
        return self.causal_lm.get_input_embeddings()(ids_bt)

    def token_vectors(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Return rows [B, T, H] of the embedding matrix, before the model scales them."""
        return F.embedding(ids_bt, self.causal_lm.get_input_embeddings().weight)

    @property
    def embedding_scale(self) -> torch.Tensor | float:
        """Factor of the embedding layer: sqrt(H) in Gemma's families, else mostly 1."""
        layer = self.causal_lm.get_input_embeddings()
        scale = getattr(layer, "embed_scale", 1.0)
        return scale.to(layer.weight.dtype) if isinstance(scale, torch.Tensor) else scale

    def embedding_std(self) -> float:
        """Return the standard deviation of the token embeddings."""
        weight = self.causal_lm.get_input_embeddings().weight
        return weight.float().std().item() * float(self.embedding_scale)

    @torch.no_grad()
    def check_embedding_scale(self) -> None:
        """Raise ModelError if the embedding layer does more to its rows than to scale them."""
        layer = self.causal_lm.get_input_embeddings()
        ids = torch.arange(min(4, len(layer.weight)), device=layer.weight.device)
        scaled = self.token_vectors(ids) * self.embedding_scale
        if not ids.is_meta and not torch.allclose(self.embed(ids), scaled):
            raise ModelError(
                f"{type(layer).__name__} is no scaled matrix: its embeddings cannot be changed "
                "before they are scaled; use bridge.enter_at_layer=1"
            )

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the body's last states [B, T, H] before the head.

        Args:
            attention_mask: None (plain causal) or of `packed_mask`.
            inputs: further arguments of the body, such as ``inputs_embeds``.
        """
        is_packed = attention_mask is not None
        body = self._packed_body if is_packed else self.causal_lm.base_model
        return body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **(self.decoder_options | inputs),
        ).last_hidden_state

    def layers(self, remedy: str) -> nn.ModuleList:
        """Return the body's layers.

        Raises:
            ModelError: the model does not show which of its modules are layers; ``remedy`` needs
                none.
        """
        count = self.text_config.num_hidden_layers
        for module in self.causal_lm.base_model.modules():  # outer modules first
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ModelError(
            f"{type(self.causal_lm).__name__} does not show which of its modules are layers: use "
            f"{remedy}"
        )

    def open_layer(self, layer: int) -> None:
        """Let attached images edit the text that enters a layer. Raises ModelError as `layers`."""
        if layer in self._open_layers:
            return
        module = self.causal_lm.get_input_embeddings()
        if layer:
            module = self.layers("bridge.enter_at_layer=0")[layer]
        install_hook(self, layer, module)
        self._open_layers.add(layer)

    def checkpoint_activations(self) -> None:
        """Keep only the input of every layer for back-propagation, and compute the layer again.

        About a third more time for a fraction of the memory (Chen et al. 2016). transformers' own
        switch works in training mode alone, and frozen layers stay in evaluation mode.

        Raises:
            ModelError: as `layers`.
        """
        for layer in self.layers("gradient_checkpointing=false"):
            layer.forward = partial(_checkpointed, layer.forward)

    def compile_body(self) -> None:
        """Compile the body for packed rows, of any length; generation runs as before."""
        self._packed_body = torch.compile(self.causal_lm.base_model.forward, dynamic=True)
        self.is_compiled = True

    def accept_prefix(self) -> None:
        """Switch to the attention of the same kind (`eager` or `sdpa`) that reads prefixes."""
        if self.attention not in ("eager", "sdpa"):
            raise ModelError(
                "bridge.kind=deep_prefix works with language_model.attention=eager or sdpa, not "
                f"{self.attention}"
            )
        self._reads_prefix = True
        self._set_attention(self.attention)

    @contextmanager
    def use_attention(self, attention: str) -> Iterator[None]:
        """Use another attention within a block; only `eager` can return its weights."""
        self._set_attention(attention)
        try:
            yield
        finally:
            self._set_attention(self.attention)

    def _set_attention(self, attention: str) -> None:
        name = ATTENTION.format(attention) if self._reads_prefix else attention
        self.causal_lm.set_attn_implementation(name)

    def packed_mask(
        self, segments_bt: torch.Tensor, num_soft_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask of packed rows (`causal_block_mask`), by kind of layer where they differ.

        transformers applies no sliding window to a mask that it is given.

        Raises:
            ModelError: no mask can keep a kind of layer from mixing the captions of a row.
        """
        window: int | None = getattr(self.text_config, "sliding_window", None)
        kinds = set(getattr(self.text_config, "layer_types", None) or ())
        if foreign := kinds - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"cannot train through {', '.join(sorted(foreign))} layers: choose a language "
                "model whose layers are all full or sliding attention"
            )
        make_mask = partial(causal_block_mask, segments_bt, num_soft_tokens, self.dtype)
        if "sliding_attention" not in kinds:
            # Without layer kinds, a window holds for every layer (Mistral, Phi-3).
            return make_mask(window=None if kinds else window)
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: make_mask(window=windows[kind]) for kind in kinds}

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., vocabulary] of states [..., H], soft-capped as Gemma 2's are."""
        logits = self.head_module(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def encode(self, text: str) -> list[int]:
        """Return token ids of a text, as `encode_all`."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of texts, without any special token, also where one spells it."""
        return encode_as_text(self.tokenizer, texts)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        # BERT's family puts a space before every punctuation mark.
        has_word_pieces = self.tokenizer.mask_token is not None
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=has_word_pieces
        ).strip()


def _ends(text_config: Any, tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the tokens that end and start a caption."""
    if tokenizer is None:
        return None, None
    if text_config.model_type == BLIP_TEXT:  # BERT's tokenizer does not know its start token
        return text_config.sep_token_id, text_config.bos_token_id
    eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
    return eos, next((start for start in starts if start is not None), None)


def cross_attention_cache(model: LanguageModel) -> dict[str, Any]:
    """Return arguments of `generate` with the empty cache of a decoder that cross-attends.

    It also keeps the image's keys and values; transformers does not make one for every family.
    """
    if model.shape.cross_attention_width is None:
        return {}
    config = model.text_config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    takes = inspect.signature(model.causal_lm.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}  # since 5.24, and before


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # A compiler traces the recomputation along with the first run: the image is still attached.
    context = {} if torch.compiler.is_compiling() else {"context_fn": keep_attached}
    return checkpoint(forward, *args, use_reentrant=False, **context, **kwargs)


def encode_as_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return token ids of captions or prompts, in which control tokens (``</s>``) are plain text.

    Many texts at once are many times faster than one by one. No special token is among the ids but
    the one for unknown characters.
    """
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False}
    encode = partial(tokenizer, split_special_tokens=True, **options)
    encoded: list[list[int]] = encode(texts)["input_ids"]
    control_ids = _control_ids(tokenizer)
    # Some vocabularies (Unigram) hold control tokens as ordinary pieces: spaces take them apart.
    leaking = [index for index, ids in enumerate(encoded) if not control_ids.isdisjoint(ids)]
    if leaking:
        tokens = tokenizer.convert_ids_to_tokens(sorted(control_ids))
        spelled = re.compile("|".join(map(re.escape, tokens)))
        parted = [spelled.sub(lambda found: " ".join(found[0]), texts[index]) for index in leaking]
        for index, ids in zip(leaking, encode(parted)["input_ids"], strict=True):
            encoded[index] = [token for token in ids if token not in control_ids]
    return encoded


def _control_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens but the one for unknown characters."""
    added = tokenizer.added_tokens_decoder.items()
    control = {token_id for token_id, token in added if token.special}
    control |= set(tokenizer.all_special_ids)
    # GPT-2 names one token for everything: end and start of a text, and unknown characters.
    roles = ("eos_token_id", "bos_token_id", "pad_token_id", "sep_token_id")
    unknown = tokenizer.unk_token_id
    return (
        control if unknown in [getattr(tokenizer, role) for role in roles] else control - {unknown}
    )


def causal_block_mask(
    segments_bt: torch.Tensor, num_soft_tokens: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """Return the additive mask [B, 1, P+T, P+T] of rows of soft tokens and several captions.

    A caption sees the soft tokens and its own past, never another caption. A pad sees itself alone,
    so that no softmax is over nothing.

    Args:
        segments_bt: [B, T], 0 for pads, otherwise the number of the caption a token belongs to.
        num_soft_tokens: P soft tokens before the text; causal among themselves.
        window: a token sees itself and ``window - 1`` positions before it, within its caption.
    """
    batch, length = segments_bt.shape
    total = num_soft_tokens + length
    segments = segments_bt.new_full((batch, total), -1)
    segments[:, num_soft_tokens:] = segments_bt
    allowed = segments[:, :, None] == segments[:, None, :]
    allowed |= (segments > 0)[:, :, None] & (segments == -1)[:, None, :]
    allowed &= torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(total, dtype=torch.bool, device=segments.device)
    allowed &= (segments != 0)[:, None, :] | itself
    if window is not None:
        positions = packed_positions(segments_bt, num_soft_tokens)
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    mask = torch.full((batch, total, total), -math.inf, dtype=dtype, device=segments.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


def packed_positions(segments_bt: torch.Tensor, num_soft_tokens: int) -> torch.Tensor:
    """Return position ids [B, P+T]: every caption starts at P, as if it were alone; pads are at P.

    Counted on, many pads would run past a model's table of positions.
    """
    batch, length = segments_bt.shape
    index = torch.arange(length, device=segments_bt.device).expand(batch, length)
    starts_here = torch.ones_like(segments_bt, dtype=torch.bool)
    starts_here[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
    start = torch.where(starts_here, index, 0).cummax(dim=1).values
    in_caption = torch.where(segments_bt == 0, 0, index - start)
    soft = torch.arange(num_soft_tokens, device=segments_bt.device).expand(batch, num_soft_tokens)
    return torch.cat((soft, num_soft_tokens + in_caption), dim=1)
