"""`vlm-bridge finetune`: a folder of captioned images becomes a captioner in their style."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from captioners import tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge import finetuning
from vlm_bridge.configuration import load_recipe
from vlm_bridge.evaluation.run_folder import ReportedRun
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> Path:
    """A captioner to start from."""
    folder = tmp_path_factory.mktemp("start")
    recipe = tiny_recipe(
        tiny_vit_dir, tiny_llama_dir, decode={"num_beams": 1, "max_new_tokens": 5},
        confidence={"remembered_images": 4}, prompt_delta=True,
    )  # fmt: skip
    weights = tiny_captioner(recipe).trained_state_dict()
    checkpoints.save_checkpoint(folder / checkpoints.BEST_WEIGHTS, recipe, weights)
    return folder


def write_images(folder: Path, count: int, split: str = "") -> Path:
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", *(["split"] if split else [])])
        for number in range(count):
            noise(number).save(folder / f"{number}.png")
            writer.writerow(
                [
                    f"{number}.png",
                    f"Behold: image {number} of many words.",
                    *([split] if split else []),
                ]
            )
    return folder


@pytest.fixture
def run(
    start: Path, tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable:
    monkeypatch.setenv("PATH", "")  # without Java, whose start takes seconds
    return lambda images, *more: run_here(
        "finetune", images, "--output-dir", tmp_path / "mine", "--from", start, "--device", "cpu",
        "num_workers=0", *more,
    )  # fmt: skip


def test_a_folder_becomes_a_captioner(run: Callable, run_here: Callable, tmp_path: Path) -> None:
    images, mine = write_images(tmp_path / "images", 24), tmp_path / "mine"
    first = run(images, "max_steps=3", "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["before"]["num_images"] == result["after"]["num_images"] == 5
    assert all(example["reference"].startswith("Behold") for example in result["examples"])
    assert Path(result["report"]).read_text(encoding="utf-8").count("Behold") >= 5
    recipe = load_recipe(mine / "recipe.yaml")
    assert (recipe.max_steps, recipe.monitor, recipe.early_stopping_patience) == (3, "loss", None)
    assert recipe.decode.max_new_tokens > 5, "captions are cut to the length of the start's"
    # What the start knows of prompts and of its own training images is not of these.
    assert (recipe.confidence, recipe.prompt_delta, recipe.decode.object_threshold) == (
        None,
        False,
        0,
    )
    # The same command again finds everything done.
    again = run(images, "max_steps=3")
    assert again.returncode == 0 and "nothing is left to train" in again.stderr
    assert result["verdict"] in again.stdout and again.stderr.count("captioned: ") == 1
    captioned = run_here("caption", images / "1.png", "--checkpoint", mine)
    assert captioned.returncode == 0, captioned.stderr
    evaluated = run_here("report", mine)
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    "count, split, expected",
    [
        (3, "", "3 captioned images: at least 5"),
        (9, "train", "images for train alone"),
        (0, "", "no image in"),
    ],
)
def test_what_cannot_be_learned_from_is_one_line(
    run: Callable, tmp_path: Path, count: int, split: str, expected: str
) -> None:
    result = run(write_images(tmp_path / "images", count, split))
    assert result.returncode == 1 and expected in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error" in line]) == 1


def test_few_images_are_a_warning_and_no_folder_an_error(run: Callable, tmp_path: Path) -> None:
    result = run(write_images(tmp_path / "images", 8), "max_steps=1")
    assert result.returncode == 0 and "8 images are few" in result.stderr
    assert run(tmp_path / "none").stderr == f"error: no such folder: {tmp_path / 'none'}\n"


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ((0.1, 30.0, 0.5), (0.4, 20.0, 0.5), "It learned your captions."),
        ((0.1, 30.0, 0.5), (0.4, 60.0, 0.5), "but overfits"),
        ((0.4, 30.0, 0.5), (0.3, 20.0, 0.5), "CIDEr of so few images is chance"),
        ((0.4, 30.0, 0.5), (0.3, 40.0, 0.5), "did not help"),
        ((0.1, 30.0, 0.5), (0.4, 20.0, 0.0), "ignores the images"),
    ],
)
def test_the_verdict(before: tuple, after: tuple, expected: str) -> None:
    names = ("CIDEr", "perplexity", "visual_gain")
    runs = [
        ReportedRun("", dict(zip(names, v, strict=True)) | {"num_images": 8})
        for v in (before, after)
    ]
    assert expected in finetuning.verdict(*runs)


@pytest.mark.parametrize("count, held_out", [(20, 4), (40, 8), (199, 40), (300, 30), (20_000, 200)])
def test_a_part_is_held_out(count: int, held_out: int) -> None:
    shares = finetuning.held_out_shares(count)
    assert round(shares["val_fraction"] * count) == held_out
