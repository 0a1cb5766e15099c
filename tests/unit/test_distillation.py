"""Distillation start: the projection learns to give what a teacher gives, before the first step and never again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from captioners import tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distillation import distill_projection, on_grid
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.trainer import prepare_model, train

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path
) -> MakeRecipe:
    """PVTv2 as student (2x2 tokens), BLIP's tower as teacher (4x4 and a class token): ``make_recipe("KEY=VALUE")``."""

    def make(*overrides: str) -> Recipe:
        recipe = tiny_recipe(
            tiny_pvt_v2_dir,
            tiny_blip_dir,
            "projection",
            data_dir=str(drawn_caption_folder),
            checkpoint_dir=str(tmp_path / "checkpoints"),
            log_dir=str(tmp_path / "logs"),
            feature_cache=str(tmp_path / "features"),
            num_epochs=1,
            num_validation_samples=0,
            distillation={"teacher": str(tiny_blip_dir), "steps": 40, "learning_rate": 1e-2},
        )
        return override_recipe(recipe, overrides)

    return make


def distil(recipe: Recipe) -> tuple[CaptionModel, list[float]]:
    world = World(torch.device("cpu"))
    model = prepare_model(recipe, world)
    data = TrainingData.open(open_data_folder(recipe.data_dir), model, recipe, world)
    paths = [image.path for image in data.train_images]
    losses = distill_projection(model, recipe, data.train_features, paths)
    return model, losses


def test_the_projection_comes_near_its_teacher(make_recipe: MakeRecipe) -> None:
    frozen = build_captioner(make_recipe()).state_dict()
    model, losses = distil(make_recipe())
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    # Only the projection has moved.
    for name, tensor in model.state_dict().items():
        if not name.startswith("bridge."):
            assert torch.equal(tensor, frozen[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_decides_and_threads_and_precision_do_not(make_recipe: MakeRecipe) -> None:
    few = ("distillation.steps=3",)
    _, one = distil(make_recipe(*few))
    assert one == distil(make_recipe(*few, "num_workers=2", "amp_dtype=bfloat16"))[1]
    assert one != distil(make_recipe(*few, "seed=1"))[1]


def test_grids_are_averaged_and_class_tokens_dropped() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)
    with_class_token = torch.cat((torch.full((1, 1, 1), 1000.0), patches), dim=1)
    halved = on_grid(with_class_token, (4, 4), (2, 2))
    assert halved.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(on_grid(with_class_token, (4, 4), (4, 4)), patches)


def test_what_cannot_be_distilled_is_refused_before_features_are_computed(
    make_recipe: MakeRecipe,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    drawn_caption_folder: Path,
    tmp_path: Path,
) -> None:
    narrow = make_recipe(f"distillation.teacher={tiny_vit_dir}")
    with pytest.raises(
        ConfigurationError, match=r"teacher has features of width 32, .* output is 24"
    ):
        train(narrow)
    with pytest.raises(ModelError, match="cannot load the vision encoder"):
        train(make_recipe("distillation.teacher=nowhere/at-all"))
    prefix = tiny_recipe(
        tiny_vit_dir,
        tiny_llama_dir,
        data_dir=str(drawn_caption_folder),
        distillation={"teacher": str(tiny_vit_dir)},
    )
    with pytest.raises(ConfigurationError, match=r"it needs bridge\.kind=projection"):
        train(prefix)
    assert not (tmp_path / "features").exists()
    for override in ("distillation.steps=0", "distillation.learning_rate=0"):
        with pytest.raises(ConfigurationError, match=override.split("=")[0]):
            make_recipe(override)


def test_it_comes_before_the_first_step_and_not_after_a_resume(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlm_bridge")
    # Nothing else moves: what the checkpoint holds is what distillation gave.
    still = ("learning_rate=0", "min_lr=0", "distillation.steps=5")
    train(make_recipe(*still))
    assert "distillation: 5 steps" in caplog.text
    latest = tmp_path / "checkpoints" / checkpoints.LATEST
    distilled = checkpoints.load_checkpoint(latest)["weights"]
    fresh = build_captioner(make_recipe(*still)).trained_state_dict()
    assert not torch.equal(distilled["bridge.positions"], fresh["bridge.positions"])

    caplog.clear()
    train(make_recipe(*still, "num_epochs=2"), resume=latest, force=True)
    assert "distillation: " not in caplog.text
    again = checkpoints.load_checkpoint(latest)["weights"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in distilled.items())
    events = [
        json.loads(line) for line in (tmp_path / "logs" / "history.jsonl").read_text().splitlines()
    ]
    assert [event["step"] for event in events if event["event"] == "validation"] == [6, 12]
