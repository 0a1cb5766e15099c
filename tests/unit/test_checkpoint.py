"""Checkpoints: whole or refused, harmless to open, and nothing in them but what was trained."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from captioners import BRIDGES, SPEAKS_TO, tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Recipe:
    bridge = getattr(request, "param", "prefix")
    language_model = request.getfixturevalue(f"tiny_{SPEAKS_TO[bridge]}_dir")
    return tiny_recipe(tiny_vit_dir, language_model, bridge)


@pytest.fixture
def model(recipe: Recipe) -> CaptionModel:
    return tiny_captioner(recipe)


@pytest.fixture
def saved(recipe: Recipe, model: CaptionModel, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / checkpoints.BEST_WEIGHTS
    checkpoints.save_checkpoint(path, recipe, model.trained_state_dict())
    return path


@pytest.mark.parametrize("recipe", BRIDGES, indirect=True)
def test_the_trained_weights_and_the_recipe_come_back(
    saved: Path, recipe: Recipe, model: CaptionModel, tmp_path: Path
) -> None:
    content = checkpoints.load_checkpoint(saved)
    assert checkpoints.recipe_of(content, saved) == recipe
    assert {name.split(".")[0] for name in content["weights"]} == {"bridge", "feature_scale"}
    trained = model.trained_state_dict()
    trained_bytes = sum(t.numel() * t.element_size() for t in trained.values())
    assert saved.stat().st_size < trained_bytes + 50_000
    captioner = Captioner.from_pretrained(tmp_path / "run", "cpu")
    assert captioner.recipe == recipe
    for name, tensor in model.state_dict().items():
        assert torch.equal(captioner.model.state_dict()[name], tensor), name

    checkpoints.save_checkpoint(saved, recipe, checkpoints.stored_as(trained, "bfloat16"))
    half = Captioner.from_pretrained(saved, "cpu").model.trained_state_dict()
    for name, tensor in half.items():
        is_statistic = name.startswith("feature_scale.")
        expected = trained[name] if is_statistic else trained[name].bfloat16().float()
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), name


def test_folders_mean_their_best_checkpoint(saved: Path, tmp_path: Path) -> None:
    for path in (saved, saved.parent, tmp_path / "run"):
        assert checkpoints.checkpoint_path(path) == saved
    latest = saved.rename(saved.with_name(checkpoints.LATEST))
    assert checkpoints.checkpoint_path(tmp_path / "run") == latest
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {path};"):
            checkpoints.checkpoint_path(path)


def test_truncated_and_changed_files_are_refused(saved: Path) -> None:
    whole, reference = saved.read_bytes(), checkpoints.load_checkpoint(saved)["weights"]
    for share in (0.0, 0.1, 0.999):
        saved.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="is damaged or is not a checkpoint"):
            checkpoints.load_checkpoint(saved)
    num_refused = 0
    for position in range(0, len(whole), len(whole) // 60):
        content = bytearray(whole)
        content[position] ^= 0xFF
        saved.write_bytes(content)
        try:
            weights = checkpoints.load_checkpoint(saved)["weights"]
        except CheckpointError:
            num_refused += 1
            continue
        # Padding between the zip's entries may change; weights may not.
        assert all(torch.equal(weights[name], tensor) for name, tensor in reference.items())
    assert num_refused > 10


class _Payload:
    """An attacker's object in a pickle."""

    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "evil.pth"
    content = {"format": checkpoints.FORMAT, "format_version": 1, "weights": _Payload(evidence)}
    torch.save(content, path)
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    assert not evidence.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    for content in ({"model": torch.zeros(3)}, [1, 2], {"format": checkpoints.FORMAT}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="not a vlm-bridge checkpoint"):
            checkpoints.load_checkpoint(path)
    path.write_text("words")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load_checkpoint(path)


def test_weights_of_another_architecture_are_refused_by_name(saved: Path, recipe: Recipe) -> None:
    weights = checkpoints.load_checkpoint(saved)["weights"]
    other = recipe.replace(bridge={"kind": "cross_attention", "num_heads": 4})
    with pytest.raises(CheckpointError, match=r"another architecture: bridge\..* and \d+ more"):
        checkpoints.load_weights(build_captioner(other), weights, saved)
    plain = recipe.replace(bridge=recipe.bridge.replace(standardize_features=False))
    with pytest.raises(CheckpointError, match=r"feature_scale\.mean( \(32,\))? is unknown"):
        checkpoints.load_weights(build_captioner(plain), weights, saved)
    wider = {**weights, "feature_scale.mean": torch.zeros(99)}
    with pytest.raises(CheckpointError, match=r"feature_scale\.mean is \(99,\), not \(32,\)"):
        checkpoints.load_weights(build_captioner(recipe), wider, saved)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("vision_encoder.name=facebook/dinov2-base", "facebook/dinov2-base"),
        ("vision_encoder.layers=[-1]", r"\[-1\]"),
        ("language_model.name=google/gemma-2-9b", "google/gemma-2-9b"),
        ("bridge.standardize_features=false", "False"),
        ("bridge.num_heads=2", "2"),
    ],
)
def test_a_recipe_of_other_parts_is_refused_by_key(
    saved: Path, recipe: Recipe, override: str, wanted: str
) -> None:
    content, other = checkpoints.load_checkpoint(saved), override_recipe(recipe, [override])
    key = override.partition("=")[0]
    with pytest.raises(CheckpointError, match=rf": it has {key}=[^,]+, wanted is {wanted};"):
        checkpoints.check_architecture(content, other, saved)


def test_moved_models_and_settings_of_training_are_no_other_architecture(
    saved: Path, recipe: Recipe
) -> None:
    moved = [
        f"vision_encoder.name=elsewhere/{Path(recipe.vision_encoder.name).name}",
        "language_model.revision=abc", "bridge.dropout=0.5", "learning_rate=1",
    ]  # fmt: skip
    content = checkpoints.load_checkpoint(saved)
    checkpoints.check_architecture(content, override_recipe(recipe, moved), saved)
    del content["recipe"]["vision_encoder"]["resample"]  # from before there was a key
    checkpoints.check_architecture(content, recipe, saved)
    other = override_recipe(recipe, ["vision_encoder.resample=bicubic"])
    with pytest.raises(CheckpointError, match=r"resample=None, wanted is bicubic"):
        checkpoints.check_architecture(content, other, saved)


def test_a_recipe_that_cannot_be_understood_is_one_clear_error(saved: Path) -> None:
    content = checkpoints.load_checkpoint(saved)
    torch.save({**content, "recipe": {**content["recipe"], "feature_cache_pooling": 2}}, saved)
    with pytest.raises(CheckpointError, match="was trained on pooled features"):
        Captioner.from_pretrained(saved)
    content["recipe"]["bridge"]["num_heads"] = "many"
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="its recipe cannot be understood"):
        Captioner.from_pretrained(saved)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_a_weight_that_is_too_large_for_a_dtype_is_refused_by_name(dtype: Any) -> None:
    with pytest.raises(CheckpointError, match=r"bridge.gain does not fit into float16"):
        checkpoints.stored_as({"bridge.gain": torch.tensor([1e6])}, dtype)
