"""Learning-rate schedules at their ends and in between, and early stopping."""

from __future__ import annotations

import itertools
import math

import pytest

from vlm_bridge.training_strategy.optimizer import learning_rate_at, warmup_within
from vlm_bridge.training_strategy.state import TrainState


def rates(
    kind: str, total_steps: int = 100, warmup_steps: int = 10, steps: int | None = None
) -> list[float]:
    return [
        learning_rate_at(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            learning_rate=1.0,
            min_lr=0.1,
            kind=kind,
        )
        for step in range(steps or total_steps + 1)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_learning_rate(kind: str) -> None:
    values = rates(kind)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == pytest.approx(1.0)
    assert rates(kind, warmup_steps=0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_falls_to_the_minimum_and_stays_there(kind: str) -> None:
    values = rates(kind, steps=130)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[100:] == pytest.approx([0.1] * 30)
    # Half way, both have lost half.
    assert values[55] == pytest.approx(0.55)


def test_cosine_is_a_cosine() -> None:
    assert rates("cosine")[10 + 30] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)


def test_constant_stays() -> None:
    assert rates("constant")[10:] == [1.0] * 91


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_warm_up_longer_than_the_training_divides_by_nothing(kind: str) -> None:
    assert all(0 < rate <= 1 for rate in rates(kind, total_steps=5, warmup_steps=5))
    assert all(0 < rate <= 1 for rate in rates(kind, total_steps=5, warmup_steps=50))


@pytest.mark.parametrize(("total", "steps"), [(25, 2), (80, 8), (5000, 500), (62820, 500), (9, 0)])
def test_a_warm_up_takes_a_tenth_of_the_steps_at_most(total: int, steps: int) -> None:
    assert warmup_within(500, total) == steps


def bad_validations(*losses: float) -> list[int]:
    state = TrainState(None, None, None)  # type: ignore[arg-type]
    return [state.watch(loss) or state.bad_validations for loss in losses]


def test_any_new_best_resets_the_count_as_in_the_published_system() -> None:
    counts = bad_validations(2.0, 1.999, 1.998, 2.1, 2.1, 1.997, 2.0, 2.0, 2.0)
    assert counts == [True, True, True, 1, 2, True, 1, 2, 3]


def test_nan_is_never_a_new_best() -> None:
    assert bad_validations(1.0, math.nan, 1.5, 0.5) == [True, 1, 2, True]
