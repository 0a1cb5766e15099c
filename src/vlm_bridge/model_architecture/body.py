"""The layers of a language model as training runs them: some left out, checkpointed or compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import keep_attached


class Body:
    """Variants of a model's body (`base_model`), which itself stays as it is.

    A variant shares every weight with it. Layers keep their numbers, by which models choose masks, windows and the
    places of their caches.

    Attributes:
        checkpoints: whether back-propagation computes layers again instead of keeping their activations.
        compiles: whether packed rows run through compiled code.
    """

    def __init__(self, causal_lm: Any):
        self.causal_lm = causal_lm
        self.checkpoints = self.compiles = False
        self._variants: dict[tuple[int, bool, bool], Any] = {}

    def layers(self, remedy: str = "bridge.enter_at_layer=0") -> nn.ModuleList:
        """Return its layers.

        Raises:
            ModelError: the model does not say which of its modules are layers; ``remedy`` needs none.
        """
        return self.causal_lm.base_model.get_submodule(self._name_of_layers(remedy))

    def variant(self, from_layer: int, *, is_packed: bool) -> Any:
        """Return what runs the layers from ``from_layer`` on."""
        compiled = self.compiles and is_packed
        key = (from_layer, self.checkpoints, compiled)
        if key not in self._variants:
            body = self.causal_lm.base_model
            if from_layer or self.checkpoints:
                kept = [
                    Checkpointed(layer) if self.checkpoints else layer for layer in self.layers()
                ]
                kept[:from_layer] = [Skipped() for _ in range(from_layer)]
                body = with_layers(body, self._name_of_layers(), nn.ModuleList(kept))
            # Of the method: a compiled module would be a second owner of every weight.
            self._variants[key] = torch.compile(body.forward, dynamic=True) if compiled else body
        return self._variants[key]

    def _name_of_layers(self, remedy: str = "bridge.enter_at_layer=0") -> str:
        num_layers = self.causal_lm.config.get_text_config(decoder=True).num_hidden_layers
        for name, module in self.causal_lm.base_model.named_modules():  # outer modules first
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return name
        raise ModelError(
            f"{type(self.causal_lm).__name__} does not say which of its modules are layers: use {remedy}"
        )


class Skipped(nn.Module):
    """Stands in for a layer that does not run."""

    def forward(self, states_bth: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states_bth


class Checkpointed(nn.Module):
    """Runs a layer, keeps only its input for back-propagation, and runs it again when that is due."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler traces the recomputation along with the first run: the image is still attached.
        context = {} if torch.compiler.is_compiling() else {"context_fn": keep_attached}
        return checkpoint(self.layer, *args, use_reentrant=False, **context, **kwargs)


def with_layers(body: nn.Module, name: str, layers: nn.ModuleList) -> nn.Module:
    """A copy of a body with other layers under a name such as ``encoder.layer``; it shares all else.

    Copied are the modules on the way to the layers, and they keep their own parameters.
    """
    parts = name.split(".")
    on_the_way = [body.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    shared = [module for module in body.modules() if module not in on_the_way]
    shared += [
        tensor for module in on_the_way for tensor in (*module.parameters(), *module.buffers())
    ]
    memo: dict[int, Any] = {id(one): one for one in shared}
    memo |= {
        id(config): config for module in on_the_way if (config := getattr(module, "config", None))
    }
    memo[id(body.get_submodule(name))] = layers
    return copy.deepcopy(body, memo)
