"""Training from the recipe to the checkpoints: files, learning, continuing and refusing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logs import events, log_lines, saved
from same import assert_same_checkpoints
from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError, DataError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import TrainingResult, train

MakeRecipe = Callable[..., Recipe]


class Run:
    """A training inside this process, with its console lines and checkpoints."""

    def __init__(self, recipe: Recipe, resume: Path | None = None, *, force: bool = False):
        self.lines, self.recipe = log_lines(), recipe
        self.folder = Path(recipe.checkpoint_dir)
        self.latest = self.folder / checkpoints.LATEST
        self.result: TrainingResult = train(recipe, resume=resume, force=force)

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.recipe, kind)


@pytest.mark.parametrize("bridge", ["prefix", "cross_attention"])
def test_training_learns_and_writes_what_it_promises(make_recipe: MakeRecipe, bridge: str) -> None:
    run = Run(make_recipe("run", "num_epochs=4", "num_validation_samples=4", bridge=bridge))
    names = {path.name for path in run.folder.iterdir()}
    assert names == {checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS}
    assert list((run.folder.parent / "logs").glob("events.out.tfevents.*"))

    steps, validations = run.events("train"), run.events("validation")
    # 24 images of two captions each, in batches of four rows.
    assert [event["step"] for event in steps] == list(range(1, 25))
    measured = {"samples_per_second", "tokens_per_second", "padding_share"}
    assert {"loss", "learning_rate", "gradient_norm", *measured} <= steps[0].keys()
    assert [event["step"] for event in validations] == [6, 12, 18, 24]
    assert {"loss", "perplexity", "visual_gain"} <= validations[0].keys()
    assert validations[-1]["loss"] < validations[0]["loss"] < 6
    assert len(run.events("samples")) == 4
    assert run.result.steps == 24
    assert run.result.best_loss == min(event["loss"] for event in validations)
    for mention in ("ms/step", "samples/s", "tokens/s", "pads", "ETA", "visual gain", "sample 1:"):
        assert run.said(mention)

    best = saved(run.recipe, checkpoints.BEST_WEIGHTS)
    assert "training" not in best
    assert saved(run.recipe)["weights"].keys() == best["weights"].keys()
    assert run.latest.stat().st_size < 1_000_000


def test_a_short_run_still_logs_ten_steps_and_reports_every_one(make_recipe: MakeRecipe) -> None:
    recipe, seen = make_recipe("run", "num_epochs=4", "log_every_n_steps=100"), []
    train(recipe, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 24) for step in range(1, 25)]
    assert [event["step"] for event in events(recipe, "train")] == [1, *range(2, 25, 2)]


def test_compiling_changes_no_loss_and_no_name(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_with(f, backend=count, **how))
    settings = ("max_steps=8", "num_epochs=2", "tokens_per_batch=60")
    plain = Run(make_recipe("plain", *settings, bridge="deep_prefix"))
    assert num_graphs == 0
    compiled = Run(make_recipe("compiled", *settings, "compile=true", bridge="deep_prefix"))
    assert 0 < num_graphs < plain.result.steps  # not one for each length
    for event, other in zip(plain.events("train"), compiled.events("train"), strict=True):
        assert event["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert saved(plain.recipe)["weights"].keys() == saved(compiled.recipe)["weights"].keys()


def test_without_a_compiler_training_says_so_and_goes_on(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_bridge.device.shutil.which", lambda name: None)
    run = Run(make_recipe("run", "compile=true", "max_steps=1"))
    assert run.said("compile=true has no effect here: there is no C++ compiler")
    assert run.result.steps == 1


def test_the_seed_decides_everything(make_recipe: MakeRecipe) -> None:
    settings = ("bridge.dropout=0.3", "amp_dtype=bfloat16")
    torch.manual_seed(123)
    one = Run(make_recipe("one", *settings))
    torch.manual_seed(456)
    same = Run(make_recipe("same", *settings))
    other = Run(make_recipe("other", *settings, "seed=1"))
    assert_same_checkpoints(one.latest, same.latest)
    assert one.events("train")[-1]["loss"] != other.events("train")[-1]["loss"]


def test_accumulating_four_times_two_is_a_batch_of_eight(make_recipe: MakeRecipe) -> None:
    settings = ("captions_per_image=1", "gradient_clip_val=1e6", "max_steps=2")
    at_once = Run(make_recipe("at-once", *settings, "batch_size=8"))
    parts = ("batch_size=2", "gradient_accumulation_steps=4")
    in_parts = Run(make_recipe("in-parts", *settings, *parts))
    for event, other in zip(at_once.events("train"), in_parts.events("train"), strict=True):
        assert event["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert event["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    first, second = (
        saved(run.recipe)["training"]["optimizer"]["state"] for run in (at_once, in_parts)
    )
    # The first moment is the gradient; AdamW's own step would blow up differences near zero.
    for key, state in first.items():
        torch.testing.assert_close(state["exp_avg"], second[key]["exp_avg"], atol=1e-5, rtol=1e-3)


def test_a_folder_without_a_manifest_trains_and_continues_bit_for_bit(
    make_recipe: MakeRecipe, drawn_caption_folder: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "here", tmp_path / "another machine"]
    for folder in folders:
        shutil.copytree(
            drawn_caption_folder, folder, ignore=shutil.ignore_patterns(".*", "manifest.json")
        )
    settings = ("save_every=2 steps",)
    whole = Run(make_recipe("whole", *settings, f"data_dir={folders[0]}"))
    step = whole.folder / checkpoints.STEP.format(2)
    resumed = Run(make_recipe("resumed", *settings, f"data_dir={folders[1]}"), resume=step)
    assert_same_checkpoints(whole.latest, resumed.latest)
    captions = folders[1] / "train" / "captions.jsonl"
    captions.write_text(captions.read_text().replace('"caption": "', '"caption": "Oh ', 1))
    with pytest.raises(CheckpointError, match="data fingerprint=blake2b:"):
        Run(make_recipe("resumed", *settings, f"data_dir={folders[1]}"), resume=step)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    for override, error in (
        (f"data_dir={tmp_path / 'nowhere'}", DataError),
        ("amp_dtype=float16", ConfigurationError),
        ("device=abacus", ConfigurationError),
        ("bridge.num_heads=3", ConfigurationError),
        ("decode.max_new_tokens=4096", ConfigurationError),
    ):
        with pytest.raises(error):
            train(make_recipe("run", "amp_dtype=bfloat16", override))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_ctrl_c_saves_and_the_run_continues_bit_for_bit(
    make_recipe: MakeRecipe, tmp_path: Path, run_here
) -> None:
    # 24 steps an epoch: the signal strikes somewhere inside the second one.
    settings = (
        "num_epochs=2", "batch_size=2", "captions_per_image=1", "bridge.dropout=0.1",
        "num_workers=2",
    )  # fmt: skip
    whole = Run(make_recipe("whole", *settings))
    assert whole.result.steps == 48

    config = tmp_path / "recipe.yaml"
    config.write_text(make_recipe("interrupted", *settings).to_yaml(), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_bridge", "train", "--config", str(config)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "step 25/48" in line:
            process.send_signal(signal.SIGINT)
            break
    _, stderr = process.communicate(timeout=60)
    latest = tmp_path / "interrupted" / "checkpoints" / checkpoints.LATEST
    assert process.returncode == 130
    assert stderr.splitlines() == [f"interrupted; saved {latest}; continue with --resume {latest}"]
    progress = checkpoints.load_checkpoint(latest)["training"]["progress"]
    assert 25 <= progress["step"] < 48
    assert progress["step_in_epoch"] > 0

    # `--resume` alone continues with the checkpoint's own recipe.
    resumed = run_here("train", "--resume", latest)
    assert resumed.returncode == 0, resumed.stderr
    assert "done: 48 steps" in resumed.stdout
    assert_same_checkpoints(whole.latest, latest)
