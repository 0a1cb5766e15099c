"""Steps that are no numbers change nothing, and a change of what is frozen is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vlm_bridge.errors import TrainingError
from vlm_bridge.training_strategy.health import FrozenParts, StepGuard, WatchedStep, fingerprint

CPU = torch.device("cpu")


def watch(guard: StepGuard, *steps: tuple[float, float, float]) -> list[WatchedStep]:
    """Let a guard watch steps of (loss, gradient norm, loss scale)."""
    for number, numbers in enumerate(steps, 1):
        guard.watch((number, 0, number - 1), *map(torch.tensor, numbers))
    return guard.read(wait=True)


GOOD, BAD = (2.0, 1.0, 1.0), (math.nan, math.nan, 1.0)
OVERFLOW, EXHAUSTED = (2.0, math.inf, 1024.0), (2.0, math.inf, 1.0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_neither_weights_nor_moments(norm: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    assert StepGuard.step(optimizer, torch.tensor(1.0)) == 0
    before = {
        "weight": weight.detach().clone(),
        **{k: v.clone() for k, v in optimizer.state[weight].items()},
    }
    assert not torch.equal(before["weight"], torch.ones(3))

    weight.grad = torch.full((3,), norm)
    assert StepGuard.step(optimizer, torch.tensor(norm)) == 1
    after = {"weight": weight.detach(), **optimizer.state[weight]}
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    weight.grad = torch.ones(3)
    StepGuard.step(optimizer, torch.tensor(1.0))
    assert optimizer.state[weight]["step"] == 2  # and the flag is gone


def test_a_loss_that_is_no_number_reaches_the_gradient_whatever_its_graph_says() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = weight.sum() + torch.tensor(math.inf)  # its own gradient is 1
    loss.backward(StepGuard.seed(loss))
    assert weight.grad is not None and weight.grad.isnan().all()
    assert StepGuard.seed(torch.tensor(3.0)) == 1


def test_steps_in_a_row_are_counted_and_a_good_one_ends_the_row() -> None:
    guard = StepGuard(3, CPU)
    watched = watch(guard, BAD, BAD, GOOD, BAD, BAD)
    assert [step.was_skipped for step in watched] == [True, True, False, True, True]
    assert [step.step for step in watched] == [1, 2, 3, 4, 5]
    assert (guard.skipped_in_a_row, guard.gives_up) == (2, False)
    watch(guard, BAD)
    assert guard.gives_up


def test_float16_may_overflow_as_long_as_its_scale_can_be_lowered() -> None:
    guard = StepGuard(2, CPU)
    watched = watch(guard, *[OVERFLOW] * 16)
    assert all(step.was_skipped and step.overflowed for step in watched)
    assert "loss scale 1024" in watched[0].cause
    assert not guard.gives_up
    watch(
        guard, (math.nan, math.nan, 1024.0), OVERFLOW, EXHAUSTED
    )  # one that the scale cannot mend counts at once
    assert guard.gives_up


def test_with_a_scaler_a_skipped_step_lowers_the_scale() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)  # type: ignore[attr-defined]
    scales = []
    for factor in (1.0, math.inf, 1.0):
        loss = (weight * factor).sum()
        scaler.scale(loss).backward(StepGuard.seed(loss))
        scaler.unscale_(optimizer)
        assert weight.grad is not None
        StepGuard.step(optimizer, weight.grad.norm())
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [8, 4, 8]
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]
)
def test_a_fingerprint_depends_on_every_bit_and_on_the_shape(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(tensor.flatten())
    changed = tensor.clone()
    changed.view(torch.uint8)[1, 2, 3] ^= 1
    assert fingerprint(tensor) != fingerprint(changed)
    for some in (tensor[0, 0, 0], tensor[:0], tensor.transpose(0, 2)):
        assert len(fingerprint(some)) == 32


@pytest.mark.parametrize("part", ["weight", "running_mean"])
def test_frozen_parameters_and_buffers_are_checked_by_name(part: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    frozen = FrozenParts(model, trained={"0.weight": None, "0.bias": None})
    with torch.no_grad():
        model[0].weight.add_(1)
        frozen.check(model)
        getattr(model[1], part).add_(1e-6)
    with pytest.raises(TrainingError, match=f"1.{part} changed"):
        frozen.check(model)
