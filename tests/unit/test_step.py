"""An optimizer step: what is not finite changes nothing and is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlm_bridge.configuration import Recipe
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState
from vlm_bridge.training_strategy.step import MAX_SKIPPED_IN_A_ROW, TrainStep

CPU = torch.device("cpu")
PACKED = SimpleNamespace(num_supervised=1, num_captions=1, num_tokens=1, num_positions=1)


class Weight(nn.Module):
    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Objective:
    """A batch is a function from the weight to its loss."""

    def captions(self, batch: Any, step: int, number: int) -> Any:
        return SimpleNamespace(packed=PACKED, loss=batch)

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.loss


@pytest.fixture
def take() -> Callable[..., TrainStep]:
    """Take a step of given losses: ``take(lambda weight: weight.sum())``."""
    model = Weight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step = TrainStep(
        TrainState(model, optimizer, torch.GradScaler("cpu", enabled=False)),  # type: ignore[arg-type]
        Objective(),  # type: ignore[arg-type]
        Recipe(learning_rate=0.1, scheduler_type="constant"),
        World(CPU),
        total_steps=100,
        relative_rates=[1.0],
        autocast=nullcontext,
    )

    def taken(*losses: Callable[[torch.Tensor], torch.Tensor]) -> TrainStep:
        step([loss(model.weight) for loss in losses], steps_in_epoch=100)
        return step

    return taken


def good(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum()


def bad(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum() * math.nan


def infinite(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum() + math.inf  # its gradient is finite


def overflowing(weight: torch.Tensor) -> torch.Tensor:
    return (weight * torch.tensor(3e38)).sum()  # the norm of its gradient is not finite


@pytest.mark.parametrize("poison", [bad, infinite, overflowing])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(
    take: Callable[..., TrainStep], poison: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    state = take(good).state
    weight = state.model.weight
    before = [weight.detach().clone(), *(v.clone() for v in state.optimizer.state[weight].values())]
    assert not torch.equal(before[0], torch.ones(3))
    take(good, poison)
    after = [weight.detach(), *state.optimizer.state[weight].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    step = take(good)
    assert state.optimizer.state[weight]["step"] == 2
    assert [result.was_skipped for result in step.results(wait=True)] == [False, True, False]
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (3, 1, 0)


def test_steps_in_a_row_are_counted_and_a_good_one_ends_the_row(
    take: Callable[..., TrainStep],
) -> None:
    for losses in ([bad] * (MAX_SKIPPED_IN_A_ROW - 1) + [good], [bad] * MAX_SKIPPED_IN_A_ROW):
        for loss in losses:
            step = take(loss)
        step.results(wait=True)
        assert step.gives_up == (losses[-1] is bad)


def test_float16_may_overflow_as_long_as_its_scale_can_be_lowered(
    take: Callable[..., TrainStep],
) -> None:
    step = take(good)
    step.state.scaler = torch.GradScaler("cpu", init_scale=2.0**70)
    for _ in range(4):
        take(lambda weight: (weight * 1e18).sum())
    *_, last = results = step.results(wait=True)
    assert all(result.overflowed for result in results[1:3])
    assert "float16 overflowed at loss scale 1.18059e+21" in results[1].cause
    assert not step.gives_up
    assert not last.was_skipped  # the scale is low enough now
    take(infinite)
    assert step.results(wait=True)[0].was_skipped
    assert step.state.skipped_in_a_row == 1  # no scale mends a loss that is not finite


def test_micro_batches_add_up(take: Callable[..., TrainStep]) -> None:
    step = take(good, lambda weight: 3 * weight.sum())
    (result,) = step.results(wait=True)
    assert result.loss == pytest.approx((3 + 9) / 2)
    assert result.gradient_norm == pytest.approx(math.sqrt(3) * 2)
