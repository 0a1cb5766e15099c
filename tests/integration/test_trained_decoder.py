"""A decoder trained along with its projection: what is saved, chosen, kept and continued."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from captioners import places_of_run, tiny_recipe
from logs import log_lines
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import TrainingResult, train

MakeRecipe = Callable[..., Recipe]
BY_STEPS = ("save_every=4 steps", "validate_every=4 steps")


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_bert_dir: Path
) -> MakeRecipe:
    """BERT with dropout, trained whole at a tenth of the projection's rate."""

    def make(name: str, *overrides: str) -> Recipe:
        settings = {
            "trainable": {"bridge.*": None, "language_model.*": 1e-3}, "learning_rate": 1e-2,
            "num_epochs": 2, "batch_size": 8, "captions_per_image": 2, "warmup_steps": 2,
            "early_stopping_patience": None, "log_every_n_steps": 1, "num_validation_samples": 1,
            "monitor": "cider", "num_decoded_images": 6,
            "decode": {"num_beams": 1, "max_new_tokens": 8},
            **places_of_run(tmp_path, name, drawn_caption_folder),
        }  # fmt: skip
        recipe = tiny_recipe(tiny_vit_dir, tiny_bert_dir, "projection", **settings)
        return override_recipe(recipe, overrides)

    return make


class Run:
    """A training inside this process, with its console lines and checkpoints."""

    def __init__(self, recipe: Recipe, resume: Path | None = None, *, force: bool = False):
        self.lines = log_lines()
        self.folder = Path(recipe.checkpoint_dir)
        self.result: TrainingResult = train(recipe, resume=resume, force=force)

    def checkpoint(self, name: str = checkpoints.LATEST) -> dict[str, Any]:
        return checkpoints.load_checkpoint(self.folder / name)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        history = self.folder.parent / "logs" / "history.jsonl"
        events = map(json.loads, history.read_text(encoding="utf-8").splitlines())
        return [event for event in events if event["event"] == kind]


def step(number: int) -> str:
    return checkpoints.STEP.format(number)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints are bit-equal in weights, optimiser state, randomness and position."""
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name
    first, second = one["training"], other["training"]
    assert first["progress"] == second["progress"]
    assert first["early_stopping"] == second["early_stopping"]
    assert torch.equal(first["random_state"], second["random_state"])
    for key, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][key][name])


def test_resuming_inside_an_epoch_is_never_having_stopped(make_recipe: MakeRecipe) -> None:
    settings = (*BY_STEPS, "decode.do_sample=true")
    whole = Run(make_recipe("whole", *settings))
    assert {step(4), step(8), step(12)} <= whole.names()
    for number in (4, 8, 12):
        name = f"resumed-{number}"
        recipe = make_recipe(name, *settings)
        Path(recipe.checkpoint_dir).mkdir(parents=True)
        copied = shutil.copy(whole.folder / step(number), recipe.checkpoint_dir)
        resumed = Run(recipe, Path(copied))
        assert_same(whole.checkpoint(), resumed.checkpoint())
        expected = [event for event in whole.events("train") if event["step"] > number]
        assert [e["loss"] for e in resumed.events("train")] == [e["loss"] for e in expected]
        assert [e["learning_rate"] for e in resumed.events("train")] == [
            e["learning_rate"] for e in expected
        ]
        # Even a run that stopped after its last step validates, and says how it captions.
        assert resumed.result.validation == whole.result.validation
        assert resumed.result.decoded == whole.result.decoded


def test_every_trained_part_learns_at_its_rate_and_the_rest_stays(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("run", "num_epochs=3")
    before = build_captioner(recipe)
    run = Run(recipe)
    losses = [event["loss"] for event in run.events("validation")]
    assert losses[-1] < losses[0]
    content = run.checkpoint()
    parameters = {name for name, _ in before.named_parameters()}
    in_encoder = {name for name in parameters if name.startswith("vision_encoder.")}
    assert content["weights"].keys() == (parameters - in_encoder) | {
        "feature_scale.mean",
        "feature_scale.std",
    }
    for name, tensor in content["weights"].items():
        if name not in parameters or "key.bias" in name:  # softmax knows no shift of all keys
            continue
        assert not torch.equal(tensor, before.state_dict()[name]), f"{name} has not moved"
    groups = content["training"]["optimizer"]["param_groups"]
    for group in groups:
        ratio = group["lr"] / max(other["lr"] for other in groups)
        in_decoder = all(name.startswith("language_model.") for name in group["param_names"])
        assert ratio == pytest.approx(0.1 if in_decoder else 1.0)


def test_the_best_checkpoint_is_that_of_the_best_score(make_recipe: MakeRecipe) -> None:
    run = Run(make_recipe("run", *BY_STEPS, "num_epochs=3"))
    decoded = [event for event in run.events("decoded") if event["num_images"] == 6]
    assert [event["step"] for event in decoded] == [4, 8, 12, 16, 18]
    best = max(decoded, key=lambda event: (event["cider"], -event["step"]))
    progress = run.checkpoint(checkpoints.BEST)["training"]["progress"]
    assert progress["step"] == best["step"]
    assert any(f"step {best['step']} captions of 6 images | BLEU-4" in line for line in run.lines)


def test_the_newest_step_checkpoints_are_kept(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("run", *BY_STEPS, "monitor=loss", "num_decoded_images=0")
    folder = Path(recipe.checkpoint_dir)
    folder.mkdir(parents=True)
    for old in (100, 200, 300):  # of an earlier, longer run: later steps, and older files
        (folder / step(old)).write_bytes(b"old")
        os.utime(folder / step(old), (old, old))
    run = Run(recipe)
    best = {checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS}
    assert run.names() == best | {step(4), step(8), step(12)}
    assert run.checkpoint(step(8))["training"]["progress"]["step_in_epoch"] == 2
    assert not run.events("decoded")


def test_resuming_other_patterns_is_refused(make_recipe: MakeRecipe) -> None:
    def patterns(*names: str, rate: str = "1.0e-3") -> str:
        decoder = "".join(f", language_model.*{name}*: {rate}" for name in names)
        return f"trainable={{bridge.*: null{decoder}}}"

    run = Run(
        make_recipe("run", patterns("crossattention", "query"), "num_epochs=1", "monitor=loss")
    )
    latest = run.folder / checkpoints.LATEST
    with pytest.raises(CheckpointError, match="another architecture: it has trainable="):
        Run(make_recipe("run", patterns("crossattention")), latest)
    # The queries of cross-attention are of both patterns: whichever comes first decides.
    with pytest.raises(CheckpointError, match="keep the patterns under trainable in their order"):
        Run(make_recipe("run", patterns("query", "crossattention")), latest, force=True)
    slower = Run(
        make_recipe("run", patterns("crossattention", "query", rate="null")), latest, force=True
    )
    assert slower.result.steps == 12
    assert any("changed by --force: trainable" in line for line in slower.lines)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_float16_alone_scales_gradients(
    make_recipe: MakeRecipe, amp_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU computes in float16 too, slowly.
    monkeypatch.setattr("vlm_bridge.training_strategy.trainer.check_machine", lambda *_: None)
    short = ("max_steps=1", "monitor=loss", "num_validation_samples=0", "num_decoded_images=0")
    run = Run(make_recipe("run", f"amp_dtype={amp_dtype}", *short))
    assert bool(run.checkpoint()["training"]["scaler"]) == (amp_dtype == "float16")
