"""The optimiser, and the scaler that float16 needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.trainable import TrainedParameter


def adamw(
    trained: Sequence[TrainedParameter], recipe: Recipe
) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW without weight decay on biases and norms, and the learning rate of each group relative to the recipe's.

    A pattern of ``trainable`` makes one group with weight decay and one without, whatever its rate: a resumed run may
    have other rates. Parameters carry their names into the optimiser's state, where they can be compared. The update is
    one kernel for all parameters, which every device that torch >= 2.8 trains on has.
    """
    groups: dict[tuple[str, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter, pattern in trained:
        groups.setdefault((pattern, parameter.ndim >= 2), []).append((name, parameter))
    options = [
        {"params": members, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (_, decays), members in groups.items()
    ]
    rates = [recipe.trainable[pattern] for pattern, _ in groups]
    # A rate of 0 beside learning_rate=0 is no division.
    relative = [1.0 if rate is None else rate and rate / recipe.learning_rate for rate in rates]
    return torch.optim.AdamW(options, lr=recipe.learning_rate, fused=True), relative


def gradient_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Loss scaling for float16, below whose smallest number gradients fall (Micikevicius et al. 2018).

    It does nothing for bfloat16, which has the exponents of float32.
    """
    return torch.amp.GradScaler(device.type, enabled=recipe.autocast_dtype == "float16")  # type: ignore[attr-defined]
