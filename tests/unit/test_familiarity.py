"""Images unlike those of training are noticed, and captions of them marked as unsure."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from captioners import random_features, tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import ConfidenceOptions, Recipe, load_recipe
from vlm_bridge.model_architecture.familiarity import Familiarity, confidence
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture
def recipe(tiny_vit_dir: Path, tiny_llama_dir: Path) -> Recipe:
    options = {"remembered_images": 4, "weights": [0, 0, 4], "unsure_below": 0.9}
    return tiny_recipe(tiny_vit_dir, tiny_llama_dir, confidence=options)


def test_a_remembered_image_is_as_similar_as_can_be() -> None:
    features = torch.randn(6, 5, 16)
    familiarity = Familiarity(ConfidenceOptions(remembered_images=8, unlike_below=0.5), 16)
    assert familiarity(features).tolist() == [0] * 6
    familiarity.remember(features[:3])
    similarity = familiarity(features)
    torch.testing.assert_close(similarity[:3], torch.ones(3))
    assert (similarity[3:] < 0.999).all()
    torch.testing.assert_close(familiarity(3 * features), similarity)
    assert familiarity.is_unlike(features).tolist() == (similarity < 0.5).tolist()
    # Further images take the places of the first ones; of too many, some are kept.
    familiarity.remember(features[3:4])
    assert familiarity(features[:1]) < 0.999
    torch.testing.assert_close(familiarity(features[1:4]), torch.ones(3))
    familiarity.remember(torch.randn(30, 5, 16))
    assert familiarity.memory.norm(dim=1).tolist() == pytest.approx([1] * 8)


def test_confidence_is_logistic_in_score_and_similarity() -> None:
    options = ConfidenceOptions(weights=(1.0, 2.0, 3.0))
    assert confidence(options, -0.5, 0.25) == pytest.approx(1 / (1 + math.exp(-0.75)))
    assert confidence(ConfidenceOptions(), -3.0, 0.1) == 0.5


def test_captions_of_unlike_images_are_unsure(recipe: Recipe) -> None:
    model = tiny_captioner(recipe)
    known, other = noise(1), noise(2).point(lambda value: value // 16)
    assert model.familiarity is not None
    model.familiarity.remember(model.bridge_features(model.encode_images([known])))
    captioner = Captioner(model, recipe)
    sure, unsure = captioner.caption([known, other])
    assert sure.confidence == pytest.approx(1 / (1 + math.exp(-4)), abs=1e-4)
    assert sure.unsure is False
    assert unsure.confidence is not None and unsure.confidence < sure.confidence
    (candidates,) = captioner.candidates([known], 2)
    assert [c.confidence for c in candidates] == pytest.approx([sure.confidence] * 2, abs=1e-4)
    assert candidates[0].sureness() == {"confidence": 0.982, "unsure": False}


def test_without_a_recipe_for_it_there_is_no_confidence(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    plain = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
    captioner = Captioner(tiny_captioner(plain), plain)
    result = captioner.caption(noise(1))
    assert (result.confidence, result.unsure) == (None, None)
    (found,) = captioner.candidates([noise(1)], 1)
    assert found[0].sureness() == {}


def labels(repository: Path, name: str) -> list[dict[str, str]]:
    with (repository / "tests" / "labels" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "of_right", "of_wrong"), [("flickr8k-dev.csv", 0.1, 0), ("coco-val.csv", 1, 0.5)]
)
def test_the_bundled_confidence_marks_wrong_subjects(
    repository: Path, name: str, of_right: float, of_wrong: float
) -> None:
    """At most a tenth of the right captions of Flickr8k, at least half of the wrong ones of COCO.

    A person has labeled them by the rule of `benchmarks.confidence`.
    """
    content = checkpoints.load_checkpoint(checkpoints.checkpoint_path(checkpoints.BUNDLED))
    options = checkpoints.recipe_of(content, "bundled").confidence
    assert options is not None
    marked: dict[str, list[bool]] = {"1": [], "0": []}
    for row in labels(repository, name):
        sure = confidence(options, float(row["score"]), float(row["similarity"]))
        marked[row["right"]].append(sure < options.unsure_below)
    assert len(marked["1"]) + len(marked["0"]) >= 100
    assert np.mean(marked["1"]) <= of_right
    assert np.mean(marked["0"]) >= of_wrong


def test_the_fit_is_that_of_the_bundled_captioner(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.confidence import fitted, read_labels

    weights, threshold = fitted(read_labels(repository / "tests" / "labels" / "flickr8k-dev.csv"))
    recipe = load_recipe(repository / "config" / "captioner-flickr8k-words-scst.yaml")
    assert recipe.confidence is not None
    assert weights.tolist() == pytest.approx(recipe.confidence.weights, abs=2e-3)
    assert threshold == pytest.approx(recipe.confidence.unsure_below, abs=2e-3)


def test_remembered_images_are_saved_and_may_be_new_at_a_start(
    recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_captioner(recipe)
    assert model.familiarity is not None
    model.familiarity.remember(random_features(model, 3))
    paths = [tmp_path / f"{name}.pth" for name in ("one", "two", "mean")]
    checkpoints.save_checkpoint(paths[0], recipe, model.trained_state_dict())
    loaded = Captioner.from_pretrained(paths[0]).model
    assert loaded.familiarity is not None
    torch.testing.assert_close(loaded.familiarity.memory, model.familiarity.memory)
    # The mean of runs, which remember different images, remembers those of the first.
    before = model.familiarity.memory.clone()
    model.familiarity.remember(random_features(model, 3).flip(0))
    checkpoints.save_checkpoint(paths[1], recipe, model.trained_state_dict())
    checkpoints.save_average(paths[2], paths[:2])
    mean = checkpoints.load_checkpoint(paths[2])["weights"]
    torch.testing.assert_close(mean["familiarity.memory"], before)
    # A run may start from a checkpoint without.
    older = recipe.replace(confidence=None)
    checkpoints.save_checkpoint(paths[0], older, tiny_captioner(older).trained_state_dict())
    content = checkpoints.load_checkpoint(paths[0])
    checkpoints.restore(model, content, paths[0], is_start=True)
    with pytest.raises(checkpoints.CheckpointError, match=r"familiarity\.memory is missing"):
        checkpoints.restore(model, content, paths[0])
