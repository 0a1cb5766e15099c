"""One optimizer step: sum the gradients of its micro-batches, clip, and apply them if finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.loader import PackedBatch
from vlm_bridge.device import return_freed_memory
from vlm_bridge.model_architecture.captioner import TrainedParameter
from vlm_bridge.training_strategy.distributed import GradientSum, World
from vlm_bridge.training_strategy.objectives import Batch, CrossEntropy, seed_of
from vlm_bridge.training_strategy.state import TrainState

MAX_SKIPPED_IN_A_ROW = 10
RETURN_MEMORY_EVERY = 20  # steps on a CPU; asking for it again takes a tenth of a second


class StepSize(NamedTuple):
    """Counts of an optimizer step over all processes; positions are tokens and pads."""

    num_supervised: int
    num_captions: int
    num_tokens: int
    num_positions: int

    @classmethod
    def of(cls, batches: Sequence[PackedBatch]) -> StepSize:
        return cls(*(sum(getattr(batch, name) for batch in batches) for name in cls._fields))


@dataclass(frozen=True)
class StepResult:
    """Numbers of a step.

    Attributes:
        step: 1-based.
        place: epoch and step in epoch, from 0, of the batches.
        loss: nats per supervised token.
        gradient_norm: before clipping.
        loss_scale: of float16 gradients; 1 without.
    """

    step: int
    place: tuple[int, int]
    loss: float
    gradient_norm: float
    loss_scale: float

    @property
    def was_skipped(self) -> bool:
        return not math.isfinite(self.gradient_norm)

    @property
    def overflowed(self) -> bool:
        """Skipped because of a loss scale that the scaler now lowers."""
        return self.was_skipped and math.isfinite(self.loss) and self.loss_scale > 1

    @property
    def cause(self) -> str:
        if self.overflowed:
            return f"float16 overflowed at loss scale {self.loss_scale:g}, which is lowered now"
        return f"loss {self.loss:g}, gradient norm {self.gradient_norm:g}"


class TrainStep:
    """Take optimizer steps on the sum over supervised tokens divided by their global count.

    No step waits for a GPU: fused optimizers take a flag (``found_inf``) and then change neither
    weights nor moments.
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
        self.total_steps = total_steps
        self.warmup_steps = warmup_within(recipe.warmup_steps, total_steps)
        self.relative_rates = relative_rates
        self.autocast = autocast
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.add_up_gradients = GradientSum(world, self.parameters)
        self._pending: list[tuple[int, tuple[int, int], torch.Tensor]] = []

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step, before the factors of parameter groups."""
        return learning_rate_at(
            self.state.step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            learning_rate=self.recipe.learning_rate,
            min_lr=self.recipe.min_lr,
            kind=self.recipe.scheduler_type,
        )

    def __call__(self, batches: Sequence[Batch], steps_in_epoch: int) -> StepSize:
        """Update the weights from the micro-batches of this process and advance the state."""
        state, scaler, optimizer = self.state, self.state.scaler, self.state.optimizer
        for group, relative in zip(optimizer.param_groups, self.relative_rates, strict=True):
            group["lr"] = self.learning_rate * relative
        loss, size = self._back_propagate(batches)
        self.add_up_gradients(loss)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip_val)
        skipped = (~norm.isfinite()).float()
        # `GradScaler.step` has a flag of its own, which ignores norms that overflow.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        loss_scale = scaler.scale(torch.ones_like(loss))  # before `update` changes it
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        place = (state.epoch, state.step_in_epoch)
        state.advance(steps_in_epoch)
        if state.average is not None:
            state.average.update(state.step, skipped)
        numbers = torch.stack([loss.float(), norm.float(), loss_scale.float()])
        self._pending.append((state.step, place, numbers))
        if state.device.type == "cpu" and state.step % RETURN_MEMORY_EVERY == 0:
            return_freed_memory()
        return size

    def _back_propagate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, StepSize]:
        """Add up gradients; return this process's part of the loss, and the size of the step."""
        world, step = self.world, self.state.step
        if world.size > 1:  # dropout of its own in every process
            torch.manual_seed(seed_of(self.recipe.seed, step, world.rank))
        loaded = [
            self.objective.captions(batch, step, number * world.size + world.rank)
            for number, batch in enumerate(batches)
        ]
        counts = StepSize.of([batch.packed for batch in loaded])
        size = StepSize(*map(int, world.sum(counts)))
        step_loss = torch.zeros((), device=self.state.device)
        for batch in loaded:
            with self.autocast():
                loss = self.objective.loss(batch) / size.num_supervised
            # NaN reaches every gradient and every process, so that the norm alone decides.
            seed = torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)
            self.state.scaler.scale(loss).backward(seed)
            step_loss += loss.detach()
        return step_loss, size

    def results(self, *, wait: bool) -> list[StepResult]:
        """Return the steps since the last call; on a GPU nothing, unless ``wait`` is true."""
        if not wait and self.state.device.type != "cpu":
            return []
        found = [
            StepResult(step, place, *numbers.tolist()) for step, place, numbers in self._pending
        ]
        self._pending.clear()
        state = self.state
        for result in found:
            state.skipped_steps += result.was_skipped
            if not result.was_skipped:
                state.skipped_in_a_row = 0
            elif not result.overflowed:
                state.skipped_in_a_row += 1
        return found

    @property
    def gives_up(self) -> bool:
        return self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW


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
