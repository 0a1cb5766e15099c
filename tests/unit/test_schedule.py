"""Learning-rate schedules at their ends and in between, and early stopping."""

from __future__ import annotations

import itertools
import math

import pytest

from vlm_bridge.training_strategy.early_stopping import EarlyStopping
from vlm_bridge.training_strategy.schedule import learning_rate_at, warmup_within


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


def test_any_new_best_resets_the_count_as_in_the_published_system() -> None:
    stopping = EarlyStopping(patience=3, min_delta=0.0)
    losses = (2.0, 1.999, 1.998, 2.1, 2.1, 1.997, 2.0, 2.0, 2.0)
    assert [stopping.should_stop(loss) for loss in losses] == [False] * 8 + [True]


def test_early_stopping_counts_validations_without_improvement() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    # Less than min_delta is no improvement; a real one starts the count again.
    answers = [stopping.should_stop(loss) for loss in (3.0, 2.95, 2.5, 2.45, 2.44)]
    assert answers == [False, False, False, False, True]


def test_early_stopping_never_takes_nan_for_an_improvement() -> None:
    stopping = EarlyStopping(patience=1, min_delta=0.0)
    assert not stopping.should_stop(1.0)
    assert stopping.should_stop(float("nan"))
    assert stopping.best == 1.0


def test_early_stopping_continues_from_its_state() -> None:
    first = EarlyStopping(patience=2, min_delta=0.0)
    first.should_stop(1.0)
    first.should_stop(2.0)
    second = EarlyStopping(patience=2, min_delta=0.0)
    second.load_state_dict(first.state_dict())
    assert second == first
    assert second.should_stop(1.5)
