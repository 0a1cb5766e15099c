"""Training in several processes: the same steps, the same validation, and one end for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from captioners import tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints
from worlds import run_world, train_lines

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> MakeRecipe:
    """Recipes of 24 images in batches of 5 rows, which neither 2 nor 4 divide: 5 steps an epoch, the last of 4 rows."""

    def make(name: str, *overrides: str) -> Recipe:
        recipe = tiny_recipe(
            tiny_vit_dir,
            tiny_llama_dir,
            data_dir=str(drawn_caption_folder),
            checkpoint_dir=str(tmp_path / name / "checkpoints"),
            log_dir=str(tmp_path / name / "logs"),
            feature_cache=str(tmp_path / "features"),
            device="cpu",
            learning_rate=1e-3,
            num_epochs=10,
            val_every_n_epochs=5,
            generate_samples_every_n_epochs=10,
            batch_size=10,
            captions_per_image=2,
            use_early_stopping=False,
            log_every_n_steps=1,
            decode={"num_beams": 2, "max_new_tokens": 5},
        )
        return override_recipe(recipe, overrides)

    return make


def trained(recipe: Recipe, size: int, resume: Path | None = None) -> list[str]:
    """What the first of ``size`` processes said; the others said nothing."""
    first, *others = run_world(size, train_lines, recipe, resume)
    assert first.error is None
    for other in others:
        assert other.error is None
        assert other.returned == []
    return first.returned


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    history = Path(recipe.log_dir, "history.jsonl").read_text(encoding="utf-8")
    return [event for event in map(json.loads, history.splitlines()) if event["event"] == kind]


def assert_same_steps(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [event["step"] for event in one] == [event["step"] for event in other]
    for event, same in zip(one, other, strict=True):
        assert event["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert event["learning_rate"] == same["learning_rate"]


def test_any_number_of_processes_takes_the_same_steps(make_recipe: MakeRecipe) -> None:
    recipes = {size: make_recipe(f"of-{size}") for size in (1, 2, 4)}
    for size, recipe in recipes.items():
        lines = trained(recipe, size)
        assert any(f", {size} processes" in line for line in lines) == (size > 1)
    alone = events(recipes[1], "train")
    assert len(alone) == 50
    for size in (2, 4):
        assert_same_steps(alone, events(recipes[size], "train"))
        for one, other in zip(
            events(recipes[1], "validation"), events(recipes[size], "validation"), strict=True
        ):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["visual_gain"] == pytest.approx(other["visual_gain"], abs=1e-5)
        # One process wrote, once.
        folder = Path(recipes[size].checkpoint_dir)
        assert {path.name for path in folder.iterdir()} == {
            checkpoints.LATEST,
            checkpoints.BEST,
            checkpoints.BEST_WEIGHTS,
        }
        assert len(list(Path(recipes[size].log_dir).glob("events.out.tfevents.*"))) == 1
