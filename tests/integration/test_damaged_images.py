"""Trainings without a feature cache that meet damaged images as they read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from logs import events, log_lines, saved
from same import assert_same_checkpoints
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.data_pipeline.images import check_image
from vlm_bridge.data_pipeline.loader import Row
from vlm_bridge.errors import DataError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.trainer import train

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def data_dir(drawn_caption_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn_caption_folder, tmp_path / "data")


@pytest.fixture
def make(make_recipe: MakeRecipe, data_dir: Path) -> MakeRecipe:
    """Recipes of six steps of four images, in which up to 90% of the images may be damaged."""
    common = (f"data_dir={data_dir}", "feature_cache=off", "max_bad_samples=0.9")
    return lambda name, *changes: make_recipe(name, *common, "save_every=2 steps", *changes)


def batches_of(recipe: Recipe) -> list[list[Row]]:
    folder, world = open_data_folder(recipe.data_dir), World(torch.device("cpu"))
    return TrainingData.open(folder, build_captioner(recipe), recipe, world).plan.batches(0)


def damage(recipe: Recipe, rows: list[Row]) -> list[Path]:
    """Cut the files of the images of some rows."""
    images = open_data_folder(recipe.data_dir).split("train")
    paths = [Path(str(images[row.image].path)) for row in rows]
    for path in paths:
        path.write_bytes(path.read_bytes()[:400])
    return paths


@pytest.mark.parametrize("scst", [(), ("objective=scst", "scst_samples=2")], ids=["", "scst"])
def test_damaged_images_are_left_out_and_runs_resume_exactly(
    make: MakeRecipe, scst: tuple[str, ...]
) -> None:
    whole, recipe = (make(name, "num_epochs=2", *scst) for name in ("whole", "run"))
    batches, lines = batches_of(whole), log_lines()
    paths = damage(whole, [batches[1][0], batches[4][2]])
    assert train(whole).steps == 2 * len(batches)
    assert events(whole, "skipped") == []
    named = [line for line in lines if line.startswith("skipped its captions: ")]
    assert len(named) == 2 and all(any(str(path) in line for line in named) for path in paths)
    train(recipe, resume=Path(whole.checkpoint_dir, "step_00000008.pth"))
    latest = (Path(r.checkpoint_dir, checkpoints.LATEST) for r in (whole, recipe))
    assert_same_checkpoints(*latest)


def test_a_step_of_damaged_images_alone_is_skipped(make: MakeRecipe) -> None:
    recipe = make("run")
    batches = batches_of(recipe)
    damage(recipe, batches[2])
    assert train(recipe).steps == len(batches)
    assert [event["step"] for event in events(recipe, "skipped")] == [3]
    assert all(weight.isfinite().all() for weight in saved(recipe)["weights"].values())


def test_too_many_end_the_training(make: MakeRecipe) -> None:
    recipe = make("run", "max_bad_samples=0.05")
    batches = batches_of(recipe)
    damage(recipe, [batches[2][0], batches[3][0]])
    with pytest.raises(DataError, match=r"2 of 24 train images .* max_bad_samples=0.05"):
        train(recipe)


def test_a_training_checks_validation_images_alone_before(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def check(path: Path) -> None:
        checked.append(path)
        check_image(path)

    monkeypatch.setattr("vlm_bridge.data_pipeline.features.check_image", check)
    train(make("run", "max_steps=1"))
    assert {path.parent.parent.name for path in checked} == {"val"}
