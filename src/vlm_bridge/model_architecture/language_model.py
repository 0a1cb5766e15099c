"""Language models of Hugging Face behind one small adapter: causal, or with cross-attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import (
    ATTENTION,
    edit_embeddings,
    edit_layer_input,
    embedding_scale,
    keep_attached,
)
from vlm_bridge.model_architecture.bridges import TextShape
from vlm_bridge.model_architecture.loss import (
    CHUNK_LOGITS,
    CHUNK_POSITIONS,
    CaptionLoss,
    caption_cross_entropy,
)

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
        self.start_id, self.eos_id = _start_and_end(self.text_config, tokenizer)
        # The recipe has the decode settings; those of a checkpoint are dropped.
        causal_lm.generation_config = GenerationConfig(
            bos_token_id=self.start_id, eos_token_id=self.eos_id, pad_token_id=self.eos_id
        )
        self.attention = attention
        self._attention_names = "{}"  # a format: our own attention functions have longer names
        self._set_attention(attention)
        self._packed_body: Any = causal_lm.base_model.forward
        if (output_layer := causal_lm.get_output_embeddings()) is not None:
            output_layer.register_forward_pre_hook(_contiguous)
        self.is_compiled = False

    @property
    def shape(self) -> TextShape:
        config = self.text_config
        heads, cross_attention_width = config.num_attention_heads, None
        if self.is_blip:
            cross_attention_width = config.encoder_hidden_size
        elif getattr(config, "add_cross_attention", False):
            cross_attention_width = config.hidden_size
        return TextShape(
            self.embed_dim,
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            cross_attention_width,
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def decoder_options(self) -> dict[str, Any]:
        """Options of every call: BLIP's text model masks later tokens only with ``is_decoder``."""
        return {"is_decoder": True} if self.is_blip else {}

    @property
    def head_module(self) -> nn.Module:
        """Module from states to logits; BERT's and BLIP's transform the states first."""
        head = getattr(self.causal_lm, "cls", None)
        return head if head is not None else self.causal_lm.get_output_embeddings()

    @property
    def max_positions(self) -> int | None:
        """Positions that it knows, prompt and soft tokens included; None: no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def embed(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Return token embeddings [B, T, H], as the first layer reads them."""
        return self.causal_lm.get_input_embeddings()(ids_bt)

    def embedding_std(self) -> float:
        """Return the standard deviation of the token embeddings."""
        layer = self.causal_lm.get_input_embeddings()
        return layer.weight.float().std().item() * float(embedding_scale(layer))

    def hidden_states(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """Return the body's last states [B, T, H] before the head.

        Packed rows need ``attention_mask`` (`packed_mask`) and ``position_ids``
        (`packed_positions`).
        """
        body = self._packed_body if "attention_mask" in inputs else self.causal_lm.base_model
        inputs = self.decoder_options | inputs
        return body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., vocabulary] of states [..., H], soft-capped as Gemma 2's are."""
        logits = self.head_module(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cross_entropy(
        self, states_bth: torch.Tensor, labels_bt: torch.Tensor, **options: Any
    ) -> CaptionLoss:
        """Return the loss of last states; options as for `caption_cross_entropy`."""
        head = self.head_module
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        chunk = max(CHUNK_POSITIONS, CHUNK_LOGITS // self.text_config.vocab_size)
        return caption_cross_entropy(
            states_bth, labels_bt, head,
            softcap=self.softcap, trained=trained, chunk_positions=chunk, **options,
        )  # fmt: skip

    def layers(self) -> nn.ModuleList:
        """Return the body's layers. Raises ModelError if they cannot be found."""
        count = self.text_config.num_hidden_layers
        for module in self.causal_lm.base_model.modules():  # outer modules first
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ModelError(
            f"{type(self.causal_lm).__name__} does not show which of its modules are layers: use "
            "bridge.enter_at_layer=0 and gradient_checkpointing=false"
        )

    def entrance(self, layer: int) -> nn.Module:
        """Return the module at which text enters a layer: for layer 0, the token embeddings."""
        return self.layers()[layer] if layer else self.causal_lm.get_input_embeddings()

    def open_layer(self, layer: int) -> None:
        """Let attached images edit the text that enters a layer. Raises ModelError as `layers`."""
        if layer:
            self.entrance(layer).register_forward_pre_hook(edit_layer_input)
        else:
            self.entrance(layer).register_forward_hook(edit_embeddings)

    def checkpoint_activations(self) -> None:
        """Keep only the input of every layer for back-propagation (Chen et al. 2016).

        transformers' own switch works in training mode alone, and frozen layers stay in evaluation
        mode. Raises ModelError as `layers`.
        """
        for layer in self.layers():
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
        self._attention_names = ATTENTION
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
        self.causal_lm.set_attn_implementation(self._attention_names.format(attention))

    def packed_mask(
        self, segments_bt: torch.Tensor, num_soft_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask of packed rows (`causal_block_mask`), by kind of layer where they differ.

        Raises:
            ModelError: a kind of layer mixes the captions of a row whatever the mask.
        """
        kinds = set(getattr(self.text_config, "layer_types", None) or ())
        if foreign := kinds - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"cannot train through {', '.join(sorted(foreign))} layers: choose a language "
                "model whose layers are all full or sliding attention"
            )
        # Without kinds of layers, a window holds for every layer (Mistral, Phi-3).
        window = getattr(self.text_config, "sliding_window", None)
        windows = {"full_attention": None, "sliding_attention": window, "every": window}
        masks = {
            kind: causal_block_mask(segments_bt, num_soft_tokens, self.dtype, windows[kind])
            for kind in kinds or {"every"}
        }
        if "sliding_attention" in kinds:
            return masks
        (mask,) = masks.values()
        return mask

    def encode(self, text: str) -> list[int]:
        """Return token ids of a text, in which control tokens are plain text."""
        return encode_as_text(self.tokenizer, [text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of many texts, many times faster than one by one."""
        return encode_as_text(self.tokenizer, texts)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        # BERT's family puts a space before every punctuation mark.
        has_word_pieces = self.tokenizer.mask_token is not None
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=has_word_pieces
        ).strip()


def _contiguous(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copy a strided slice, such as the last position of each prompt.

    On a CPU, torch 2.13 multiplies one in bfloat16 800 times as slowly: 9 s instead of 11 ms for
    150 rows and 49,152 tokens.
    """
    return (args[0].contiguous(),)


def _start_and_end(text_config: Any, tokenizer: Any) -> tuple[Any, Any]:
    if tokenizer is None:  # on the meta device
        return None, None
    if text_config.model_type == BLIP_TEXT:  # BERT's tokenizer does not know its start token
        return text_config.bos_token_id, text_config.sep_token_id
    eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
    return next((start for start in starts if start is not None), None), eos


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # A compiler traces the recomputation along with the first run: the image is still attached.
    context = {} if torch.compiler.is_compiling() else {"context_fn": keep_attached}
    return checkpoint(forward, *args, use_reentrant=False, **context, **kwargs)


def encode_as_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return token ids of captions or prompts, in which control tokens (``</s>``) are plain text.

    The ids contain no special token but the one for unknown characters.
    """
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False}
    encoded = tokenizer(texts, split_special_tokens=True, **options)["input_ids"]
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    # GPT-2 names one token for everything: end and start of a text, and unknown characters.
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        control.discard(tokenizer.unk_token_id)
    # Some vocabularies (Unigram) hold control tokens as ordinary pieces.
    return [[token for token in ids if token not in control] for ids in encoded]


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
    segments = F.pad(segments_bt, (num_soft_tokens, 0), value=-1)
    index = torch.arange(segments.shape[1], device=segments.device)
    queries, keys = segments[:, :, None], segments[:, None, :]
    allowed = (queries == keys) & (queries != 0) | (queries > 0) & (keys == -1)
    allowed = (allowed | (index[:, None] == index)) & (index[:, None] >= index)
    if window is not None:
        positions = packed_positions(segments_bt, num_soft_tokens)
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    mask = torch.full(allowed.shape, -math.inf, dtype=dtype, device=segments.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


def packed_positions(segments_bt: torch.Tensor, num_soft_tokens: int) -> torch.Tensor:
    """Return position ids [B, P+T]: each caption starts at P, as if alone; pads are at P."""
    same = segments_bt[:, :, None] == segments_bt[:, None, :]
    in_caption = (same.tril().sum(-1) - 1).masked_fill(segments_bt == 0, 0)
    soft = torch.arange(num_soft_tokens, device=segments_bt.device)
    return torch.cat((soft.expand(len(segments_bt), -1), num_soft_tokens + in_caption), dim=1)
