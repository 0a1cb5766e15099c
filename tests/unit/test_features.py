"""What training reads of its pictures is the same from a cache and without one; what it costs decides which."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from captioners import BRIDGES, SPEAKS_TO, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.feature_cache import FeatureCache, OnTheFlyPixels, caches_below
from vlm_bridge.data_pipeline.loader import TokenizedImages, whole_rows
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.training_strategy import features
from vlm_bridge.training_strategy.features import SplitFeatures, build_caches, split_features
from vlm_bridge.training_strategy.trainer import caption_format
from vlm_bridge.training_strategy.validation import batch_loss, load_batch

NO_LANGUAGE_MODEL = Path("not/needed")
SPEEDS = ("measure_disk", "measure_reading", "_measure_encoding")


class Split:
    """A split of the drawn caption folder, its encoder, and what was said."""

    def __init__(self, data: Path, vision: Path, cache_dir: Path, name: str = "val"):
        self.data, self.vision, self.cache_dir, self.name = data, vision, cache_dir, name
        self.images = CaptionFolder.open(data).split(name)  # type: ignore[arg-type]
        self.said: list[str] = []

    def recipe(
        self, *, vision: Path | None = None, image_size: int | None = None, **changes: Any
    ) -> Recipe:
        settings = {"feature_cache": str(self.cache_dir), "data_dir": str(self.data), **changes}
        recipe = tiny_recipe(vision or self.vision, NO_LANGUAGE_MODEL, **settings)
        return recipe.replace(vision_encoder=recipe.vision_encoder.replace(image_size=image_size))

    def encoder(self, recipe: Recipe) -> Any:
        return build_vision_encoder(recipe.vision_encoder)

    def features(self, **changes: Any) -> SplitFeatures:
        recipe = self.recipe(**changes)
        return split_features(
            self.encoder(recipe), recipe, self.name, self.images, self.said.append
        )

    @torch.no_grad()
    def read(self, epoch: int = 0, **changes: Any) -> torch.Tensor:
        """The features of all images, encoded here where there is no cache."""
        values = self.features(**changes).in_epoch(epoch)[np.arange(len(self.images))]
        return values.float() if values.ndim == 3 else self.encoder(self.recipe(**changes))(values)

    @property
    def num_caches(self) -> int:
        return len(caches_below(self.cache_dir))


@pytest.fixture
def split(drawn_caption_folder: Path, tiny_vit_dir: Path, tmp_path: Path) -> Split:
    return Split(drawn_caption_folder, tiny_vit_dir, tmp_path / "cache")


@pytest.fixture
def train_split(drawn_caption_folder: Path, tiny_vit_dir: Path, tmp_path: Path) -> Split:
    return Split(drawn_caption_folder, tiny_vit_dir, tmp_path / "cache", "train")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_cached_features_are_the_encoders(split: Split, dtype: str) -> None:
    settings = {"feature_cache_dtype": dtype}
    cached, encoded = split.read(**settings), split.read(**settings, feature_cache="off")
    assert split.num_caches == 1
    if dtype == "int8":
        assert ((cached - encoded).abs() <= encoded.abs().amax(-1, keepdim=True) / 254 * 1.01).all()
    else:
        torch.testing.assert_close(
            cached, encoded, rtol=torch.finfo(getattr(torch, dtype)).eps, atol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("bridge", BRIDGES)
def test_losses_are_those_without_a_cache(
    drawn_caption_folder: Path,
    tiny_dinov2_dir: Path,
    bridge: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    language_model = request.getfixturevalue(f"tiny_{SPEAKS_TO[bridge]}_dir")
    images = CaptionFolder.open(drawn_caption_folder).split("val")
    losses = []
    for place in (str(tmp_path / "cache"), "off"):
        recipe = tiny_recipe(tiny_dinov2_dir, language_model, bridge, feature_cache=place)
        model = tiny_captioner(recipe)
        read = split_features(model.vision_encoder, recipe, "val", images, lambda line: None)
        assert isinstance(read.items, OnTheFlyPixels if place == "off" else FeatureCache)
        data = TokenizedImages(images, caption_format(model.language_model, recipe))
        batch = data.pack(whole_rows([2] * len(images)))
        losses.append(batch_loss(model, load_batch(batch, read, model.device)).token_losses)
    torch.testing.assert_close(losses[0], losses[1], atol=5e-3, rtol=5e-3)


# The key.


def test_the_key_follows_everything_that_features_depend_on(
    train_split: Split, tiny_dinov2_dir: Path, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"vision": tiny_dinov2_dir},
        {"image_size": 64},
        {"feature_cache_dtype": "int8"},
        {"feature_cache_dtype": "bfloat16"},
        {"feature_cache_views": 2},
        {"feature_cache_views": 1},
        {"feature_cache_views": 2, "seed": 1},
    ]
    for count, change in enumerate(changes, start=1):
        for _ in range(2):
            train_split.features(**change)
            assert train_split.num_caches == count, change

    changed = shutil.copytree(
        train_split.data, tmp_path / "changed", ignore=shutil.ignore_patterns(".features")
    )
    other = Split(changed, train_split.vision, train_split.cache_dir, "train")
    other.features()
    assert other.num_caches == len(changes), (
        "the same pictures in another place have the same features"
    )
    pictures = [image.path for image in other.images]
    pictures[0].write_bytes(pictures[1].read_bytes())
    other.features()
    assert other.num_caches == len(changes) + 1


def test_what_features_do_not_depend_on_does_not_matter(split: Split) -> None:
    for change in (
        {},
        {"batch_size": 2},
        {"learning_rate": 1.0},
        {"seed": 5},
        {"feature_cache_views": 3},
    ):
        split.features(**change)  # validation has no views
    assert split.num_caches == 1


def test_other_weights_are_another_encoder(split: Split) -> None:
    split.features()
    recipe = split.recipe()
    encoder = split.encoder(recipe)
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    split_features(encoder, recipe, "val", split.images, split.said.append)
    assert split.num_caches == 2


# Views.


def test_every_epoch_has_its_view_with_a_cache_or_without(train_split: Split) -> None:
    def read(epoch: int, **changes: Any) -> torch.Tensor:
        return train_split.read(epoch, feature_cache_views=2, **changes)

    first, second = read(0), read(1)
    torch.testing.assert_close(first, read(0, feature_cache="off"), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(second, read(1, feature_cache="off"), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, read(0, seed=1))
    assert torch.equal(first, read(2))  # two views take turns
    assert not torch.allclose(first, train_split.read())


def test_validation_shows_whole_images(split: Split) -> None:
    assert torch.equal(split.read(0, feature_cache_views=2), split.read(1))


def test_views_and_distillation_are_refused_together(split: Split) -> None:
    with pytest.raises(ConfigurationError, match="feature_cache_views=0"):
        split.recipe(feature_cache_views=1, distillation={"teacher": "x"})


# What it costs.


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Images a second that measuring is made to say."""
    said = dict.fromkeys(SPEEDS, 1e9)
    for name in SPEEDS:
        monkeypatch.setattr(features, name, lambda *_, name=name: said[name])
    return said


@pytest.fixture
def in_data_dir(drawn_caption_folder: Path, tiny_vit_dir: Path, tmp_path: Path) -> Split:
    """With a cache beside the data."""
    data = shutil.copytree(
        drawn_caption_folder, tmp_path / "data", ignore=shutil.ignore_patterns(".features")
    )
    return Split(data, tiny_vit_dir, data / ".features")


def judge_after_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MEASURE_SECONDS", 0.0)
    monkeypatch.setitem(features.ENCODE_BATCH, "cpu", 2)


def test_a_cache_that_would_be_slower_is_not_made(
    in_data_dir: Split, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_after_the_first_batch(monkeypatch)
    speeds["measure_disk"] = 1e-9
    assert isinstance(in_data_dir.features(feature_cache="auto").items, OnTheFlyPixels)
    assert in_data_dir.num_caches == 0
    assert "encoding them gives" in in_data_dir.said[-1]
    assert isinstance(
        in_data_dir.features(feature_cache=str(in_data_dir.cache_dir)).items, FeatureCache
    )


def test_a_cache_that_is_slower_is_not_read(in_data_dir: Split, speeds: dict[str, float]) -> None:
    assert isinstance(in_data_dir.features(feature_cache="auto").items, FeatureCache)
    assert isinstance(in_data_dir.features(feature_cache="auto").items, FeatureCache)
    assert "reading gives 1,000,000,000 pictures/s" in in_data_dir.said[-1]
    speeds["measure_reading"] = 1e-9
    assert isinstance(in_data_dir.features(feature_cache="auto").items, OnTheFlyPixels)
    assert in_data_dir.num_caches == 1
    speeds["_measure_encoding"] = 1e-10
    assert isinstance(in_data_dir.features(feature_cache="auto").items, FeatureCache)


def test_a_disk_that_is_slow_to_start_is_looked_at_twice(
    in_data_dir: Split, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_data_dir.features(feature_cache="auto")
    looks = iter([1e-9, 1e9])
    monkeypatch.setattr(features, "measure_reading", lambda *args: next(looks))
    assert isinstance(in_data_dir.features(feature_cache="auto").items, FeatureCache)
    assert "reading gives 1,000,000,000 pictures/s" in in_data_dir.said[-1]


def test_measuring_is_real(in_data_dir: Split) -> None:
    for _ in range(2):
        in_data_dir.features(feature_cache="auto")
    assert "pictures/s" in in_data_dir.said[-1]


def test_without_room_training_is_told_and_goes_on(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    read = split.features()
    assert read[np.array([0, 1])].shape == (2, 3, 48, 48)
    assert "no room" in split.said[-1]
    assert split.num_caches == 0


def test_size_and_speed_are_said(split: Split) -> None:
    split.features()
    assert "features of 8 pictures take" in split.said[0]
    assert "GiB (float16) below" in split.said[0]


def test_progress_says_how_long_it_will_take(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_after_the_first_batch(monkeypatch)
    split.features()
    assert any("encoded 4 of 8 pictures" in line and " left" in line for line in split.said)
    assert any("encoded 8 of 8 pictures" in line for line in split.said)


def test_building_ahead_makes_what_training_reads(split: Split, train_split: Split) -> None:
    recipe = split.recipe(feature_cache_views=2, max_validation_images=5)
    built = build_caches(recipe, split.said.append)
    assert [(cache.split, cache.num_images, cache.was_there) for cache in built] == [
        ("train", 48, False),
        ("val", 5, False),
    ]
    assert all(cache.was_there for cache in build_caches(recipe, split.said.append, check_all=True))
    train_split.features(feature_cache_views=2)
    split.images = split.images[:5]
    split.features()
    assert split.num_caches == 2
    with pytest.raises(ConfigurationError, match="feature_cache=auto"):
        build_caches(split.recipe(feature_cache="off"), split.said.append)
