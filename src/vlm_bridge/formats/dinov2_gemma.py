"""The layout of dinov2-gemma's own checkpoints ("Vision-Language Bridge for Image Captioning").

Its ``model_state_dict`` holds the single-block bridge as ``bridge_module.*``. That block is our
``cross_attention`` bridge part by part, so tensors are renamed and no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats import shortened, write_file, wrong_names

_PREFIX = "bridge_module."
_MODULES = {
    "vision_projection": "vision_projection",
    "attention_norm": "ln1",
    "feed_forward_norm": "ln2",
    "query": "cross_attention.w_q",
    "key": "cross_attention.w_k",
    "value": "cross_attention.w_v",
    "attention_output": "cross_attention.w_o",
    "feed_forward_in": "ffn.0",
    "feed_forward_out": "ffn.3",
}
# Our names of the bridge's 18 tensors -> the original's, in its order of parameters.
ORIGINAL_NAMES = {
    f"bridge.{ours}.{kind}": f"{_PREFIX}{theirs}.{kind}"
    for ours, theirs in _MODULES.items()
    for kind in ("weight", "bias")
}


def is_original(content: Any) -> bool:
    """Return whether an opened checkpoint has this layout."""
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and any(str(name).startswith(_PREFIX) for name in state)


def from_original(state: Mapping[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """Rename the tensors of a ``model_state_dict`` to ours. Raises CheckpointError."""
    if any(name.startswith(f"{_PREFIX}bridge_blocks.") for name in state):
        raise CheckpointError(
            f"{where} holds Bridge-Lite (the original since its commit 2dd2199), whose "
            "self-attention reads later tokens: train config/training-default.yaml"
        )
    if wrong := wrong_names(state, ORIGINAL_NAMES.values()):
        raise CheckpointError(f"{where} is not the original's bridge: {shortened(wrong)}")
    return {ours: state[theirs] for ours, theirs in ORIGINAL_NAMES.items()}


def to_original(weights: Mapping[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """Rename our tensors to those of a ``model_state_dict``.

    Raises:
        CheckpointError: the layout has no place for them (another bridge, feature statistics).
    """
    if wrong := wrong_names(weights, ORIGINAL_NAMES):
        wanted = "bridge.kind=cross_attention with bridge.standardize_features=false"
        raise CheckpointError(
            f"{where} has no place in the original layout, which holds {wanted}: {shortened(wrong)}"
        )
    return {theirs: weights[ours] for ours, theirs in ORIGINAL_NAMES.items()}


def original_architecture(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the recipe keys that translated weights decide (heads are not in them)."""
    hidden, width = weights["bridge.feed_forward_in.weight"].shape
    return {
        "bridge.kind": "cross_attention",
        "bridge.enter_at_layer": 0,
        "bridge.standardize_features": False,
        "bridge.feed_forward_multiplier": hidden // width,
    }


def save_original(
    path: Path, recipe: Recipe, content: Mapping[str, Any], where: str | Path
) -> None:
    """Write an opened checkpoint as a weights-only one that the original project loads.

    The recipe is added under a key that the original ignores. Raises CheckpointError.
    """
    published = recipe.to_dict()
    if layer := published["bridge"].get("enter_at_layer"):
        raise CheckpointError(
            f"{where} has no place in the original layout: bridge.enter_at_layer={layer}, not 0"
        )
    state = {
        "model_state_dict": to_original(content["weights"], where),
        "config": {key: value for key, value in published.items() if not isinstance(value, dict)},
        "recipe": published,
        "format_version": content.get("format_version", 2),
    }
    write_file(path, state)
