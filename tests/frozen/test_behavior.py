"""Behavior that users know, seen from outside. No assertion here may change with the code.

`data/` was written by version 0.1.0 as of November 2026: a recipe with the keys of then, a checkpoint from the
middle of its first epoch, what that run ended with, a caption folder, and options of every command.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parents[2]
CHECKPOINTS = {"latest_checkpoint.pth", "best_model.pth", "best_model_weights_only.pth"}
REMOVED_OPTIONS: dict[str, set[str]] = {
    # The command prints what fetches a dataset.
    "vlm-bridge data download": {"--dry-run", "--json", "--keep-archives", "--part"},
    # What a classifier sees is named in the prompt: --object-threshold.
    "vlm-bridge caption": {"--object-bonus"},
    "vlm-bridge evaluate": {"--object-bonus"},
}
"""Command -> options that were taken away on purpose."""
SCALARS = {
    "train/loss", "train/learning_rate", "train/grad_norm_before_clip", "epoch/train_loss", "val/loss",
    "val/perplexity", "val/visual_gain", "val/avg_sequence_length", "val/token_diversity",
    "val/sample_length_avg", "val/sample_diversity", "val/sample_bleu_avg",
}  # fmt: skip
ENTRY_POINTS = {"vlm-bridge": "run_bridge", "vlm-data": "run_data", "vlm-training": "run_training"}


def run(program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    entry = ENTRY_POINTS[program]
    code = (
        f"import sys; sys.argv[0] = {program!r}; from vlm_bridge.cli.main import {entry}; {entry}()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, recipe and data; paths in the recipe and the checkpoint are relative to it."""
    home = shutil.copytree(DATA, tmp_path_factory.mktemp("frozen") / "home")
    (home / "captions").rename(home / "data")
    return home


# Names and options.


def options_of(command: Any, name: str) -> dict[str, set[str]]:
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    found = {name: options}
    for child, inner in getattr(command, "commands", {}).items():
        found |= options_of(inner, f"{name} {child}")
    return found


def test_every_command_keeps_its_options() -> None:
    from vlm_bridge.cli.main import app

    found = options_of(typer.main.get_command(app), "vlm-bridge")
    for script, function in (
        ("finetune_combined", "finetune_combined"),
        ("save_combined_checkpoint", "save_combined_checkpoint"),
        ("load_combined_checkpoint", "main"),
    ):
        program = typer.Typer()
        program.command()(getattr(importlib.import_module(f"scripts.{script}"), function))
        found |= options_of(typer.main.get_command(program), f"scripts/{script}.py")
    before = json.loads((DATA / "options.json").read_text())
    missing = {
        command: sorted(lost)
        for command, options in before.items()
        if (lost := set(options) - found.get(command, set()) - REMOVED_OPTIONS.get(command, set()))
    }
    assert not missing


# Training.


def test_a_recipe_of_before_trains_with_the_names_of_before(home: Path) -> None:
    result = run("vlm-training", "--config", "recipe.yaml", "checkpoint_dir=new/checkpoints",
                 "log_dir=new/logs", cwd=home)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "step 10/10 | loss " in result.stdout and "done: 10 steps" in result.stdout
    names = {path.name for path in (home / "new" / "checkpoints").iterdir()}
    assert {name for name in names if not name.startswith("step_")} == CHECKPOINTS
    assert "step_00000009.pth" in names
    events = EventAccumulator(str(home / "new" / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert {"val/sample_0", "val/sample_1"} <= set(events.Tags()["images"])
    assert "training/config/text_summary" in events.Tags()["tensors"]
    history = (home / "new" / "logs" / "history.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["event"] for line in history}
    assert {"train", "validation", "samples"} <= kinds
    same_end(home / "new")


def test_a_checkpoint_of_before_resumes_exactly(home: Path) -> None:
    result = run("vlm-training", "--resume", "run/step_00000003.pth", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "at step 3 of 10" in result.stdout
    same_end(home / "run")


def same_end(folder: Path) -> None:
    """The run ended as that of before did, up to rounding."""
    content = torch.load(folder / "checkpoints" / "latest_checkpoint.pth", weights_only=True)
    expected = torch.load(DATA / "expected.pth", weights_only=True)
    assert content["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(content["weights"][name], tensor, atol=1e-3, rtol=1e-3)
    best_loss = content["training"]["progress"]["best_loss"]
    assert best_loss == pytest.approx(expected["best_loss"], abs=1e-4)


def test_a_checkpoint_of_before_captions(home: Path) -> None:
    result = run("vlm-bridge", "caption", "data/val/images", "--checkpoint", "run/step_00000003.pth",
                 "--json", "--device", "cpu", cwd=home)  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["image"] for row in rows] == [
        "data/val/images/cyan.jpg", "data/val/images/orange.jpg",
    ]  # fmt: skip
    assert all(row.keys() >= {"image", "caption", "score"} for row in rows)


# Captions.


def test_the_bundled_captioner_says_what_it_said(tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    from vlm_bridge import Captioner

    expected = json.loads((DATA / "bundled.json").read_text())
    images = [
        Image.fromarray(
            datasets.load_sample_image(f"{name}.jpg")
            if name in ("china", "flower")
            else getattr(skimage, name)()
        )
        for name in expected
    ]
    results = Captioner.from_pretrained(device="cpu").caption(images)
    # bfloat16 rounds by the number of threads and the processor, which may tip a word that is as likely: the captions
    # of one thread and of two, with their scores.
    pairs = list(zip(expected.values(), results, strict=True))
    same = [
        (known[result.caption], result.score) for known, result in pairs if result.caption in known
    ]
    assert len(same) >= 4
    for before, score in same:
        assert score == pytest.approx(before, abs=0.1)


# Data.


def test_transform_writes_the_folder_of_before(home: Path) -> None:
    result = run("vlm-data", "transform", "--source", "local", "--input-dir", "photos",
                 "--output-dir", "made", cwd=home)  # fmt: skip
    assert result.returncode == 0, result.stderr

    def files(folder: Path) -> set[str]:
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if not path.parts[0].startswith(".")}

    before = DATA / "captions"
    assert files(home / "made") == files(before)
    for split in ("train", "val", "test"):
        name = f"{split}/captions.jsonl"
        assert (home / "made" / name).read_bytes() == (before / name).read_bytes()
    made, old = (
        json.loads((folder / "manifest.json").read_text()) for folder in (home / "made", before)
    )
    for key in (
        "format",
        "format_version",
        "source",
        "counts",
        "split_rule",
        "seed",
        "fingerprint",
    ):
        assert made[key] == old[key], key


# Mistakes.


@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [
        ("vlm-bridge", ["caption", "nowhere.jpg"], 1),
        ("vlm-bridge", ["caption"], 2),
        ("vlm-bridge", ["caption", "photos/red.png", "--checkpoint", "nowhere"], 1),
        ("vlm-bridge", ["evaluate", "--data-dir", "data", "--model", "m", "--checkpoint", "run"], 2),
        ("vlm-bridge", ["evaluate", "--data-dir", "nowhere", "--checkpoint", "run"], 1),
        ("vlm-bridge", ["compare", "nowhere.json", "elsewhere.json"], 1),
        ("vlm-bridge", ["report", "nowhere"], 1),
        ("vlm-bridge", ["info", "no-such-recipe.yaml"], 2),
        ("vlm-bridge", ["no-such-command"], 2),
        ("vlm-data", ["transform", "--source", "local", "--input-dir", "nowhere",
                      "--output-dir", "out"], 1),
        ("vlm-training", ["--config", "recipe.yaml", "batch_sise=3"], 2),
        ("vlm-training", ["--config", "recipe.yaml", "data_dir=nowhere"], 1),
        ("vlm-training", ["--resume", "nowhere"], 1),
    ],
)  # fmt: skip
def test_mistakes_have_the_documented_exit_code_and_one_line(
    program: str, arguments: list[str], code: int, home: Path
) -> None:
    result = run(program, *arguments, cwd=home)
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 or code == 2
    assert "Traceback" not in result.stderr
