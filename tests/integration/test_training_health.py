"""Trainings that meet what is no number, and those that run out of memory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from captioners import places_of_run, tiny_recipe
from logs import log_lines
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.errors import TrainingError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import monitor as monitoring
from vlm_bridge.training_strategy import trainer as training
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World, memory_explained
from vlm_bridge.training_strategy.monitor import Monitor
from vlm_bridge.training_strategy.state import TrainState
from vlm_bridge.training_strategy.step import TrainStep
from vlm_bridge.training_strategy.trainer import TrainingResult
from vlm_bridge.training_strategy.validation import BLIND_BELOW, Validation

MakeRecipe = Callable[..., Recipe]
SCST = ("objective=scst", "scst_samples=2")


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> MakeRecipe:
    """Return recipes of six steps of four images: ``make_recipe("KEY=VALUE")``."""
    recipe = tiny_recipe(
        tiny_vit_dir,
        tiny_llama_dir,
        **places_of_run(tmp_path, "run", drawn_caption_folder),
        num_epochs=1,
        learning_rate=1e-2,
        scheduler_type="constant",
        batch_size=8,
        captions_per_image=2,
        log_every_n_steps=1,
        num_validation_samples=0,
        decode={"num_beams": 1, "max_new_tokens": 5},
    )
    return lambda *overrides: override_recipe(recipe, overrides)


class Poisoned:
    """Features, those of some images full of NaN: what a damaged cache gives."""

    def __init__(self, features: Any, images: set[int]):
        self.features = features
        self.images = images

    def in_epoch(self, epoch: int) -> Poisoned:
        return Poisoned(self.features.in_epoch(epoch), self.images)

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        values = torch.as_tensor(self.features[indices]).clone()
        values[torch.tensor([index in self.images for index in indices.tolist()])] = torch.nan
        return values


class Run:
    """A training in this process; ``weights`` are those after each step."""

    def __init__(self, recipe: Recipe, poison: set[int] | None = None):
        self.lines = log_lines()
        self.recipe, self.poison = recipe, poison or set()
        self.weights: list[dict[str, torch.Tensor]] = []
        self.explodes_in_step = 0

    def train(self) -> TrainingResult:
        with pytest.MonkeyPatch.context() as patch:
            opened, taken = TrainingData.open, TrainStep.__call__

            def open_poisoned(*arguments: Any) -> TrainingData:
                data = opened(*arguments)
                features: Any = Poisoned(data.train.features, self.poison)
                return replace(data, train=replace(data.train, features=features))

            def take(step: TrainStep, *arguments: Any) -> Any:
                size = taken(step, *arguments)
                if step.state.step == self.explodes_in_step:
                    with torch.no_grad():
                        step.parameters[0].mul_(torch.inf)
                self.weights.append(self._state(step.state))
                return size

            # Statistics are measured before: a poisoned image would void them all.
            patch.setattr(TrainingData, "sample_features", lambda *_: torch.zeros(2, 10, 32))
            patch.setattr(TrainingData, "open", open_poisoned)
            patch.setattr(TrainStep, "__call__", take)
            return training.train(self.recipe)

    def _state(self, run: TrainState) -> dict[str, torch.Tensor]:
        """Everything that a skipped step must leave alone."""
        state = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        state |= {f"average {k}": v.clone() for k, v in run.average.weights.items()}
        for number, of_parameter in run.optimizer.state_dict()["state"].items():
            state |= {f"{number} {name}": value.clone() for name, value in of_parameter.items()}
        return state

    def events(self, kind: str) -> list[dict[str, Any]]:
        history = Path(self.recipe.log_dir) / "history.jsonl"
        events = map(json.loads, history.read_text(encoding="utf-8").splitlines())
        return [event for event in events if event["event"] == kind]


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
    make_recipe: MakeRecipe, settings: tuple[str, ...]
) -> None:
    recipe = make_recipe(*settings)
    run = Run(recipe, {an_image_of(recipe, 2)})
    result = run.train()
    assert result.steps == 6

    same = [
        all(torch.equal(value, after[name]) for name, value in before.items())
        for before, after in zip(run.weights, run.weights[1:], strict=False)
    ]
    assert same == [False, True, False, False, False]  # the third step
    assert all(value.isfinite().all() for value in run.weights[-1].values())
    (skipped,) = run.events("skipped")
    assert skipped["step"] == 3
    assert "nan" in skipped["cause"]
    assert "step 3 skipped: loss nan, gradient norm nan" in run.lines
    assert [event["step"] for event in run.events("train")] == [1, 2, 4, 5, 6]
    assert all(
        np.isfinite(value) for event in run.events("train") for value in list(event.values())[1:]
    )


def test_training_stops_after_some_in_a_row_and_keeps_what_it_had(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MAX_SKIPPED_IN_A_ROW", 2)
    recipe = make_recipe("num_epochs=2", "save_every=2 steps")
    run = Run(recipe, {an_image_of(recipe, step) for step in (1, 3, 4, 5)})
    with pytest.raises(TrainingError, match="stopped at step 5: 2 steps in a row") as stopped:
        run.train()
    folder = Path(recipe.checkpoint_dir)
    kept = folder / checkpoints.STEP.format(5)
    assert str(kept) in str(stopped.value) and "\n" not in str(stopped.value)
    weights = checkpoints.load_checkpoint(kept)["weights"]
    for name, value in run.weights[2].items():  # of step 3, the last good one
        if name in weights:
            assert torch.equal(weights[name], value)
    older = checkpoints.load_checkpoint(folder / checkpoints.STEP.format(2))
    assert all(tensor.isfinite().all() for tensor in older["weights"].values())


@pytest.mark.parametrize("step", [1, 3])
def test_weights_that_overflow_stop_the_run_and_are_never_saved(
    make_recipe: MakeRecipe, step: int
) -> None:
    run = Run(make_recipe("num_epochs=2", "save_every=2 steps", "log_every_n_steps=100"))
    run.explodes_in_step = step
    folder = Path(run.recipe.checkpoint_dir)
    kept = [] if step == 1 else [folder / checkpoints.STEP.format(2)]
    match = f"weights are not finite any more.*resume the last checkpoint in {folder}"
    with pytest.raises(TrainingError, match=match) as stopped:
        run.train()
    assert "\n" not in str(stopped.value)
    assert list(folder.glob("*")) == kept
    for path in kept:
        checkpoints.load_checkpoint(path)  # refuses what is not finite


def test_a_log_folder_that_fills_up_ends_the_run_in_one_line(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(make_recipe())
    written = monitoring.append_line

    def full(path: Path, line: bytes) -> None:
        if len(run.weights) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, line)

    monkeypatch.setattr(monitoring, "append_line", full)
    with pytest.raises(TrainingError) as stopped:
        run.train()
    assert str(stopped.value).startswith(
        f"cannot write {run.recipe.log_dir}: No space left on device ("
    )
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
