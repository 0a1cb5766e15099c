"""Features from a cache are the encoder's; stale, damaged and unfinished caches are not used."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captioners import tiny_recipe
from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.features import (
    FeatureCache,
    FeatureFormat,
    OnTheFlyPixels,
    Views,
    caches_below,
    evict,
    images_digest,
)
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.training_strategy.data import split_features

TOKENS, DIM, NUM_IMAGES = 2, 3, 22
KEYS = [f"{number:024x}" for number in range(4)]
FORMATS = ("float16", "bfloat16", "int8", "float32")


class Numbers:
    """Pixels of no image: those of image i are i."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).float()


def features_of(pixels_b: torch.Tensor) -> torch.Tensor:
    """Image i has features of i + token / 10."""
    tokens = torch.arange(TOKENS) / 10
    return (pixels_b[:, None, None] + tokens[:, None]).expand(-1, TOKENS, DIM)


class Encode:
    """List what is encoded; stop at an image."""

    def __init__(self, stop_at: int | None = None, seconds: float = 0.0):
        self.stop_at, self.seconds = stop_at, seconds
        self.encoded: list[int] = []

    def __call__(self, pixels_b: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.stop_at in pixels_b.int().tolist():
            raise KeyboardInterrupt
        self.encoded += pixels_b.int().tolist()
        return features_of(pixels_b)


def build(
    root: Path, encode: Any = None, key: str = KEYS[0], check_all: bool = False, **options: Any
) -> FeatureCache:
    cache = FeatureCache(
        root / key, FeatureFormat(TOKENS, DIM), Numbers(), encode or Encode(), **options
    )
    cache.batch_images = 3
    return cache.open(check_all)


def check(cache: FeatureCache) -> None:
    indices = np.random.default_rng(0).permutation(NUM_IMAGES)
    expected = features_of(torch.from_numpy(indices).float())
    torch.testing.assert_close(cache[indices].float(), expected, rtol=1e-3, atol=0)


# The format of a record.


def values(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(7, 5, 12, generator=torch.Generator().manual_seed(0))


def round_trip(features: torch.Tensor, dtype: Any) -> torch.Tensor:
    format = FeatureFormat(5, 12, dtype)
    return format.unpack(format.pack(features))


def test_floats_are_stored_as_they_are() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        assert torch.equal(round_trip(values(), dtype), values().to(getattr(torch, dtype)))


@pytest.mark.parametrize("scale", [0, 1e-6, 1e6])
def test_int8_is_off_by_half_a_step_of_each_token(scale: float) -> None:
    features = values(scale) * torch.logspace(-3, 3, 5)[:, None]  # tokens of different size
    half_a_step = features.abs().amax(-1, keepdim=True) / 127 / 2
    assert ((round_trip(features, "int8") - features).abs() <= half_a_step * 1.001).all()


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"not finite in float16.*feature_cache=off"):
        round_trip(values(1e5), "float16")
    assert torch.isfinite(round_trip(values(1e5), "bfloat16")).all()
    for dtype in FORMATS:
        with pytest.raises(DataError, match="not finite"):
            round_trip(values() * float("nan"), dtype)


# Building, opening, damage.


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_image_is_encoded_once_and_found_again(tmp_path: Path, num_workers: int) -> None:
    encode, again = Encode(), Encode()
    first = build(tmp_path, encode, num_workers=num_workers)
    assert encode.encoded == list(range(NUM_IMAGES)) and not first.was_there
    check(first)
    second = build(tmp_path, again)
    assert second.was_there and again.encoded == []
    check(second)
    assert second[np.array([3, 0, 3])].shape == (3, TOKENS, DIM)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10 * (TOKENS * DIM * 2 + 4) + 5] ^= 1  # of image 10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "encoded_from"),
    [(flip_a_byte, 10), (truncate, NUM_IMAGES - 1), (lambda path: path.write_bytes(b""), 0)],
)
def test_a_damaged_cache_is_encoded_anew_from_the_damage_on(
    tmp_path: Path, damage: Callable[[Path], Any], encoded_from: int
) -> None:
    build(tmp_path)
    damage(tmp_path / KEYS[0] / "features.bin")
    encode = Encode()
    check(build(tmp_path, encode, check_all=True))
    assert encode.encoded == list(range(encoded_from, NUM_IMAGES))


def test_an_interrupted_build_continues(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Encode(stop_at=20))
    encode = Encode()
    check(build(tmp_path, encode))
    assert encode.encoded == list(range(18, NUM_IMAGES))
    assert not list(tmp_path.glob("*/*.building"))


def test_one_builds_and_others_wait_for_it_while_all_read(tmp_path: Path) -> None:
    encoders = [Encode(seconds=0.02) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda encode: build(tmp_path, encode), encoders, timeout=30))
    for cache in caches:  # all open at once: a reader must not keep another from opening
        check(cache)
    encoded = [index for encode in encoders for index in encode.encoded]
    assert encoded == list(range(NUM_IMAGES))


def test_without_room_there_is_no_new_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, key=KEYS[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(DataError, match=r"no room .*512.0 MiB are left"):
        build(tmp_path)
    assert not list((tmp_path / KEYS[0]).glob("features.*"))
    check(build(tmp_path, key=KEYS[1]))


def test_the_least_recently_used_caches_go_first(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for key, when in zip(KEYS, (30, 10, 40, 20), strict=True):
        build(tmp_path, key=key)
        os.utime(tmp_path / key, (when, when))
    build(tmp_path, key=KEYS[1])  # opening is use
    caches = caches_below(tmp_path)
    assert [folder.name for folder in caches] == [KEYS[3], KEYS[0], KEYS[2], KEYS[1]]
    size = max(caches.values())
    assert [folder.name for folder in evict(tmp_path, 2 * size)] == [KEYS[3], KEYS[0]]
    in_use = build(tmp_path, key=KEYS[2])
    evict(tmp_path, 0)
    assert caches_below(tmp_path) == {} and (tmp_path / "other").is_dir()
    check(in_use)  # an open file outlives its name


# Images and views.


def test_the_digest_is_that_of_contents_in_order(
    drawn_caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(drawn_caption_folder / "val" / "images", tmp_path / "images")
    paths, notes = sorted(folder.iterdir()), tmp_path / "notes"
    digest = images_digest(paths, notes)
    assert digest not in (images_digest(paths[::-1], notes), images_digest(paths[:-1], notes))
    with monkeypatch.context() as patch:  # nobody touched them: they are not read again
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        assert images_digest(paths, notes) == digest
    paths[2].write_bytes(paths[3].read_bytes())
    assert images_digest(paths, notes) != digest
    with pytest.raises(DataError, match=r"gone\.jpg"):
        images_digest([tmp_path / "gone.jpg"], tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 not much")
    pixels = OnTheFlyPixels([tmp_path / "a.jpg"], lambda images: torch.zeros(len(images)))
    with pytest.raises(ImageError, match=r"a\.jpg"):
        FeatureCache(tmp_path / KEYS[0], FeatureFormat(2, 3), pixels, Encode()).open()


def test_a_view_is_fixed_by_seed_image_and_number() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def view(seed: int = 3, index: int = 5, number: int = 1) -> bytes:
        shown = Views(4, seed).view(image, index, number)
        return repr(shown.size).encode() + shown.tobytes()

    assert view() == view()
    assert len({view(), view(seed=4), view(index=6), view(number=2)}) == 4
    sizes = [Views(1, 0).view(image, index, 0).size for index in range(50)]
    shares = [width * height / (image.width * image.height) for width, height in sizes]
    assert 0.4 < min(shares) < max(shares) <= 1 and len(set(sizes)) > 20
    assert Views(1, 0).view(Image.new("RGB", (1, 1)), 0, 0).size == (1, 1)


def test_epochs_take_turns_through_all_views() -> None:
    views = Views(3, seed=7)
    of_epochs = np.stack([views.of_epoch(20, epoch) for epoch in range(3)])
    assert all(sorted(column) == [0, 1, 2] for column in of_epochs.T)
    np.testing.assert_array_equal(views.of_epoch(20, 4), of_epochs[1])
    assert not np.array_equal(of_epochs[0], Views(3, seed=8).of_epoch(20, 0))


# Features that training reads.


class Split:
    """A split of the drawn caption folder, whose features are cached or not."""

    def __init__(self, data: Path, vision: Path, root: Path):
        self.images = CaptionFolder.open(data).split("train")
        self.vision, self.root = vision, root

    def encoder(self, vision: Path | None = None, image_size: int | None = None) -> Any:
        name = str(vision or self.vision)
        return build_vision_encoder(VisionEncoderConfig(name=name, image_size=image_size))

    def features(
        self, encoder: Any = None, *, cached: bool = True, split: str = "train", **changes: Any
    ) -> Any:
        cache = str(self.root) if cached else "off"
        recipe = tiny_recipe(self.vision, Path("not/needed"), feature_cache=cache, **changes)
        return split_features(encoder or self.encoder(), recipe, split, self.images)

    @torch.no_grad()
    def read(self, epoch: int = 0, **options: Any) -> torch.Tensor:
        items = self.features(**options).in_epoch(epoch)[np.arange(len(self.images))]
        return items.float() if items.ndim == 3 else self.encoder()(items)


@pytest.fixture
def split(drawn_caption_folder: Path, tiny_vit_dir: Path, tmp_path: Path) -> Split:
    return Split(drawn_caption_folder, tiny_vit_dir, tmp_path / "cache")


@pytest.mark.parametrize("dtype", FORMATS)
def test_cached_features_are_the_encoders(split: Split, dtype: str) -> None:
    cached, encoded = split.read(feature_cache_dtype=dtype), split.read(cached=False)
    assert len(caches_below(split.root)) == 1
    if dtype == "int8":
        assert ((cached - encoded).abs() <= encoded.abs().amax(-1, keepdim=True) / 254 * 1.01).all()
    else:
        rounding = torch.finfo(getattr(torch, dtype)).eps
        torch.testing.assert_close(cached, encoded, rtol=rounding, atol=1e-6)


def test_the_key_follows_everything_that_features_depend_on(
    split: Split, drawn_caption_folder: Path, tiny_dinov2_dir: Path, tmp_path: Path
) -> None:
    other_weights = split.encoder()
    with torch.no_grad():
        next(other_weights.parameters()).mul_(1.5)
    changes: list[dict[str, Any]] = [
        {},
        {"encoder": split.encoder(tiny_dinov2_dir)},
        {"encoder": split.encoder(image_size=64)},
        {"encoder": other_weights},
        {"feature_cache_dtype": "int8"},
        {"feature_cache_views": 2},
        {"feature_cache_views": 1},
        {"feature_cache_views": 2, "seed": 1},
    ]
    for count, change in enumerate(changes, start=1):
        for _ in range(2):
            split.features(**change)
            assert len(caches_below(split.root)) == count, change
    moved = shutil.copytree(drawn_caption_folder, tmp_path / "moved")
    other = Split(moved, split.vision, split.root)
    other.features()
    assert len(caches_below(split.root)) == len(changes), "equal images have equal features"
    shutil.copy(other.images[1].path, other.images[0].path)
    other.features()
    assert len(caches_below(split.root)) == len(changes) + 1


def test_every_epoch_has_its_view_with_a_cache_or_without(split: Split) -> None:
    views = {"feature_cache_views": 2}
    first, second = split.read(0, **views), split.read(1, **views)
    for epoch, cached in enumerate((first, second)):
        encoded = split.read(epoch, **views, cached=False)
        torch.testing.assert_close(cached, encoded, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(first, second)
    assert torch.equal(first, split.read(2, **views))  # two views take turns
    assert torch.equal(split.read(split="val", **views), split.read())  # whole images
