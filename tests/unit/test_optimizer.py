"""Learning rates, early stopping, and the moving average of the trained weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from vlm_bridge.training_strategy.optimizer import WeightAverage, learning_rate_at, warmup_within
from vlm_bridge.training_strategy.state import TrainState


def rates(kind: str, total_steps: int = 100, warmup_steps: int = 10) -> list[float]:
    """Return the rates of 130 steps between 1.0 and 0.1."""
    options = {"total_steps": total_steps, "warmup_steps": warmup_steps, "kind": kind}
    return [learning_rate_at(step, learning_rate=1.0, min_lr=0.1, **options) for step in range(130)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_learning_rate(kind: str) -> None:
    values = rates(kind)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == pytest.approx(1.0)
    assert rates(kind, warmup_steps=0)[0] == pytest.approx(1.0)


def test_schedules_fall_to_the_minimum_and_stay_there() -> None:
    for kind in ("cosine", "linear"):
        values = rates(kind)
        assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
        assert values[100:] == pytest.approx([0.1] * 30)
        assert values[55] == pytest.approx(0.55)  # half way, both have lost half
    assert rates("cosine")[10 + 30] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    assert rates("constant")[10:] == [1.0] * 120


@pytest.mark.parametrize(("total", "steps"), [(25, 2), (80, 8), (5000, 500), (62820, 500), (9, 0)])
def test_a_warm_up_takes_a_tenth_of_the_steps_at_most(total: int, steps: int) -> None:
    assert warmup_within(500, total) == steps


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0, 1.999, 1.998, 2.1, 2.1, 1.997, 2.0, 2.0), (True, True, True, 1, 2, True, 1, 2)),
        ((1.0, math.nan, 1.5, 0.5), (True, 1, 2, True)),
    ],
)
def test_any_new_best_resets_the_count_of_bad_validations(
    losses: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    state = TrainState(None, None, None)  # type: ignore[arg-type]
    assert tuple(state.watch(loss) or state.bad_validations for loss in losses) == expected


def test_the_average_follows_its_formula_and_stands_in_the_model_for_a_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    average = WeightAverage(model, decay=0.5)
    assert set(average.weights) == {"0.weight", "0.bias"}
    expected = model[0].weight.detach().clone()
    for step in (1, 2, 30):
        with torch.no_grad():
            model[0].weight.add_(1)
        average.update(step, torch.tensor(0.0))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    average.update(31, torch.tensor(1.0))  # a skipped step
    torch.testing.assert_close(average.weights["0.weight"], expected)

    own = model[0].weight.detach().clone()
    with average.in_model():
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight, own)
    assert torch.equal(average.live_weights["0.weight"], own)
    torch.testing.assert_close(average.weights["0.weight"], expected)
