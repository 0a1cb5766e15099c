"""A decoder trained along with its projection: what is saved, chosen, kept and continued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from captioners import places_of_run, tiny_recipe
from logs import events, log_lines, saved
from same import assert_same_checkpoints
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train

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


def step(number: int) -> str:
    return checkpoints.STEP.format(number)


def test_resuming_inside_an_epoch_is_never_having_stopped(make_recipe: MakeRecipe) -> None:
    settings = (*BY_STEPS, "decode.do_sample=true")
    whole = make_recipe("whole", *settings)
    expected = train(whole)
    for number in (4, 12):
        recipe = make_recipe(f"resumed-{number}", *settings)
        folder = Path(recipe.checkpoint_dir)
        folder.mkdir(parents=True)
        copied = shutil.copy(Path(whole.checkpoint_dir, step(number)), folder)
        result = train(recipe, resume=Path(copied))
        latest = Path(whole.checkpoint_dir, checkpoints.LATEST)
        assert_same_checkpoints(latest, folder / checkpoints.LATEST)
        for key in ("loss", "learning_rate"):
            rest = [event[key] for event in events(whole, "train") if event["step"] > number]
            assert [event[key] for event in events(recipe, "train")] == rest
        # A run that stopped after its last step validates, too.
        assert (result.validation, result.decoded) == (expected.validation, expected.decoded)


def test_the_best_checkpoint_is_that_of_the_best_score(make_recipe: MakeRecipe) -> None:
    lines, recipe = log_lines(), make_recipe("run", *BY_STEPS, "num_epochs=3")
    train(recipe)
    decoded = [event for event in events(recipe, "decoded") if event["num_images"] == 6]
    assert [event["step"] for event in decoded] == [4, 8, 12, 16, 18]
    best = max(decoded, key=lambda event: (event["cider"], -event["step"]))
    progress = saved(recipe, checkpoints.BEST)["training"]["progress"]
    assert progress["step"] == best["step"]
    assert any(f"step {best['step']} captions of 6 images | BLEU-4" in line for line in lines)


def test_the_newest_step_checkpoints_are_kept(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("run", *BY_STEPS, "monitor=loss", "num_decoded_images=0")
    folder = Path(recipe.checkpoint_dir)
    folder.mkdir(parents=True)
    for old in (100, 200, 300):  # of an earlier, longer run: later steps, and older files
        (folder / step(old)).write_bytes(b"old")
        os.utime(folder / step(old), (old, old))
    train(recipe)
    best = {checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS}
    assert {path.name for path in folder.iterdir()} == best | {step(4), step(8), step(12)}
    assert saved(recipe, step(8))["training"]["progress"]["step_in_epoch"] == 2
    assert not events(recipe, "decoded")


def test_resuming_other_patterns_is_refused(make_recipe: MakeRecipe) -> None:
    def make(*names: str, rate: str = "1.0e-3", epochs: int = 2) -> Recipe:
        decoder = "".join(f", language_model.*{name}*: {rate}" for name in names)
        patterns = f"trainable={{bridge.*: null{decoder}}}"
        return make_recipe("run", patterns, "monitor=cider", f"num_epochs={epochs}")

    lines, recipe = log_lines(), make("crossattention", "query", epochs=1)
    train(recipe)
    latest = Path(recipe.checkpoint_dir, checkpoints.LATEST)
    with pytest.raises(CheckpointError, match="another architecture: it has trainable="):
        train(make("crossattention"), resume=latest)
    # The queries of cross-attention are of both patterns: whichever comes first decides.
    with pytest.raises(CheckpointError, match="keep the patterns under trainable in their order"):
        train(make("query", "crossattention"), resume=latest, force=True)
    slower = train(make("crossattention", "query", rate="null"), resume=latest, force=True)
    assert slower.steps == 12
    assert any("changed by --force: trainable" in line for line in lines)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_float16_alone_scales_gradients(
    make_recipe: MakeRecipe, amp_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU computes in float16 too, slowly.
    monkeypatch.setattr("vlm_bridge.training_strategy.trainer.check_machine", lambda *_: None)
    short = ("max_steps=1", "monitor=loss", "num_validation_samples=0", "num_decoded_images=0")
    recipe = make_recipe("run", f"amp_dtype={amp_dtype}", *short)
    train(recipe)
    assert bool(saved(recipe)["training"]["scaler"]) == (amp_dtype == "float16")
