"""The one place where an image meets a language model, in training and in generation.

Inside ``with attach(language_model, image) as attached`` the frozen model sees the image, and its
own ``forward`` and ``generate`` are called with ``attached.inputs(ids)``: beams, sampling,
streaming and caches are the library's. Nothing on the model changes. A context variable, of which
each thread has its own, holds the image. Two things that are always there read it: an attention
function registered with transformers, and a hook where text enters the bridge's layer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.bridges.base import ImageInputs

if TYPE_CHECKING:
    from vlm_bridge.model_architecture.language_model import LanguageModel

# Name under which transformers knows an attention function that reads a prefix: eager or sdpa.
ATTENTION = "vlm_bridge_{}"


@dataclass(frozen=True)
class Attached:
    """Images that a language model sees."""

    language_model: LanguageModel
    image: ImageInputs

    def inputs(self, ids_rt: torch.Tensor) -> dict[str, Any]:
        """Return the model's own arguments for text of token ids [R, T].

        R is a multiple of the number of images; rows of an image stand beside each other. The start
        token stands before soft tokens: language models park idle attention on the first position
        ("attention sinks", Xiao et al. 2024), where a frozen one must find the token that it was
        trained with.
        """
        model, image = self.language_model, self.image
        inputs: dict[str, Any] = {"input_ids": ids_rt, **model.decoder_options}
        if image.soft_tokens is not None:
            text_rth = model.embed(ids_rt)
            start = ids_rt.new_full((len(ids_rt), 1), model.start_id)
            soft_rph = _for_rows(image.soft_tokens, len(ids_rt)).to(text_rth.dtype)
            inputs["inputs_embeds"] = torch.cat((model.embed(start), soft_rph, text_rth), dim=1)
            del inputs["input_ids"]
        if image.encoder_hidden_states is not None:
            states = _for_rows(image.encoder_hidden_states, len(ids_rt))
            inputs["encoder_hidden_states"] = states.to(model.dtype)
        return inputs

    def edited(self, text_rth: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return text [R, T, H] as the layer reads it: edited by the bridge, then scaled."""
        assert self.image.edit is not None
        # An edit looks at one position at a time: rows that share an image may stand in one row.
        per_image = text_rth.reshape(self.image.num_images, -1, text_rth.shape[-1])
        # Scaled in the bridge's precision, and rounded once.
        return (self.image.edit(per_image).reshape(text_rth.shape) * scale).to(text_rth.dtype)

    def check_it_was_read(self) -> None:
        """Raise ModelError if a layer has not asked for its part of the prefix."""
        prefix, model = self.image.key_value_prefix, self.language_model
        if prefix is not None and len(prefix.layers_that_read) < model.shape.num_layers:
            raise ModelError(
                f"the attention layers of {type(model.causal_lm).__name__} do not read a key-value "
                "prefix: choose bridge.kind=prefix or cross_attention"
            )


_ATTACHED: ContextVar[Attached | None] = ContextVar("attached", default=None)


@contextmanager
def attach(language_model: LanguageModel, image: ImageInputs) -> Iterator[Attached]:
    """Make a language model see images within a block; blocks nest, threads have their own.

    For an edit, its layer must be open (`LanguageModel.open_layer`).
    """
    attached = Attached(language_model, image)
    with _set(attached), _traced(attached) if language_model.is_compiled else nullcontext():
        yield attached


def keep_attached() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts of a checkpointed layer's first run and of its recomputation.

    Back-propagation recomputes after the block has ended, for CUDA in another thread: the image of
    the first run is captured there. For torch's ``context_fn``.
    """
    return nullcontext(), _set(_ATTACHED.get())


@contextmanager
def _set(attached: Attached | None) -> Iterator[None]:
    token = _ATTACHED.set(attached)
    try:
        yield
    finally:
        _ATTACHED.reset(token)


class _Traced:
    """Attached images for compiled code, which would be compiled anew for each context variable.

    Threads take turns.
    """

    attached: Attached | None = None
    lock = threading.RLock()


@contextmanager
def _traced(attached: Attached) -> Iterator[None]:
    with _Traced.lock:
        before, _Traced.attached = _Traced.attached, attached
        try:
            yield
        finally:
            _Traced.attached = before


def _current() -> Attached | None:
    return _Traced.attached if torch.compiler.is_compiling() else _ATTACHED.get()


def install_hook(language_model: LanguageModel, layer: int, module: nn.Module) -> None:
    """Let text that enters a layer be edited whenever images are attached.

    Args:
        module: the layer; for layer 0 the token embeddings, whose output enters it.
    """
    # Partial functions, not closures: a deep copy of the model then has hooks of its own.
    if layer:
        module.register_forward_pre_hook(partial(_before_layer, language_model, layer))
    else:
        module.register_forward_hook(partial(_after_embeddings, language_model))


def _before_layer(
    language_model: LanguageModel, layer: int, _module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    attached = _editing(language_model, layer)
    return args if attached is None else (attached.edited(args[0]), *args[1:])


def _after_embeddings(
    language_model: LanguageModel,
    _module: nn.Module,
    args: tuple[torch.Tensor],
    text_rth: torch.Tensor,
) -> torch.Tensor:
    attached = _editing(language_model, 0)
    if attached is None:
        return text_rth
    return attached.edited(language_model.token_vectors(*args), language_model.embedding_scale)


def _editing(language_model: LanguageModel, layer: int) -> Attached | None:
    """Return what is attached if it edits the text that enters this layer of this model."""
    attached = _current()
    if attached is None or attached.language_model is not language_model:
        return None
    has_edit = attached.image.edit is not None and attached.image.edit_layer == layer
    return attached if has_edit else None


# Self-attention over [keys and values made from an image; the text's own]. The KV cache holds text
# alone, and text positions are those of plain text.


def _prefix_of(module: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return keys and values [B, heads, P, head_dim] of an attention module, in its precision."""
    attached = _current()
    if attached is None or module.config is not attached.language_model.text_config:
        return None
    prefix = attached.image.key_value_prefix
    states = None if prefix is None else prefix.of_layer(module.layer_idx)
    return None if states is None else (states[0].to(text.dtype), states[1].to(text.dtype))


def eager_prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by plain matrix products; returns [B, T, heads, head_dim] and weights.

    Query heads that share a key are one product, and so are the beams of an image with the keys of
    its prefix.
    """
    batch, heads, length, head_dim = query.shape
    prefix = _prefix_of(module, key)
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scores = _scores(grouped, key, scale, softcap).view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask[..., : scores.shape[-1]])
    if prefix is not None:
        # Queries [rows, heads, G, D] as [images, heads, rows/images x G, D], and scores back.
        per_image = grouped.unflatten(0, (len(prefix[0]), -1)).transpose(1, 2)
        rows = per_image.shape[2:4]
        on_image = _scores(per_image.flatten(2, 3), prefix[0], scale, softcap)
        on_image = on_image.unflatten(2, rows).transpose(1, 2).flatten(0, 1)
        scores = torch.cat((on_image.reshape(batch, heads, length, -1), scores), dim=-1)
    weights = scores.softmax(dim=-1)  # computed in float32, whatever it is stored in
    weights = F.dropout(weights, dropout, module.training)
    grouped_weights = weights.view(batch, key.shape[1], -1, weights.shape[-1])
    if prefix is not None:
        # One product over all values: two would be rounded one by one, and captions change.
        value = torch.cat((_for_rows(prefix[1], batch), value), dim=2)
    attended = grouped_weights @ value
    return attended.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), weights


def _scores(
    query_bhgd: torch.Tensor, key_bhkd: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Return attention scores [B, heads, G, K] before any mask."""
    if math.frexp(scale)[0] == 0.5:  # a power of two rounds nothing: scale the smaller factor
        scores = (query_bhgd * scale) @ key_bhkd.transpose(2, 3)
    else:
        scores = query_bhgd @ key_bhkd.transpose(2, 3) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def sdpa_prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by `scaled_dot_product_attention`."""
    if (prefix := _prefix_of(module, key)) is not None:
        key = torch.cat((_for_rows(prefix[0], len(key)), key), dim=2)
        value = torch.cat((_for_rows(prefix[1], len(value)), value), dim=2)
        if attention_mask is not None:  # every token sees the prefix
            attention_mask = F.pad(attention_mask, (prefix[0].shape[2], 0), value=0.0)
    dropout = dropout if module.training else 0.0
    attended = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _for_rows(states_b: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return each image's states once per row that reads it."""
    per_image = num_rows // len(states_b)
    return states_b if per_image == 1 else states_b.repeat_interleave(per_image, dim=0)


# The additive mask, always: without one, `sdpa` would let only late tokens see the prefix.
for _base, _function in {"eager": eager_prefix_attention, "sdpa": sdpa_prefix_attention}.items():
    AttentionInterface.register(ATTENTION.format(_base), _function)
    AttentionMaskInterface.register(ATTENTION.format(_base), eager_mask)
