"""What would stop a training later is refused before a model is loaded or an image is encoded."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captioners import places_of_run, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError, VLMBridgeError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import preflight, trainer

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(
    tmp_path: Path,
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeRecipe:
    """Return a recipe with overrides, in a world in which no model can be loaded."""
    places = places_of_run(tmp_path, "run", drawn_caption_folder)
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention", device="cpu", **places)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trainer, "build_captioner", never)
    return lambda *overrides: override_recipe(recipe, overrides)


def refused(recipe: Recipe, error: type[VLMBridgeError], match: str, **resume: Any) -> None:
    with pytest.raises(error, match=match):
        trainer.train(recipe, **resume)


def test_mistakes_of_a_resume(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    weights = tiny_captioner(recipe).trained_state_dict()
    path, bare = tmp_path / "latest.pth", tmp_path / "weights.pth"
    training = {"progress": {}, "dataset_fingerprint": "of no data"}
    checkpoints.save_checkpoint(path, recipe, weights, training)
    checkpoints.save_checkpoint(bare, recipe, weights)
    refused(make_recipe("batch_size=4"), CheckpointError, "batch_size=4, was 8", resume=path)
    refused(make_recipe("bridge.num_heads=2"), CheckpointError, r"bridge\.num_heads=4", resume=path)
    refused(recipe, CheckpointError, "no checkpoint at", resume=tmp_path / "nothing.pth")
    refused(recipe, CheckpointError, f"weights only.*start_from={bare}", resume=bare)
    other = make_recipe("bridge.num_heads=2", f"start_from={bare}")
    refused(other, CheckpointError, r"bridge\.num_heads=4, wanted is 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_dir"])
def test_a_folder_that_cannot_be_made(make_recipe: MakeRecipe, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    recipe = make_recipe(f"{key}={tmp_path / 'file' / 'run'}")
    match = f"cannot write into {key}=.*Not a directory.*another folder with {key}="
    refused(recipe, ConfigurationError, match)


def test_a_full_disk(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preflight.os, "fsync", full)
    match = "checkpoint_dir=.*No space left on device.*free some space"
    refused(make_recipe(), ConfigurationError, match)
