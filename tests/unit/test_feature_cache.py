"""Cached features are the encoder's, and a cache that is stale, damaged or half-built is never used."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captioners import BRIDGES, SPEAKS_TO, tiny_captioner, tiny_recipe
from vlm_bridge.data_pipeline import feature_cache
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.feature_cache import FeatureCache, OnTheFlyPixels, cache_key, open_or_build
from vlm_bridge.data_pipeline.loader import TokenizedImages, whole_rows
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.training_strategy.features import split_features
from vlm_bridge.training_strategy.trainer import caption_format
from vlm_bridge.training_strategy.validation import batch_loss

SHAPE = (2, 3)


@pytest.fixture
def paths(drawn_caption_folder: Path) -> list[Path]:
    return [image.path for image in CaptionFolder.open(drawn_caption_folder).split("val")]


class Encode:
    """An encoder of pictures that counts them."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.encoded = 0

    def __call__(self, pictures: list) -> np.ndarray:
        self.encoded += len(pictures)
        means = np.stack([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures])
        return self.scale * np.stack([means, -means], axis=1)


def build(root: Path, paths: list[Path], encode: Encode, key: str = "key", **options) -> FeatureCache | None:
    return open_or_build(root, key, paths, SHAPE, encode, num_workers=0, **options)


def test_every_picture_is_encoded_once_and_found_again(tmp_path: Path, paths: list[Path]) -> None:
    encode = Encode()
    done: list[int] = []
    first = build(tmp_path, paths, encode, progress=done.append)
    again = build(tmp_path, paths, encode)
    assert encode.encoded == done[-1] == len(paths)
    assert first is not None
    assert again is not None
    chosen = np.array([3, 0, 3])
    expected = Encode()([feature_cache.open_image(paths[i]) for i in chosen])
    assert first[chosen].dtype == np.float16
    np.testing.assert_allclose(first[chosen], expected, rtol=1e-3)
    np.testing.assert_array_equal(first[chosen], again[chosen])


@pytest.mark.parametrize("num_workers", [0, 3])
def test_several_batches_keep_their_order(tmp_path: Path, paths: list[Path], num_workers: int) -> None:
    many = paths * 9
    cache = open_or_build(tmp_path, "k", many, SHAPE, Encode(), num_workers=num_workers)
    assert cache is not None
    once = cache[np.arange(len(paths))]
    for copy in range(9):
        np.testing.assert_array_equal(cache[copy * len(paths) + np.arange(len(paths))], once)


def test_another_key_is_another_cache(tmp_path: Path, paths: list[Path]) -> None:
    build(tmp_path, paths, Encode())
    other = Encode(scale=0.5)
    cache = build(tmp_path, paths, other, key="other")
    assert other.encoded == len(paths)
    assert cache is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_keys_do_not_run_together() -> None:
    assert cache_key("ab", "c") != cache_key("a", "bc")
    assert cache_key("ab", "c") == cache_key("ab", "c")


def damage_nothing_left(folder: Path) -> None:
    (folder / "index.json").unlink()


def damage_truncated_features(folder: Path) -> None:
    data = folder / "features.npy"
    data.write_bytes(data.read_bytes()[:-4])


def damage_no_header(folder: Path) -> None:
    (folder / "features.npy").write_bytes(b"")


def damage_truncated_index(folder: Path) -> None:
    index = folder / "index.json"
    index.write_text(index.read_text()[:-3])


def damage_other_shape(folder: Path) -> None:
    np.save(folder / "features.npy", np.zeros((1, *SHAPE), np.float16))


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_left,
        damage_truncated_features,
        damage_no_header,
        damage_truncated_index,
        damage_other_shape,
    ],
)
def test_a_damaged_cache_is_built_anew(tmp_path: Path, paths: list[Path], damage) -> None:
    whole = build(tmp_path, paths, Encode())
    assert whole is not None
    expected = whole[np.arange(len(paths))].copy()
    damage(tmp_path / "key")
    encode = Encode()
    rebuilt = build(tmp_path, paths, encode)
    assert encode.encoded == len(paths)
    assert rebuilt is not None
    np.testing.assert_array_equal(rebuilt[np.arange(len(paths))], expected)


def test_an_interrupted_build_leaves_nothing_that_is_used(tmp_path: Path, paths: list[Path]) -> None:
    class Interrupting(Encode):
        def __call__(self, pictures: list) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, paths, Interrupting())
    assert list(tmp_path.iterdir()) == []
    # A killed process cannot even tidy up.
    (tmp_path / ".building-key-1").mkdir()
    np.save(tmp_path / ".building-key-1" / "features.npy", np.zeros((len(paths), *SHAPE), np.float16))
    encode = Encode()
    build(tmp_path, paths, encode)
    assert encode.encoded == len(paths)


def test_without_room_there_is_no_cache(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert build(tmp_path, paths, Encode()) is None
    assert list(tmp_path.iterdir()) == []


def test_features_beyond_float16_are_refused(tmp_path: Path, paths: list[Path]) -> None:
    with pytest.raises(DataError, match="feature_cache=off"):
        build(tmp_path, paths, Encode(scale=1e5))
    assert list(tmp_path.iterdir()) == []


def test_a_broken_picture_is_named(tmp_path: Path, paths: list[Path]) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not much")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        build(tmp_path / "cache", [*paths, broken], Encode())
    assert list((tmp_path / "cache").iterdir()) == []


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
    folder = CaptionFolder.open(drawn_caption_folder)
    images = folder.split("val")
    losses = []
    for place in (str(tmp_path / "cache"), "off"):
        recipe = tiny_recipe(tiny_dinov2_dir, language_model, bridge, feature_cache=place)
        model = tiny_captioner(recipe)
        features = split_features(model, recipe, folder, "val", images, lambda line: None)
        assert isinstance(features, OnTheFlyPixels if place == "off" else FeatureCache)
        data = TokenizedImages(images, caption_format(model.language_model, recipe))
        batch = data.pack(whole_rows([2] * len(images)))
        losses.append(batch_loss(model, batch, features[batch.image_indices]).token_losses)
    torch.testing.assert_close(losses[0], losses[1], atol=5e-3, rtol=5e-3)


def test_the_key_follows_encoder_and_dataset(
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_dinov2_dir: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    cache_dir = tmp_path / "cache"

    def caches_after(vision: Path, data: Path) -> int:
        folder = CaptionFolder.open(data)
        recipe = tiny_recipe(vision, tiny_llama_dir, feature_cache=str(cache_dir))
        split_features(tiny_captioner(recipe), recipe, folder, "val", folder.split("val"), lambda line: None)
        return len(list(cache_dir.iterdir()))

    assert caches_after(tiny_vit_dir, drawn_caption_folder) == 1
    assert caches_after(tiny_vit_dir, drawn_caption_folder) == 1
    assert caches_after(tiny_dinov2_dir, drawn_caption_folder) == 2
    changed = shutil.copytree(drawn_caption_folder, tmp_path / "changed", ignore=shutil.ignore_patterns(".*"))
    manifest = changed / "manifest.json"
    fingerprint = CaptionFolder.open(changed).fingerprint
    manifest.write_text(manifest.read_text().replace(fingerprint, "sha256:other"))
    assert caches_after(tiny_vit_dir, changed) == 3


def test_without_room_training_is_told_and_goes_on(
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    folder = CaptionFolder.open(drawn_caption_folder)
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, feature_cache=str(tmp_path / "cache"))
    said: list[str] = []
    features = split_features(tiny_captioner(recipe), recipe, folder, "val", folder.split("val"), said.append)
    assert isinstance(features, OnTheFlyPixels)
    assert features[np.array([0, 1])].shape == (2, 3, 48, 48)
    assert any("no room" in line for line in said)
