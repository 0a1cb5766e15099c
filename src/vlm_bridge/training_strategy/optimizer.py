"""AdamW, its learning rate, and the moving average of the trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.captioner import TrainedParameter


def adamw(
    trained: Sequence[TrainedParameter], recipe: Recipe
) -> tuple[torch.optim.AdamW, list[float]]:
    """Build AdamW without weight decay on biases and norms.

    Each pattern of ``trainable`` is one group with weight decay and one without, so that a resumed
    run may have other rates. Parameter names are saved with the state.

    Returns:
        The optimizer, and each group's learning rate relative to the recipe's.
    """
    groups: dict[tuple[str, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter, pattern in trained:
        groups.setdefault((pattern, parameter.ndim >= 2), []).append((name, parameter))
    options = [
        {"params": members, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (_, decays), members in groups.items()
    ]
    rates = [recipe.trainable[pattern] for pattern, _ in groups]
    # learning_rate may be 0 only where every rate is 0 or null.
    relative = [1.0 if rate is None else rate and rate / recipe.learning_rate for rate in rates]
    return torch.optim.AdamW(options, lr=recipe.learning_rate, fused=True), relative


def warmup_within(warmup_steps: int, total_steps: int) -> int:
    """Limit the warm-up to a tenth of all steps."""
    return min(warmup_steps, total_steps // 10)


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_lr: float,
    kind: str,
) -> float:
    """Return the learning rate of a 0-based step: linear warm-up, then down to ``min_lr``.

    A checkpoint needs no schedule. Cosine as in Loshchilov & Hutter 2017 without restarts.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if kind == "constant":
        return learning_rate
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_lr + (learning_rate - min_lr) * remaining


class WeightAverage:
    """Exponential moving average of the trained parameters (Polyak & Juditsky 1992).

    `torch.optim.swa_utils.AveragedModel` would copy the frozen models, too.

    Attributes:
        weights: the average, by parameter name.
        live_weights: the weights that the optimizer changes.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.live_weights = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.weights = {name: tensor.clone() for name, tensor in self.live_weights.items()}

    def restart(self) -> None:
        """Start again from the weights of the model."""
        for name, live in self.live_weights.items():
            self.weights[name].copy_(live)

    def update(self, step: int, skipped: torch.Tensor) -> None:
        """Average in the weights after a step (the first is 1).

        Early on the decay is (1 + step) / (10 + step), TensorFlow's rule.

        Args:
            skipped: 1.0 on the device where the step changed nothing, else 0.0.
        """
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skipped)
        for name, live in self.live_weights.items():
            self.weights[name].lerp_(live, share.to(live.dtype))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Swap the average into the model for a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, live in self.live_weights.items():
            kept = live.clone()
            live.copy_(self.weights[name])
            self.weights[name].copy_(kept)
