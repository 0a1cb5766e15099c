"""The one place where an image meets a language model, in training and in generation.

Inside ``with attach(language_model, image) as attached`` the frozen model sees the image, and its own ``forward`` and
``generate`` are called with ``attached.inputs(ids)``: greedy search, beams, sampling, streaming and caches are the
library's. Nothing on the model changes. The image is kept in a context variable, which each thread has of its own,
and is read by two things that are always there: an attention function that transformers knows by name, and a hook
where text enters the bridge's first layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.bridges.base import ImageInputs
from vlm_bridge.model_architecture.prefix_attention import (
    KeyValuePrefix,
    eager_prefix_attention,
    sdpa_prefix_attention,
)

if TYPE_CHECKING:
    from vlm_bridge.model_architecture.language_model import LanguageModel

ATTENTION = "vlm_bridge_{}"
"""Name under which transformers knows an attention function (`eager` or `sdpa`) that reads a prefix."""


@dataclass(frozen=True)
class Attached:
    """Images that a language model sees.

    Attributes:
        layer: where text enters the bridge; from 0, whose text is the embeddings.
        text_at_bridge: [R, T, H], text as it enters that layer, computed before; None leaves it to the layers below.
    """

    language_model: LanguageModel
    image: ImageInputs
    layer: int = 0
    text_at_bridge: torch.Tensor | None = None

    def inputs(self, ids_rt: torch.Tensor) -> dict[str, Any]:
        """Return what ``forward`` and ``generate`` of the language model take for text of token ids [R, T].

        R is a multiple of the number of images: as many rows beside each other read each of them. Before soft tokens
        stands the start token: language models park idle attention on the first position (Xiao et al. 2024,
        "attention sinks"), and a frozen one must find the token there that it was trained with.
        """
        model, image = self.language_model, self.image
        inputs: dict[str, Any] = {"input_ids": ids_rt, **model.decoder_options}
        if image.soft_tokens is not None:
            text_rth = model.embed(ids_rt)
            start = ids_rt.new_full((len(ids_rt), 1), model.start_id)
            soft_rph = self._for_rows(image.soft_tokens, len(ids_rt)).to(text_rth.dtype)
            inputs["inputs_embeds"] = torch.cat((model.embed(start), soft_rph, text_rth), dim=1)
            del inputs["input_ids"]
        if image.encoder_hidden_states is not None:
            states = self._for_rows(image.encoder_hidden_states, len(ids_rt))
            inputs["encoder_hidden_states"] = states.to(model.dtype)
        return inputs

    def enter(self, text_rth: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return text [R, T, H] as the layer reads it: edited by the bridge, position by position, then scaled."""
        text_rth = (
            text_rth if self.text_at_bridge is None else self.text_at_bridge.to(text_rth.dtype)
        )
        if self.image.edit is None:
            return text_rth * scale
        # Positions of rows that share an image may stand in one row, since none looks at another.
        per_image = text_rth.reshape(self.image.num_images, -1, text_rth.shape[-1])
        # Scaled in the bridge's precision: the result is rounded once, as where the model scales its own.
        return (self.image.edit(per_image).reshape(text_rth.shape) * scale).to(text_rth.dtype)

    def prefix_for(self, module: Any) -> KeyValuePrefix | None:
        """Return the prefix if an attention module is one of this language model's."""
        is_own = module.config is self.language_model.text_config
        return self.image.key_value_prefix if is_own else None

    def check_it_was_read(self) -> None:
        """Raise ModelError if a layer that ran has not asked for its part of the prefix."""
        prefix = self.image.key_value_prefix
        skipped = 0 if self.text_at_bridge is None else self.layer
        if (
            prefix is None
            or len(prefix.layers_that_read) + skipped >= self.language_model.shape.num_layers
        ):
            return
        raise ModelError(
            f"the attention layers of {type(self.language_model.causal_lm).__name__} do not read a key-value prefix: "
            "choose bridge.kind=prefix or cross_attention"
        )

    def _for_rows(self, states_bnd: torch.Tensor, num_rows: int) -> torch.Tensor:
        """States of images, once for each row that reads them."""
        per_image = num_rows // self.image.num_images
        return states_bnd if per_image == 1 else states_bnd.repeat_interleave(per_image, dim=0)


_ATTACHED: ContextVar[Attached | None] = ContextVar("attached", default=None)


@contextmanager
def attach(
    language_model: LanguageModel,
    image: ImageInputs,
    layer: int = 0,
    text_at_bridge: torch.Tensor | None = None,
) -> Iterator[Attached]:
    """Make a language model see images within a block; blocks nest, and threads do not see each other's.

    Args:
        layer: the bridge's first layer; the model must have been opened there (`LanguageModel.open_layer`).
        text_at_bridge: see `Attached`; the layers below must then be left out (`LanguageModel.hidden_states`).
    """
    attached = Attached(language_model, image, layer, text_at_bridge)
    with _set(attached), _traced(attached) if language_model.is_compiled else nullcontext():
        yield attached


def keep_attached() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a checkpointed layer's first run and of its recomputation, for torch's ``context_fn``.

    Back-propagation recomputes after the block has ended, for CUDA in a thread of its own: the image of the first
    run is captured there.
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
    """Attached images for compiled code, which cannot read context variables. Threads take turns."""

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
    """Let text that enters a layer pass `Attached.enter` whenever images are attached there.

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
    attached = _attached_at(language_model, layer)
    return args if attached is None else (attached.enter(args[0]), *args[1:])


def _after_embeddings(
    language_model: LanguageModel,
    _module: nn.Module,
    args: tuple[torch.Tensor],
    text_rth: torch.Tensor,
) -> torch.Tensor:
    attached = _attached_at(language_model, 0)
    if attached is None or attached.image.edit is None:
        return text_rth
    return attached.enter(language_model.token_vectors(*args), language_model.embedding_scale)


def _attached_at(language_model: LanguageModel, layer: int) -> Attached | None:
    attached = _current()
    is_own = (
        attached is not None
        and attached.language_model is language_model
        and attached.layer == layer
    )
    return attached if is_own else None


class _Reached(Exception):
    """Raised with the text [B, T, H] that enters a layer, to end the run there."""


def states_entering(
    language_model: LanguageModel, layer: int, run: Callable[[], object]
) -> torch.Tensor:
    """Return the states [B, T, H] that enter an opened layer; ``run`` calls the model, and ends there."""

    def stop(states_bth: torch.Tensor) -> torch.Tensor:
        raise _Reached(states_bth)

    try:
        with attach(language_model, ImageInputs(1, edit=stop), layer):
            run()
    except _Reached as reached:
        states_1nh = reached.args[0]
    return states_1nh


def _attend(function: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    attached = _current()
    prefix = None if attached is None else attached.prefix_for(module)
    return function(module, *args, image_prefix=prefix, **kwargs)


# The additive mask, always made: without one, `sdpa` would take the prefix for text that only late tokens may see.
for _base, _function in {"eager": eager_prefix_attention, "sdpa": sdpa_prefix_attention}.items():
    AttentionInterface.register(ATTENTION.format(_base), partial(_attend, _function))
    AttentionMaskInterface.register(ATTENTION.format(_base), eager_mask)
