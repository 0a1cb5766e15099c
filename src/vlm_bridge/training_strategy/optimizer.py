"""The optimiser, and the scaler that float16 needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.trainable import TrainedParameter


def adamw(trained: Sequence[TrainedParameter], recipe: Recipe) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW without weight decay on biases and norms, and the learning rate of each group relative to the recipe's."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for _, parameter, learning_rate in trained:
        relative = 1.0 if learning_rate is None else learning_rate / recipe.learning_rate
        decay = recipe.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((relative, decay), []).append(parameter)
    options = [{"params": members, "weight_decay": decay} for (_, decay), members in groups.items()]
    return torch.optim.AdamW(options, lr=recipe.learning_rate), [relative for relative, _ in groups]


def gradient_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Loss scaling for float16, below whose smallest number gradients fall (Micikevicius et al. 2018).

    It does nothing for bfloat16, which has the exponents of float32.
    """
    return torch.amp.GradScaler(device.type, enabled=recipe.use_amp and recipe.amp_dtype == "float16")  # type: ignore[attr-defined]
