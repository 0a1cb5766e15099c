"""Trainings that meet what is no number, and those that run out of memory."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from logs import events, log_lines, saved
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.data_pipeline.features import SplitFeatures
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.errors import TrainingError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import monitor, trainer
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World, memory_explained
from vlm_bridge.training_strategy.monitor import BLIND_BELOW, Monitor
from vlm_bridge.training_strategy.step import StepResult, TrainStep
from vlm_bridge.training_strategy.trainer import train
from vlm_bridge.training_strategy.validation import Validation

MakeRecipe = Callable[..., Recipe]
SCST = ("objective=scst", "scst_samples=2")


class Poisoned(SplitFeatures):
    """Features, those of some images full of NaN: what a damaged cache gives."""

    images: ClassVar[set[int]] = set()

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        values = torch.as_tensor(super().__getitem__(indices)).clone()
        values[torch.tensor([index in self.images for index in indices.tolist()])] = torch.nan
        return values


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Damage the features of training images in this test's trainings."""
    opened = TrainingData.open

    def open_poisoned(*arguments: Any) -> TrainingData:
        data = opened(*arguments)
        features = Poisoned(data.train.features.items)
        return replace(data, train=replace(data.train, features=features))

    def poison(images: set[int]) -> None:
        monkeypatch.setattr(Poisoned, "images", images)
        monkeypatch.setattr(TrainingData, "open", open_poisoned)
        # Statistics are measured before: a poisoned image would void them all.
        monkeypatch.setattr(TrainingData, "sample_features", lambda *_: torch.zeros(2, 10, 32))

    return poison


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What a skipped step must leave alone, after each step of this test's trainings."""
    states: list[dict[str, torch.Tensor]] = []
    taken = TrainStep.__call__

    def take(step: TrainStep, *arguments: Any) -> StepResult:
        result = taken(step, *arguments)
        run = step.state
        state = dict(run.model.named_parameters())
        state |= {f"average {name}": value for name, value in run.average.weights.items()}
        for number, of_parameter in run.optimizer.state_dict()["state"].items():
            state |= {f"{number} {name}": value for name, value in of_parameter.items()}
        states.append({name: value.detach().clone() for name, value in state.items()})
        return result

    monkeypatch.setattr(TrainStep, "__call__", take)
    return states


def an_image_of(recipe: Recipe, step: int) -> int:
    """Return the last image of a 0-based step."""
    folder, world = open_data_folder(recipe.data_dir), World(torch.device("cpu"))
    plan = TrainingData.open(folder, build_captioner(recipe), recipe, world).plan
    return in_batches(plan.batches(0), recipe.gradient_accumulation_steps)[step][-1][-1].image


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("batch_size=2", "gradient_accumulation_steps=4", "weight_averaging=0.9"),
        (*SCST, "batch_size=4", "gradient_accumulation_steps=2"),
    ],
    ids=["plain", "accumulated and averaged", "scst"],
)
def test_a_step_of_a_damaged_image_changes_nothing_and_is_logged(
    make_recipe: MakeRecipe, poison: Any, states: Any, settings: tuple[str, ...]
) -> None:
    recipe, lines = make_recipe("run", *settings), log_lines()
    poison({an_image_of(recipe, 2)})
    assert train(recipe).steps == 6
    same = [
        all(torch.equal(value, after[name]) for name, value in before.items())
        for before, after in itertools.pairwise(states)
    ]
    assert same == [False, True, False, False, False]  # the third step
    assert all(value.isfinite().all() for value in states[-1].values())
    (skipped,) = events(recipe, "skipped")
    assert skipped["step"] == 3
    assert "nan" in skipped["cause"]
    assert "step 3 skipped: loss nan, gradient norm nan" in lines
    steps = events(recipe, "train")
    assert [event["step"] for event in steps] == [1, 2, 4, 5, 6]
    assert all(np.isfinite(value) for event in steps for value in list(event.values())[1:])


def test_training_stops_after_some_in_a_row_and_keeps_what_it_had(
    make_recipe: MakeRecipe, poison: Any, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "MAX_SKIPPED_IN_A_ROW", 2)
    recipe = make_recipe("run", "num_epochs=2", "save_every=2 steps")
    poison({an_image_of(recipe, step) for step in (1, 3, 4, 5)})
    with pytest.raises(TrainingError, match="stopped at step 5: 2 steps in a row") as stopped:
        train(recipe)
    kept = Path(recipe.checkpoint_dir) / checkpoints.STEP.format(5)
    assert str(kept) in str(stopped.value) and "\n" not in str(stopped.value)
    good = states[2]  # of step 3, the last good one
    for name, tensor in saved(recipe, kept.name)["weights"].items():
        assert name not in good or torch.equal(tensor, good[name])
    older = saved(recipe, checkpoints.STEP.format(2))["weights"]
    assert all(tensor.isfinite().all() for tensor in older.values())


@pytest.mark.parametrize("step", [1, 3])
def test_weights_that_overflow_stop_the_run_and_are_never_saved(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    recipe = make_recipe("run", "num_epochs=2", "save_every=2 steps", "log_every_n_steps=100")
    taken = TrainStep.__call__

    def explode(take_step: TrainStep, *arguments: Any) -> StepResult:
        result = taken(take_step, *arguments)
        if take_step.state.step == step:
            with torch.no_grad():
                take_step.parameters[0].mul_(torch.inf)
        return result

    monkeypatch.setattr(TrainStep, "__call__", explode)
    folder = Path(recipe.checkpoint_dir)
    kept = [] if step == 1 else [folder / checkpoints.STEP.format(2)]
    match = f"weights are not finite any more.*resume the last one in {folder}"
    with pytest.raises(TrainingError, match=match) as stopped:
        train(recipe)
    assert "\n" not in str(stopped.value)
    assert list(folder.glob("*")) == kept
    for path in kept:
        checkpoints.load_checkpoint(path)  # refuses what is not finite


def test_a_log_folder_that_fills_up_ends_the_run_in_one_line(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("run")
    written = monitor.append_line

    def full(path: Path, line: bytes) -> None:
        if b'"step": 3' in line:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, line)

    monkeypatch.setattr(monitor, "append_line", full)
    message = rf"cannot write {recipe.log_dir}: No space left on device \([^\n]*$"
    with pytest.raises(TrainingError, match=message):
        train(recipe)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line_with_settings_to_try(error: Exception) -> None:
    match = r"^out of memory on cpu: try [^\n]*batch_size[^\n]*gradient_checkpointing=true[^\n]*$"
    with pytest.raises(TrainingError, match=match), memory_explained(torch.device("cpu")):
        raise error


@pytest.mark.parametrize(("gain", "warns"), [(BLIND_BELOW / 2, True), (2 * BLIND_BELOW, False)])
def test_a_captioner_that_ignores_the_images_is_logged(gain: float, warns: bool) -> None:
    lines, captions = log_lines(), SimpleNamespace(mean_length=9.0, token_diversity=0.5)
    Monitor(None, "", 1).validation(1, 0, Validation(2.0, gain, 100), captions)  # type: ignore[arg-type]
    assert any("ignores the image" in line for line in lines) == warns
