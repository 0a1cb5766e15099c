"""The one place where an image meets a language model, in training and in generation.

Inside ``with attach(language_model, image) as attached``, the model's own ``forward`` and
``generate`` are called with ``attached.inputs(ids)``. A context variable, of which each thread has
its own, holds the image. An attention function that transformers knows by name and a hook where
text enters the bridge's layer read it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.bridges import ImageInputs

if TYPE_CHECKING:
    from vlm_bridge.model_architecture.language_model import LanguageModel

# Name under which transformers knows an attention function that reads a prefix: eager or sdpa.
ATTENTION = "vlm_bridge_{}"


@dataclass(frozen=True)
class Attached:
    """Images that a language model sees, and the module at which they edit the text.

    Attributes:
        places: [B, L], where each image's text is in rows that images share (`PackedBatch`).
    """

    language_model: LanguageModel
    image: ImageInputs
    entrance: nn.Module | None
    places: torch.Tensor | None = None

    def inputs(self, ids_rt: torch.Tensor) -> dict[str, Any]:
        """Return the model's own arguments for text of token ids [R, T].

        R is a multiple of the number of images; rows of an image stand beside each other. The start
        token stands before soft tokens: a frozen model parks idle attention on the first position
        ("attention sinks", Xiao et al. 2024) and must find the token there that it knows.
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
            # Under autocast every layer would round them again.
            is_autocast = torch.is_autocast_enabled(states.device.type)
            inputs["encoder_hidden_states"] = states if is_autocast else states.to(model.dtype)
        return inputs

    def edited(self, text_rth: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return text [R, T, H] as the layer reads it: edited, scaled, and rounded once."""
        assert self.image.edit is not None
        if self.places is None:
            # An edit looks at one position at a time: rows of an image may stand in one row.
            text_blh = text_rth.reshape(self.image.num_images, -1, text_rth.shape[-1])
            return (self.image.edit(text_blh).reshape(text_rth.shape) * scale).to(text_rth.dtype)
        text_ph = F.pad(text_rth.flatten(0, 1), (0, 0, 0, 1))  # the last one is nowhere
        edited_blh = (self.image.edit(text_ph[self.places]) * scale).to(text_rth.dtype)
        nothing_ph = torch.zeros_like(text_ph)
        text_ph = nothing_ph.index_copy(0, self.places.flatten(), edited_blh.flatten(0, 1))
        return text_ph[:-1].view(text_rth.shape)


_ATTACHED: ContextVar[Attached | None] = ContextVar("attached", default=None)


class _Traced:
    """Attached images for compiled code, which cannot read a context variable."""

    attached: Attached | None = None
    lock = threading.RLock()  # threads take turns


@contextmanager
def attach(
    language_model: LanguageModel, image: ImageInputs, places: torch.Tensor | None = None
) -> Iterator[Attached]:
    """Make a language model see images within a block; blocks nest, threads have their own.

    For an edit, its layer must be open (`LanguageModel.open_layer`). ``places`` as for `Attached`.

    Raises:
        ModelError: at the end, if a layer has not asked for its part of the prefix.
    """
    entrance = None if image.edit is None else language_model.entrance(image.edit_layer)
    attached = Attached(language_model, image, entrance, places)
    with _set(attached), _traced(attached) if language_model.is_compiled else nullcontext():
        yield attached
    prefix = image.key_value_prefix
    if prefix is not None and len(prefix.layers_that_read) < language_model.shape.num_layers:
        raise ModelError(
            f"the attention layers of {type(language_model.causal_lm).__name__} do not read a "
            "key-value prefix: choose bridge.kind=prefix or cross_attention"
        )


@contextmanager
def _traced(attached: Attached) -> Iterator[None]:
    with _Traced.lock:
        before, _Traced.attached = _Traced.attached, attached
        try:
            yield
        finally:
            _Traced.attached = before


@contextmanager
def _set(attached: Attached | None) -> Iterator[None]:
    token = _ATTACHED.set(attached)
    try:
        yield
    finally:
        _ATTACHED.reset(token)


def keep_attached() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts of a checkpointed layer's first run and of its recomputation.

    Back-propagation recomputes after the block has ended, for CUDA in another thread: the image of
    the first run is captured there. For torch's ``context_fn``.
    """
    return nullcontext(), _set(_ATTACHED.get())


def _current() -> Attached | None:
    return _Traced.attached if torch.compiler.is_compiling() else _ATTACHED.get()


def _editing(module: nn.Module) -> Attached | None:
    """Return the attached images if they edit the text at this module."""
    attached = _current()
    return attached if attached is not None and attached.entrance is module else None


# A hook that returns None changes nothing.


def edit_embeddings(module: Any, args: tuple[Any, ...], _: Any) -> torch.Tensor | None:
    """Edit the rows of the embedding matrix before the model scales them (forward hook)."""
    if attached := _editing(module):
        rows_rth = F.embedding(args[0], module.weight)
        return attached.edited(rows_rth, embedding_scale(module))
    return None


def embedding_scale(layer: Any) -> torch.Tensor | float:
    """Return the factor of an embedding layer: sqrt(H) in Gemma's families, else mostly 1."""
    scale = getattr(layer, "embed_scale", 1.0)
    return scale.to(layer.weight.dtype) if isinstance(scale, torch.Tensor) else scale


def edit_layer_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Edit the text that enters a layer (forward pre-hook)."""
    attached = _editing(module)
    return None if attached is None else (attached.edited(args[0]), *args[1:])


# Self-attention over [keys and values made from an image; the text's own]. The KV cache holds text
# alone, and text positions are those of plain text. Every token sees the prefix.


def _with_prefix(
    module: Any, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return keys, values [R, heads, P + T, head_dim] and the mask of an attention module."""
    attached = _current()
    if attached is None or module.config is not attached.language_model.text_config:
        return key, value, mask
    prefix = attached.image.key_value_prefix
    states = None if prefix is None else prefix.of_layer(module.layer_idx)
    if states is None:
        return key, value, mask
    keys, values = (_for_rows(part, len(key)).to(key.dtype) for part in states)
    if mask is not None:
        mask = F.pad(mask, (keys.shape[2], 0), value=0.0)
    return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2), mask


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
    """Attend by matrix products, one for query heads that share a key.

    Returns:
        [R, T, heads, head_dim], and weights.
    """
    key, value, attention_mask = _with_prefix(module, key, value, attention_mask)
    rows, heads, length, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, length, -1)
    scores = scores.mul_(head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    weights = F.dropout(scores.softmax(dim=-1), dropout, module.training)
    attended = weights.view(rows, key.shape[1], -1, weights.shape[-1]) @ value
    return attended.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), weights


def sdpa_prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by transformers' `sdpa`."""
    key, value, attention_mask = _with_prefix(module, key, value, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _for_rows(states_b: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return each image's states once per row that reads it."""
    per_image = num_rows // len(states_b)
    return states_b if per_image == 1 else states_b.repeat_interleave(per_image, dim=0)


# The additive mask, always: without one, `sdpa` would let only late tokens see the prefix.
for _base, _function in {"eager": eager_prefix_attention, "sdpa": sdpa_prefix_attention}.items():
    AttentionInterface.register(ATTENTION.format(_base), _function)
    AttentionMaskInterface.register(ATTENTION.format(_base), eager_mask)
