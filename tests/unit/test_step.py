"""Optimizer steps, learning rates, and what is refused before the first step."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from captioners import tiny_captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError, VLMBridgeError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import distributed, trainer
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState, WeightAverage
from vlm_bridge.training_strategy.step import StepResult, TrainStep, learning_rate_at

CPU = torch.device("cpu")
NO_AVERAGE = WeightAverage(nn.Linear(1, 1), None)
Loss = Callable[[torch.Tensor], torch.Tensor]  # of the weight
PACKED = SimpleNamespace(num_supervised=1, num_captions=1, num_tokens=1, num_positions=1)


class Weight(nn.Module):
    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Objective:
    """A batch is its loss."""

    def captions(self, batch: Any, step: int, number: int) -> Any:
        return SimpleNamespace(packed=PACKED, loss=batch)

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.loss


@pytest.fixture
def step() -> TrainStep:
    model = Weight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return TrainStep(
        TrainState(model, optimizer, torch.GradScaler("cpu", enabled=False), NO_AVERAGE),  # type: ignore[arg-type]
        Objective(),  # type: ignore[arg-type]
        Recipe(learning_rate=0.1, scheduler_type="constant"),
        World(CPU),
        total_steps=100,
        relative_rates=[1.0],
        autocast=nullcontext,
    )


def take(step: TrainStep, *losses: Loss) -> StepResult:
    """Take a step of micro-batches with these losses."""
    return step([loss(step.parameters[0]) for loss in losses], steps_in_epoch=100)


good: Loss = torch.sum
POISON: dict[str, Loss] = {
    "not a number": lambda weight: weight.sum() * math.nan,
    "infinite, with a finite gradient": lambda weight: weight.sum() + math.inf,
    "finite, with a gradient whose norm overflows": lambda weight: (weight * 3e38).sum(),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(
    step: TrainStep, poison: Loss
) -> None:
    state, weight = step.state, step.parameters[0]
    assert not take(step, good).was_skipped
    before = [weight.detach().clone(), *(v.clone() for v in state.optimizer.state[weight].values())]
    assert not torch.equal(before[0], torch.ones(3))
    assert take(step, good, poison).was_skipped
    after = [weight.detach(), *state.optimizer.state[weight].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not take(step, good).was_skipped
    assert state.optimizer.state[weight]["step"] == 2
    assert (state.step, state.skipped_in_a_row, state.epoch_steps) == (3, 0, 2)
    take(step, poison)
    take(step, poison)
    assert (state.step, state.skipped_in_a_row, state.epoch_steps) == (5, 2, 2)


def test_float16_overflows_until_its_scale_is_low_enough(step: TrainStep) -> None:
    step.state.scaler = torch.GradScaler("cpu", init_scale=2.0**70)
    first, *_, last = (take(step, lambda weight: (weight * 1e18).sum()) for _ in range(4))
    assert first.was_skipped and not last.was_skipped


def test_micro_batches_add_up(step: TrainStep) -> None:
    result = take(step, good, lambda weight: 3 * weight.sum())
    assert result.loss == pytest.approx((3 + 9) / 2)
    assert result.gradient_norm == pytest.approx(math.sqrt(3) * 2)


def rates(kind: str, total_steps: int = 100, warmup_steps: int = 10) -> list[float]:
    """Return the rates of 130 steps between 1.0 and 0.1."""
    recipe = override_recipe(
        Recipe(learning_rate=1.0, min_lr=0.1),
        [f"scheduler_type={kind}", f"warmup_steps={warmup_steps}"],
    )
    return [learning_rate_at(step, total_steps, recipe) for step in range(130)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_linearly_and_falls_to_its_minimum(kind: str) -> None:
    values = rates(kind)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == rates(kind, warmup_steps=0)[0] == 1.0
    if kind == "constant":
        assert values[10:] == [1.0] * 120
        return
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[100:] == pytest.approx([0.1] * 30)
    assert values[55] == pytest.approx(0.55)  # half way, both have lost half
    third = (1 + math.cos(math.pi / 3)) / 2 if kind == "cosine" else 2 / 3
    assert values[10 + 30] == pytest.approx(0.1 + 0.9 * third)


@pytest.mark.parametrize(("total", "steps"), [(25, 2), (80, 8), (1200, 120), (9, 0)])
def test_a_warm_up_takes_a_tenth_of_the_steps_at_most(total: int, steps: int) -> None:
    assert rates("linear", total, warmup_steps=500).index(1.0) == max(0, steps - 1)


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
    state = TrainState(None, None, None, NO_AVERAGE)  # type: ignore[arg-type]
    assert tuple(state.watch(loss) or state.bad_validations for loss in losses) == expected


def test_the_average_follows_its_formula_and_stands_in_the_model_for_a_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    average = WeightAverage(model, decay=0.5)
    assert set(average.weights) == {"0.weight", "0.bias"}
    expected = model[0].weight.detach().clone()
    for step in (1, 2, 30):
        with torch.no_grad():
            model[0].weight.add_(1)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.weights["0.weight"], expected)

    own = model[0].weight.detach().clone()
    with average.in_model():
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight, own)
    assert torch.equal(average.live_weights["0.weight"], own)
    torch.testing.assert_close(average.weights["0.weight"], expected)


MakeRecipe = Callable[..., Recipe]
Refused = Callable[..., None]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Expect an error of a training before a model is loaded."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    def refuse(recipe: Recipe, error: type[VLMBridgeError], match: str, **resume: Any) -> None:
        monkeypatch.setattr(trainer, "build_captioner", never)
        with pytest.raises(error, match=match):
            trainer.train(recipe, **resume)

    return refuse


def test_mistakes_of_a_resume(make_recipe: MakeRecipe, refused: Refused, tmp_path: Path) -> None:
    recipe, others = make_recipe("run"), make_recipe("run", "bridge.num_heads=2")
    weights = tiny_captioner(recipe).trained_state_dict()
    path, bare = tmp_path / "latest.pth", tmp_path / "weights.pth"
    training = {"progress": {}, "dataset_fingerprint": "of no data"}
    checkpoints.save_checkpoint(path, recipe, weights, training)
    checkpoints.save_checkpoint(bare, recipe, weights)
    changed = recipe.replace(batch_size=4)
    refused(changed, CheckpointError, "batch_size=4, was 8", resume=path)
    refused(others, CheckpointError, r"bridge\.num_heads=4", resume=path)
    refused(recipe, CheckpointError, "no checkpoint at", resume=tmp_path / "nothing.pth")
    refused(recipe, CheckpointError, f"weights only.*start_from={bare}", resume=bare)
    start = others.replace(start_from=str(bare))
    refused(start, CheckpointError, r"bridge\.num_heads=4, wanted is 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_dir"])
def test_a_folder_that_cannot_be_made(
    make_recipe: MakeRecipe, refused: Refused, tmp_path: Path, key: str
) -> None:
    (tmp_path / "file").touch()
    recipe = make_recipe("run", f"{key}={tmp_path / 'file' / 'run'}")
    match = f"cannot write into {key}=.*Not a directory.*another folder with {key}="
    refused(recipe, ConfigurationError, match)


def test_a_full_disk(
    make_recipe: MakeRecipe, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(distributed.os, "fsync", full)
    match = "checkpoint_dir=.*No space left on device.*free some space"
    refused(make_recipe("run"), ConfigurationError, match)
