"""Images and features of a split as a recipe asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import features
from vlm_bridge.data_pipeline.caption_folder import DataFolder
from vlm_bridge.data_pipeline.features import FeatureCache, OnTheFlyPixels, SplitFeatures, Views
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped, write_listing
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.model_architecture.vision_encoder import encoder_fingerprint
from vlm_bridge.training_strategy.distributed import World

ENCODE_BATCH = {"cpu": 8, "cuda": 64}  # images encoded together, by kind of device


def usable_images(
    folder: DataFolder, split: SplitName, recipe: Recipe, listing_dir: Path | None = None
) -> list[CaptionedImage]:
    """Return the images of a split without captions and images that cannot be read.

    A damaged image would end the training in its middle, so each is decoded once before.

    Args:
        listing_dir: where ``set_aside_SPLIT.jsonl`` names the skipped ones, if there are any.

    Raises:
        DataError: no such split, or more than ``max_bad_samples`` of captions or images.
    """
    captions, unreadable = Skipped(f"{split} captions"), Skipped(f"{split} images")
    limit = recipe.max_validation_images if split == "val" else None
    images = folder.split(split, captions)[:limit]
    unreadable.total = len(images)
    remember_in = features.cache_root(recipe.feature_cache, recipe.data_dir) or folder.notes_dir
    problems = features.check_images([image.path for image in images], remember_in)
    for index, reason in problems.items():
        unreadable.add(images[index].path, reason)
    listing = listing_dir / f"set_aside_{split}.jsonl" if listing_dir is not None else None
    if listing is not None:
        write_listing(listing, [captions, unreadable])
    for part in (captions, unreadable):
        part.check(recipe.max_bad_samples, listing=listing, setting="max_bad_samples")
        if len(part):
            counts = f"{len(part):,} of {part.total:,} {part.kind}"
            features.logger.info(f"skipped {counts}: {part.summary(listing)}")
    return [image for index, image in enumerate(images) if index not in problems]


def split_features(
    encoder: Any, recipe: Recipe, split: str, images: list[CaptionedImage], world: World | None
) -> SplitFeatures:
    """Return the features of a split from its cache, or pixels where there is none.

    Processes use a cache if all of them can: cached features are rounded.
    """
    items: Any = _pixels(encoder, recipe, split, images)
    views = items.views
    if recipe.feature_cache != "off":
        cache = refusal = None
        try:
            cache = cached_features(encoder, recipe, split, images)
        except features.CacheUnavailable as error:
            refusal = str(error)
        if world is not None:
            refusal = next(filter(None, world.gather(refusal)), None)
        if refusal is None:
            items = cache
        else:
            features.logger.warning("%s: %s images are encoded in every step", refusal, split)
    return SplitFeatures(items, len(images), views)


def cached_features(
    encoder: Any, recipe: Recipe, split: str, images: list[CaptionedImage], check_all: bool = False
) -> FeatureCache:
    """Open the cache of a split, or make it. Raises as `features.open_cache`."""
    root, dtype = (
        features.cache_root(recipe.feature_cache, recipe.data_dir),
        recipe.feature_cache_dtype,
    )
    assert root is not None, "feature_cache is not off"
    pixels = _pixels(encoder, recipe, split, images)
    content = features.images_digest(pixels.paths, root)
    key = features.LAYOUT, encoder_fingerprint(encoder), content, dtype, repr(pixels.views)
    device = next(encoder.parameters()).device

    @torch.no_grad()
    def encode(pixels_bchw: torch.Tensor) -> torch.Tensor:
        return encoder(pixels_bchw.to(device))

    return features.open_cache(
        root / features.cache_key(*key),
        features.FeatureFormat(encoder.num_tokens, encoder.embed_dim, dtype),
        pixels,
        encode,
        name=split,
        batch_images=ENCODE_BATCH.get(device.type, 32),
        num_workers=recipe.num_workers,
        check_all=check_all,
    )


def _pixels(
    encoder: Any, recipe: Recipe, split: str, images: list[CaptionedImage]
) -> OnTheFlyPixels:
    """Return random crops of training images with `feature_cache_views`, or else whole images."""
    has_views = split == "train" and recipe.feature_cache_views
    views = Views(recipe.feature_cache_views, recipe.seed) if has_views else None
    return OnTheFlyPixels([image.path for image in images], encoder.preprocess, views)
