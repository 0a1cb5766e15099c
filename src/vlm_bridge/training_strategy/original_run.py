"""Take over the state of runs of the dinov2-gemma system's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vlm_bridge.model_architecture.interchange import ORIGINAL_NAMES

MOMENTS = ("exp_avg", "exp_avg_sq")


class OriginalPosition(NamedTuple):
    """Where such a run stood; None where its file does not say.

    Attributes:
        epochs: finished ones.
        step: optimizer steps that its schedule had counted.
        total_steps: over which its schedule was drawn.
    """

    epochs: int
    step: int | None
    total_steps: int | None


def position(training: Mapping[str, Any]) -> OriginalPosition:
    """Return where the run stood that wrote a checkpoint's entries beside the weights."""
    scheduler = training.get("scheduler_state_dict")
    scheduler = scheduler if isinstance(scheduler, Mapping) else {}
    epochs, step, total = (
        value if isinstance(value, int) and value >= 0 else None
        for value in (training.get("epoch"), scheduler.get("last_epoch"), scheduler.get("T_max"))
    )
    return OriginalPosition(epochs or 0, step, total)


def take_moments(optimizer: torch.optim.Optimizer, training: Mapping[str, Any]) -> bool:
    """Load AdamW's moments of such a run into ours, whose groups and order of parameters are others.

    Returns:
        Whether they fit: moments for all of the bridge's tensors, each of its tensor's shape.
    """
    state = training.get("optimizer_state_dict")
    by_number = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(by_number, Mapping):
        return False
    # There the optimizer has one group, in the order in which the bridge names its tensors.
    theirs = dict(
        zip(ORIGINAL_NAMES, (by_number.get(i) for i in range(len(ORIGINAL_NAMES))), strict=True)
    )
    ours = optimizer.state_dict()
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for group, options in zip(optimizer.param_groups, ours["param_groups"], strict=True):
        for parameter, number, name in zip(
            group["params"], options["params"], options["param_names"], strict=True
        ):
            found: Any = theirs.get(name)
            if not _are_moments(found, parameter):
                return False
            moments[number] = {
                **{key: found[key] for key in MOMENTS},
                "step": torch.as_tensor(found["step"]),
            }
    optimizer.load_state_dict({"state": moments, "param_groups": ours["param_groups"]})
    return True


def _are_moments(found: Any, parameter: torch.Tensor) -> bool:
    return (
        isinstance(found, Mapping)
        and isinstance(found.get("step"), torch.Tensor | int | float)
        and all(
            isinstance(found.get(key), torch.Tensor) and found[key].shape == parameter.shape
            for key in MOMENTS
        )
    )
