"""The encoder's side of training: features of a split, from a cache or pictures encoded as they are needed."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_bridge import runtime
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import picture_check
from vlm_bridge.data_pipeline.augmentation import Views
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionedImages
from vlm_bridge.data_pipeline.data_folder import DataFolder, SplitImages, open_data_folder
from vlm_bridge.data_pipeline.feature_cache import (
    LAYOUT,
    CacheFiles,
    CacheUnavailable,
    FeatureCache,
    OnTheFlyPixels,
    cache_key,
    measure_disk,
    measure_reading,
    open_or_build,
    pictures_digest,
)
from vlm_bridge.data_pipeline.feature_format import FeatureFormat
from vlm_bridge.data_pipeline.shard_folder import ShardFolder, ShardImages
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.vision_encoder import (
    ENCODE_TOGETHER_ON_CPU,
    build_vision_encoder,
    encoder_fingerprint,
)
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.validation import Features

ENCODE_BATCH = {"cpu": ENCODE_TOGETHER_ON_CPU, "cuda": 64}
"""Images encoded together, by kind of device: a GPU is full (64 x 257 tokens of DINOv2), and the memory that it takes
is little beside that of training. `ENCODE_BATCH_ELSEWHERE` for the others."""
ENCODE_BATCH_ELSEWHERE = 32
MEASURE_SECONDS = 2.0
"""How long encoding is watched, behind its first batch, before its speed is told and judged."""
SECOND_LOOK_SECONDS = 4.0
"""How long a disk is read again that seemed slower than encoding."""
SAY_EVERY_SECONDS = 10.0
MEASURED_IMAGES = 16

Say = Callable[[str], None]


class SplitFeatures:
    """Features or pixels of a split by image index; where images have several views, those of one epoch."""

    def __init__(self, items: Features, num_images: int, views: Views | None = None):
        self.items = items
        self.num_images = num_images
        self.views = views

    def __getitem__(self, indices: np.ndarray) -> Any:
        """What the first epoch shows."""
        return self.in_epoch(0)[indices]

    def in_epoch(self, epoch: int) -> Features:
        """The features that an epoch shows, by image index."""
        if self.views is None:
            return self.items
        chosen = self.views.of_epoch(self.num_images, epoch)
        return _Chosen(self.items, np.arange(self.num_images) * self.views.count + chosen)


@dataclass(frozen=True)
class _Chosen:
    """Of some items, one for each image."""

    items: Features
    item_of_image: np.ndarray

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.items[self.item_of_image[indices]]


def split_features(
    encoder: Any,
    recipe: Recipe,
    split: str,
    images: Sequence[CaptionedImage],
    say: Say,
    world: World | None = None,
) -> SplitFeatures:
    """The features of a split's images as ``feature_cache`` says; without a cache, their pixels as they are needed.

    Processes build a cache together, shard by shard. They use it if all of them can: what is cached is rounded.
    """
    world = world or World(next(encoder.parameters()).device)
    pixels = _pixels(encoder, recipe, split, images)
    if recipe.feature_cache == "off":
        return SplitFeatures(pixels, len(images), pixels.views)
    cache = refusal = None
    try:
        cache = cached_features(
            encoder, recipe, split, pixels, say, only_if_quicker=recipe.feature_cache == "auto"
        )
    except CacheUnavailable as reason:
        refusal = str(reason)
        if recipe.feature_cache == "auto":
            with suppress(OSError):  # nothing is left in the data where nothing could be cached
                cache_root(recipe).rmdir()
    world.wait()
    refusal = next(filter(None, world.gather(refusal)), None)
    if cache is not None and refusal is None:
        return SplitFeatures(cache, len(images), pixels.views)
    if cache is not None:
        cache.close()
    say(f"{refusal}: {split} pictures are encoded in every step")
    return SplitFeatures(pixels, len(images), pixels.views)


@dataclass(frozen=True)
class BuiltCache:
    """The cache of a split, for people. ``was_there``: nothing had to be encoded."""

    split: str
    folder: Path
    num_images: int
    num_bytes: int
    images_per_second: float | None
    """Of encoding, when the cache was made."""
    was_there: bool
    seconds: float


def usable_images(
    folder: DataFolder, split: SplitName, recipe: Recipe, say: Say, listing_dir: Path | None = None
) -> SplitImages:
    """The images of a split that training reads: without captions and pictures that cannot be read, which are said.

    Args:
        listing_dir: where ``set_aside_SPLIT.jsonl`` names them all.

    Raises:
        DataError: more than ``max_bad_samples`` of the captions or of the pictures cannot be read.
    """
    remember_in = cache_root(recipe) if recipe.feature_cache != "off" else None
    if isinstance(folder, ShardFolder):
        remember_in = remember_in or folder.notes_dir
    return picture_check.usable_images(
        folder,
        split,
        limit=recipe.max_validation_images if split == "val" else None,
        max_bad_share=recipe.max_bad_samples,
        listing=listing_dir / f"set_aside_{split}.jsonl" if listing_dir is not None else None,
        remember_in=remember_in,
        say=say,
    )


def build_caches(recipe: Recipe, say: Say, *, check_all: bool = False) -> list[BuiltCache]:
    """Make the caches that training with a recipe will read, of its training and validation images.

    Args:
        check_all: compare the checksum of every image that is there already.

    Raises:
        VLMBridgeError: the recipe wants no cache, data or encoder cannot be read, or there is no room.
    """
    if recipe.feature_cache == "off":
        raise ConfigurationError(
            "the recipe says feature_cache=off: give feature_cache=auto or a folder"
        )
    folder = open_data_folder(recipe.data_dir, say)
    encoder: Any = build_vision_encoder(recipe.vision_encoder)
    encoder = encoder.to(runtime.resolve_device(recipe.device))
    splits: tuple[SplitName, ...] = ("train", "val")
    built = []
    for split in splits:
        started = time.perf_counter()
        pixels = _pixels(encoder, recipe, split, usable_images(folder, split, recipe, say))
        was_there = not _files(encoder, recipe, pixels).missing()
        cache = cached_features(encoder, recipe, split, pixels, say, check_all=check_all)
        built.append(
            BuiltCache(
                split,
                cache.files.folder,
                len(cache),
                cache.files.num_bytes,
                cache.index.get("images_per_second"),
                was_there,
                time.perf_counter() - started,
            )
        )
        cache.close()
    return built


def cache_root(recipe: Recipe) -> Path:
    """The folder that the caches of a recipe lie in."""
    return (
        Path(recipe.data_dir) / ".features"
        if recipe.feature_cache == "auto"
        else Path(recipe.feature_cache)
    )


def cached_features(
    encoder: Any,
    recipe: Recipe,
    split: str,
    pixels: OnTheFlyPixels,
    say: Say,
    *,
    only_if_quicker: bool = False,
    check_all: bool = False,
) -> FeatureCache:
    """Open the cache of some pictures, or make it.

    Args:
        only_if_quicker: refuse a cache that cannot be read as quickly as pictures are encoded, after measuring both.
        check_all: compare the checksum of every image.

    Raises:
        CacheUnavailable: no room, no permission, or slower.
        DataError: a picture cannot be read, or its features do not fit into the format.
    """
    files = _files(encoder, recipe, pixels)
    device = next(encoder.parameters()).device
    machine = f"{platform.node()} {device.type}"

    @torch.no_grad()
    def encode(batch_bchw: torch.Tensor) -> torch.Tensor:
        return encoder(batch_bchw.to(device))

    is_new = bool(files.missing())
    reading = measure_disk(files) if is_new and only_if_quicker else None
    if is_new:
        say(
            f"{split}: features of {_count(pixels)} take {files.num_bytes / 2**30:.2f} GiB "
            f"({files.format.dtype}) below {files.folder.parent}"
        )
    cache = open_or_build(
        files,
        pixels,
        encode,
        facts={"encoder": recipe.vision_encoder.name, "split": split, "machine": machine},
        batch_images=ENCODE_BATCH.get(device.type, ENCODE_BATCH_ELSEWHERE),
        num_workers=recipe.num_workers,
        check_all=check_all,
        progress=_Watch(split, files, reading, say),
        say=say,
    )
    if is_new or not only_if_quicker:
        return cache
    reading = measure_reading(cache.__getitem__, len(cache))
    # What was measured here when the cache was made is good enough, unless it is a close thing.
    encoding = (
        cache.index.get("images_per_second") if cache.index.get("machine") == machine else None
    )
    if encoding is None or reading < encoding:
        encoding = _measure_encoding(pixels, encode)
    if (
        reading < encoding
    ):  # a disk that slept, or that was just attached, may only be slow to start
        reading = measure_reading(cache.__getitem__, len(cache), SECOND_LOOK_SECONDS)
    if reading < encoding:
        cache.close()
        raise _slower(files, reading, encoding)
    say(
        f"{split}: features of {_count(pixels)} are in {files.folder}; reading gives {reading:,.0f} pictures/s, "
        f"encoding {encoding:,.0f}"
    )
    return cache


class _Watch:
    """Told of progress, it says how long encoding will take, and ends it where reading would be slower."""

    def __init__(self, split: str, files: CacheFiles, reading: float | None, say: Say):
        self.split, self.files, self.reading, self.say = split, files, reading, say
        self._started: float | None = None
        self._encoded_before = 0
        self._said: float | None = None

    def __call__(self, done: int, encoded: int) -> None:
        now, total = time.perf_counter(), self.files.num_images
        if self._started is None:  # the first batch warms up
            self._started, self._encoded_before = now, encoded
            return
        seconds = now - self._started
        rate = (encoded - self._encoded_before) / max(seconds, 1e-9)
        if self._said is None:
            if seconds < MEASURE_SECONDS and done < total:
                return
            if self.reading is not None and self.reading < rate:
                raise _slower(self.files, self.reading, rate)
        elif now - self._said < SAY_EVERY_SECONDS and done < total:
            return
        self._said = now
        left = f", about {_duration((total - done) / rate)} left" if done < total else ""
        self.say(f"{self.split}: encoded {done:,} of {total:,} pictures, {rate:.1f} a second{left}")


def _slower(files: CacheFiles, reading: float, encoding: float) -> CacheUnavailable:
    return CacheUnavailable(
        f"reading features from {files.folder.parent} gives {reading:,.1f} pictures/s, encoding them gives "
        f"{encoding:,.1f}"
    )


def _measure_encoding(pixels: OnTheFlyPixels, encode: Callable[[Any], torch.Tensor]) -> float:
    """Pictures a second that are opened and encoded, behind a first that warms up."""
    indices = np.arange(min(MEASURED_IMAGES, len(pixels)))
    encode(pixels[indices[:1]]).cpu()
    started = time.perf_counter()
    encode(pixels[indices]).cpu()
    return len(indices) / (time.perf_counter() - started)


def _pixels(
    encoder: Any, recipe: Recipe, split: str, images: Sequence[CaptionedImage]
) -> OnTheFlyPixels:
    is_augmented = split == "train" and recipe.feature_cache_views
    views = Views(recipe.feature_cache_views, recipe.seed) if is_augmented else None
    has_paths = isinstance(images, CaptionedImages | ShardImages)
    paths = images.paths if has_paths else [image.path for image in images]
    return OnTheFlyPixels(paths, encoder.preprocess, views)


def _files(encoder: Any, recipe: Recipe, pixels: OnTheFlyPixels) -> CacheFiles:
    """Where the features of pictures lie; the name of the folder follows from all that they depend on."""
    root = cache_root(recipe)
    format = FeatureFormat(encoder.num_tokens, encoder.embed_dim, recipe.feature_cache_dtype)
    key = cache_key(
        LAYOUT,
        encoder_fingerprint(encoder),
        pictures_digest(pixels.paths, root),
        format.dtype,
        repr(pixels.views),
    )
    return CacheFiles(root / key, format, len(pixels))


def _count(pixels: OnTheFlyPixels) -> str:
    views = f" in {pixels.views.count} views" if pixels.views else ""
    return f"{len(pixels.paths):,} pictures{views}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
