"""Distillation start: the projection learns to give what a teacher gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from captioners import places_of_run, tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import distillation
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distillation import distill_projection, on_grid
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.trainer import prepare_model, train

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(
    tmp_path: Path,
    drawn_caption_folder: Path,
    tiny_pvt_v2_dir: Path,
    tiny_blip_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeRecipe:
    """PVTv2 as student (2x2 tokens), BLIP's tower as teacher (4x4 and a class token)."""
    monkeypatch.setattr(distillation, "STEPS", 60)
    recipe = tiny_recipe(
        tiny_pvt_v2_dir,
        tiny_blip_dir,
        "projection",
        **places_of_run(tmp_path, "run", drawn_caption_folder),
        num_epochs=1,
        num_validation_samples=0,
        distillation=str(tiny_blip_dir),
    )
    return lambda *overrides: override_recipe(recipe, overrides)


def distil(recipe: Recipe) -> tuple[CaptionModel, list[float]]:
    world = World(torch.device("cpu"))
    model = prepare_model(recipe, world)
    data = TrainingData.open(open_data_folder(recipe.data_dir), model, recipe, world)
    paths = [image.path for image in data.train_images]
    assert recipe.distillation is not None
    return model, distill_projection(
        model, recipe.distillation, data.train_features, paths,
        seed=recipe.seed, num_workers=recipe.num_workers,
    )  # fmt: skip


def test_the_projection_comes_near_its_teacher_and_nothing_else_moves(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = build_captioner(make_recipe()).state_dict()
    model, losses = distil(make_recipe())
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for name, tensor in model.state_dict().items():
        if not name.startswith("bridge."):
            assert torch.equal(tensor, frozen[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(distillation, "STEPS", 3)
    few = ("num_workers=2", "amp_dtype=bfloat16")
    assert distil(make_recipe(*few))[1] == losses[:3]
    assert distil(make_recipe(*few, "seed=1"))[1] != losses[:3]


def test_grids_are_averaged_and_class_tokens_dropped() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)
    with_class_token = torch.cat((torch.full((1, 1, 1), 1000.0), patches), dim=1)
    halved = on_grid(with_class_token, (4, 4), (2, 2))
    assert halved.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(on_grid(with_class_token, (4, 4), (4, 4)), patches)


def test_what_cannot_be_distilled_is_refused_before_features_are_computed(
    make_recipe: MakeRecipe, tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    narrow = make_recipe(f"distillation={tiny_vit_dir}")
    with pytest.raises(ConfigurationError, match=r"features of width 32, .* output is 24"):
        train(narrow)
    with pytest.raises(ModelError, match="cannot load the vision encoder"):
        train(make_recipe("distillation=nowhere/at-all"))
    with pytest.raises(ConfigurationError, match=r"it needs bridge\.kind=projection"):
        train(make_recipe(f"language_model.name={tiny_llama_dir}", "bridge={kind: prefix}"))
    assert not (tmp_path / "features").exists()


def test_it_comes_before_the_first_step_and_not_after_a_resume(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlm_bridge")
    # Nothing else moves: the checkpoint holds what distillation gave.
    still = ("learning_rate=0", "min_lr=0")
    train(make_recipe(*still))
    assert "distillation: 60 steps" in caplog.text
    latest = tmp_path / "run" / "checkpoints" / checkpoints.LATEST
    distilled = checkpoints.load_checkpoint(latest)["weights"]
    fresh = build_captioner(make_recipe(*still)).trained_state_dict()
    assert not torch.equal(distilled["bridge.positions"], fresh["bridge.positions"])

    caplog.clear()
    train(make_recipe(*still, "num_epochs=2"), resume=latest, force=True)
    assert "distillation: " not in caplog.text
    again = checkpoints.load_checkpoint(latest)["weights"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in distilled.items())
