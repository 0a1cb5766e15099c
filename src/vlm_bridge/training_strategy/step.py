"""One optimizer step: sum the gradients of its micro-batches, clip, and apply them if finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.device import return_freed_memory
from vlm_bridge.model_architecture.captioner import TrainedParameter
from vlm_bridge.training_strategy.distributed import World, sum_gradients
from vlm_bridge.training_strategy.objectives import Batch, CrossEntropy, seed_of
from vlm_bridge.training_strategy.state import TrainState

# What a step counts in its packed batches, over all processes.
COUNTS = ("num_supervised", "num_captions", "num_tokens", "num_positions")
RETURN_MEMORY_EVERY = 20  # steps on a CPU; asking for it again takes a tenth of a second


class StepResult(NamedTuple):
    """Numbers of a step, which counts from 1: nats per token, and the norm before clipping."""

    step: int
    counts: Sequence[float]  # in the order of COUNTS
    learning_rate: float
    loss: float
    gradient_norm: float

    @property
    def was_skipped(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))


class TrainStep:
    """Take optimizer steps on the sum over supervised tokens divided by their global count.

    A step changes neither weights nor moments if its loss or gradient is not finite.

    Args:
        relative_rates: learning rate of each parameter group, relative to the recipe's.
    """

    def __init__(
        self,
        state: TrainState,
        objective: CrossEntropy,
        recipe: Recipe,
        world: World,
        *,
        total_steps: int,
        relative_rates: Sequence[float],
        autocast: Callable[[], Any],
    ):
        self.state, self.objective, self.recipe, self.world = state, objective, recipe, world
        self.total_steps, self.relative_rates = total_steps, relative_rates
        self.autocast = autocast
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Batch], steps_in_epoch: int) -> StepResult:
        """Update the weights from the micro-batches of this process and advance the state."""
        state, scaler, optimizer = self.state, self.state.scaler, self.state.optimizer
        learning_rate = learning_rate_at(state.step, self.total_steps, self.recipe)
        for group, relative in zip(optimizer.param_groups, self.relative_rates, strict=True):
            group["lr"] = learning_rate * relative
        loss, counts = self._back_propagate(batches)
        sum_gradients(self.world, self.parameters, loss)
        if counts[0]:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip_val)
        numbers = torch.stack([loss.float(), norm.float()]).tolist()  # waits for the device
        result = StepResult(state.step + 1, counts, learning_rate, *numbers)
        if not result.was_skipped:  # `GradScaler.step` would ignore a norm that overflows
            optimizer.step()
            state.average.update(result.step)
        if counts[0]:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.advance(steps_in_epoch, None if result.was_skipped else result.loss)
        if self.world.device.type == "cpu" and state.step % RETURN_MEMORY_EVERY == 0:
            return_freed_memory()
        return result

    def _back_propagate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, list[float]]:
        """Add up gradients; return this process's part of the loss, and COUNTS."""
        world, step = self.world, self.state.step
        if world.size > 1:  # dropout of its own in every process
            torch.manual_seed(seed_of(self.recipe.seed, step, world.rank))
        loaded = [
            self.objective.captions(batch, step, number * world.size + world.rank)
            for number, batch in enumerate(batches)
        ]
        packed = [batch.packed for batch in loaded]
        counts = world.sum([sum(getattr(batch, name) for batch in packed) for name in COUNTS])
        # Without any image that can be read, there is no loss, and nothing to scale.
        step_loss = torch.full((), 0.0 if counts[0] else math.nan, device=world.device)
        for batch in loaded:
            with self.autocast():
                loss = self.objective.loss(batch) / counts[0]
            self.state.scaler.scale(loss).backward()
            step_loss += loss.detach()
        return step_loss, counts


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
    rates = [recipe.trained[pattern] for pattern, _ in groups]
    # learning_rate may be 0 only where every rate is 0 or null.
    relative = [1.0 if rate is None else rate and rate / recipe.learning_rate for rate in rates]
    return torch.optim.AdamW(options, lr=recipe.learning_rate, fused=True), relative


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """Return the learning rate of a 0-based step: linear warm-up, then down to ``min_lr``.

    Warm-up takes a tenth of all steps at most. Cosine as in Loshchilov & Hutter 2017 without
    restarts. A function of the step needs no state in a checkpoint.
    """
    highest, lowest = recipe.learning_rate, recipe.min_lr
    warmup_steps = min(recipe.warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    if recipe.scheduler_type == "constant":
        return highest
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    is_cosine = recipe.scheduler_type == "cosine"
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if is_cosine else 1 - progress
    return lowest + (highest - lowest) * remaining
