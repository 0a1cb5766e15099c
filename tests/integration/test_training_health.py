"""Trainings that meet what is no number, and those that run out of memory."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from captioners import places_of_run, tiny_recipe
from logs import log_lines
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import TrainingError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import trainer as training
from vlm_bridge.training_strategy.monitor import BLIND_VALIDATIONS, Monitor
from vlm_bridge.training_strategy.out_of_memory import explanation, is_out_of_memory
from vlm_bridge.training_strategy.trainer import Trainer
from vlm_bridge.training_strategy.validation import BLIND_BELOW, Validation

MakeRecipe = Callable[..., Recipe]
SCST = ("objective=scst", "scst_samples=2")


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> MakeRecipe:
    """Recipes of six steps of four images: ``make_recipe("name", "KEY=VALUE", bridge="prefix")``."""

    def make(name: str, *overrides: str, bridge: str = "prefix") -> Recipe:
        recipe = tiny_recipe(
            tiny_vit_dir,
            tiny_llama_dir,
            bridge,
            **places_of_run(tmp_path, name, drawn_caption_folder),
            num_epochs=1,
            learning_rate=1e-2,
            scheduler_type="constant",
            batch_size=8,
            captions_per_image=2,
            log_every_n_steps=1,
            num_validation_samples=0,
            decode={"num_beams": 1, "max_new_tokens": 5},
        )
        return override_recipe(recipe, overrides)

    return make


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
    """A trainer in this process; ``weights`` are those after each step."""

    def __init__(self, recipe: Recipe, poison: set[int] | None = None, **resume: Any):
        self.lines = log_lines()
        self.recipe = recipe
        self.trainer = Trainer(recipe, self.lines.append, **resume)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.trainer.train_features = Poisoned(self.trainer.train_features, poison or set())  # type: ignore[assignment]
        # The statistics of features are measured before: a poisoned image would void them all.
        self.trainer._sample_features = lambda: torch.zeros(2, *self.shape)  # type: ignore[method-assign]
        after_step = self.trainer._after_step

        def remember() -> None:
            self.weights.append(self._state())
            after_step()

        self.trainer._after_step = remember  # type: ignore[method-assign]

    @property
    def shape(self) -> tuple[int, int]:
        encoder: Any = self.trainer.model.vision_encoder
        return encoder.num_tokens, encoder.embed_dim

    def _state(self) -> dict[str, torch.Tensor]:
        """All that a skipped step must leave alone."""
        state = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        if self.trainer.average is not None:
            state |= {f"average {k}": v.clone() for k, v in self.trainer.average.weights.items()}
        for number, of_parameter in self.trainer.optimizer.state_dict()["state"].items():
            state |= {f"{number} {name}": value.clone() for name, value in of_parameter.items()}
        return state

    def events(self, kind: str) -> list[dict[str, Any]]:
        history = Path(self.recipe.log_dir) / "history.jsonl"
        events = map(json.loads, history.read_text(encoding="utf-8").splitlines())
        return [event for event in events if event["event"] == kind]

    def images_of_step(self, step: int) -> list[int]:
        batches = self.trainer.plan.batches(0)
        each = self.recipe.gradient_accumulation_steps
        return [
            row.image for index in range(step * each, (step + 1) * each) for row in batches[index]
        ]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("batch_size=2", "gradient_accumulation_steps=4"),
        ("weight_averaging=0.9",),
        (*SCST,),
        (*SCST, "scst_baseline=greedy", "batch_size=4", "gradient_accumulation_steps=2"),
    ],
    ids=["plain", "accumulation", "averaged", "scst", "scst, greedy and accumulation"],
)
def test_a_step_of_a_damaged_image_changes_nothing_and_is_told(
    make_recipe: MakeRecipe, settings: tuple[str, ...]
) -> None:
    recipe = make_recipe("run", *settings)
    image = Run(recipe).images_of_step(2)[-1]
    run = Run(recipe, {image})
    result = run.trainer.run()
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
    paths = run.trainer.train_paths
    assert skipped["images"] == [paths[index].name for index in run.images_of_step(2)]
    assert any(paths[image].name in line and "step 3 skipped" in line for line in run.lines)
    assert [event["step"] for event in run.events("train")] == [1, 2, 4, 5, 6]
    assert all(
        np.isfinite(value) for event in run.events("train") for value in list(event.values())[1:]
    )
    content = checkpoints.load_checkpoint(Path(recipe.checkpoint_dir) / checkpoints.LATEST)
    assert content["training"]["progress"]["skipped_steps"] == 1


def test_training_stops_after_some_in_a_row_and_keeps_what_it_had(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MAX_SKIPPED_STEPS", 2)
    recipe = make_recipe("run", "num_epochs=2", "save_every=2 steps")
    images = {image for step in (1, 3, 4, 5) for image in Run(recipe).images_of_step(step)}
    run = Run(recipe, images)
    with pytest.raises(TrainingError, match="stopped at step 5: 2 steps in a row") as stopped:
        run.trainer.run()
    folder = Path(recipe.checkpoint_dir)
    kept = folder / checkpoints.STEP.format(5)
    assert str(kept) in str(stopped.value) and "\n" not in str(stopped.value)
    weights = checkpoints.load_checkpoint(kept)["weights"]
    for name, value in run.weights[2].items():  # of step 3, the last good one
        if name in weights:
            assert torch.equal(weights[name], value)
    older = checkpoints.load_checkpoint(folder / checkpoints.STEP.format(2))
    assert all(tensor.isfinite().all() for tensor in older["weights"].values())


def explode(run: Run, step: int) -> None:
    """Make the weights infinite in a step whose loss and gradient are finite."""
    update = run.trainer.guard.step

    def overflows(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
        skipped = update(optimizer, norm)
        if run.trainer.progress.step + 1 == step:
            with torch.no_grad():
                run.trainer.parameters[0].mul_(torch.inf)
        return skipped

    run.trainer.guard.step = overflows  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_overflow_stop_the_run_and_are_never_saved(
    make_recipe: MakeRecipe, log_every: int
) -> None:
    settings = (
        "num_epochs=2",
        "save_every=2 steps",
        f"log_every_n_steps={log_every}",
    )
    run = Run(make_recipe("run", *settings))
    explode(run, step=3)
    with pytest.raises(TrainingError, match="weights are not finite any more") as stopped:
        run.trainer.run()
    folder = Path(run.recipe.checkpoint_dir)
    kept = folder / checkpoints.STEP.format(2)
    assert f"resume {kept}, the last checkpoint before that" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert list(folder.iterdir()) == [kept]
    checkpoints.load_checkpoint(kept)  # refuses what is not finite


def test_weights_that_overflow_before_anything_is_saved(make_recipe: MakeRecipe) -> None:
    run = Run(make_recipe("run"))
    explode(run, step=1)
    with pytest.raises(
        TrainingError, match=r"stopped at step 1: .* start with a learning_rate below 0.01"
    ):
        run.trainer.run()
    assert not Path(run.recipe.checkpoint_dir).exists()


def test_a_log_folder_that_fills_up_ends_the_run_in_one_line(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's thread fails first, as it does where the disk is full."""
    run = Run(make_recipe("run"))
    written = RecordWriter.write

    def full(self: RecordWriter, data: bytes) -> None:
        if run.trainer.progress.step >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    hook = threading.excepthook
    with pytest.raises(TrainingError) as stopped:
        run.trainer.run()
    assert str(stopped.value).startswith(
        f"cannot write {run.recipe.log_dir}: No space left on device ("
    )
    assert threading.excepthook is hook
    assert "Traceback" not in capfd.readouterr().err


def out_of_memory_above(rows: int) -> Callable[..., Any]:
    """The loss of a batch, or what a GPU says when a batch has more rows than it has memory for."""
    batch_loss = training.batch_loss

    def loss(model: Any, batch: Any, *arguments: Any) -> Any:
        if len(batch.packed.image_indices) > rows:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
            )
        return batch_loss(model, batch, *arguments)

    return loss


def test_running_out_of_memory_is_one_line_that_says_what_to_try(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "batch_loss", out_of_memory_above(rows=0))
    with pytest.raises(TrainingError) as error:
        training.train(make_recipe("run"))
    said = str(error.value)
    assert "\n" not in said
    for mention in (
        "out of memory on cpu, asking for 2.00 GiB", "in use",
        "batch_size=4 gradient_accumulation_steps=2 (now 8 and 1)",
        "gradient_checkpointing=true (now false)", "amp_dtype=bfloat16 (now float32)",
    ):  # fmt: skip
        assert mention in said


def test_only_memory_that_runs_out_is_called_so(make_recipe: MakeRecipe) -> None:
    of_the_cpu = RuntimeError(
        "[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
    )
    assert is_out_of_memory(of_the_cpu)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    small = make_recipe("run", "batch_size=2", "gradient_checkpointing=true", "amp_dtype=bfloat16")
    said = explanation(of_the_cpu, small, torch.device("cpu"))
    assert "asking for 99 bytes" in said
    assert said.endswith(
        "try language_model.dtype=bfloat16 (now float32) or max_caption_tokens=64 (now 128) or captions_per_image=1 "
        "(now 2)"
    )


def test_a_frozen_part_that_changes_is_named(make_recipe: MakeRecipe) -> None:
    run = Run(make_recipe("run"))
    language_model: Any = run.trainer.model.language_model
    run.trainer._show_samples = lambda: language_model.causal_lm.model.norm.weight.data.mul_(1.01)  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"language_model\.causal_lm\.model\.norm\.weight changed"
    ):
        run.trainer.run()


def test_captions_that_ignore_the_pictures_are_told_once_in_a_row(tmp_path: Path) -> None:
    lines = log_lines()
    monitor = Monitor(tmp_path)
    read: Any = SimpleNamespace(mean_length=9.0, token_diversity=0.5)
    blind, seeing = Validation(2.0, BLIND_BELOW / 2, 100), Validation(2.0, 2 * BLIND_BELOW, 100)

    def alarms(*results: Validation, is_last: bool = False) -> int:
        lines.clear()
        for number, result in enumerate(results):
            monitor.validation(
                number, number, result, read, is_last=is_last and result is results[-1]
            )
        return sum("ignoring the image" in line for line in lines)

    assert (
        alarms(*[blind] * (BLIND_VALIDATIONS - 1), seeing, *[blind] * (BLIND_VALIDATIONS - 1)) == 0
    )
    assert alarms(blind, blind, blind) == 1
    assert alarms(seeing, blind, is_last=True) == 0  # too few to call it a fault
    assert "does not look at its images yet" in lines[-1]
    monitor.close()
