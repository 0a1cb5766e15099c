"""Images and features of a split as a recipe asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import features, image_check
from vlm_bridge.data_pipeline.data_folder import DataFolder, SplitImages
from vlm_bridge.data_pipeline.features import CacheUnavailable, FeatureCache, OnTheFlyPixels, Views
from vlm_bridge.data_pipeline.shards import ShardFolder
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.model_architecture.vision_encoder import encoder_fingerprint
from vlm_bridge.training_strategy.distributed import World

SplitFeatures = features.SplitFeatures


def usable_images(
    folder: DataFolder, split: SplitName, recipe: Recipe, listing_dir: Path | None = None
) -> SplitImages:
    """Return the images of a split without those that cannot be read.

    Args:
        listing_dir: where ``set_aside_SPLIT.jsonl`` names the skipped ones.

    Raises:
        DataError: more than ``max_bad_samples`` of the captions or images cannot be read.
    """
    notes_dir = folder.notes_dir if isinstance(folder, ShardFolder) else None
    return image_check.usable_images(
        folder,
        split,
        limit=recipe.max_validation_images if split == "val" else None,
        max_bad_share=recipe.max_bad_samples,
        listing=listing_dir / f"set_aside_{split}.jsonl" if listing_dir is not None else None,
        remember_in=features.cache_root(recipe.feature_cache, recipe.data_dir) or notes_dir,
    )


def split_features(
    encoder: Any, recipe: Recipe, split: str, images: SplitImages, world: World | None = None
) -> SplitFeatures:
    """Return the features of a split from its cache, or pixels where there is none.

    Processes use a cache if all of them can: cached features are rounded.
    """
    views = _views(recipe, split)
    items: Any = OnTheFlyPixels(images.paths, encoder.preprocess, views)
    if recipe.feature_cache != "off":
        cache = refusal = None
        try:
            cache = cached_features(encoder, recipe, split, images)
        except CacheUnavailable as error:
            refusal = str(error)
        if world is not None:
            refusal = next(filter(None, world.gather(refusal)), None)
        if cache is not None and refusal is None:
            items = cache
        else:
            features.logger.warning("%s: %s images are encoded in every step", refusal, split)
    return SplitFeatures(items, len(images), views)


def cached_features(
    encoder: Any, recipe: Recipe, split: str, images: SplitImages, *, check_all: bool = False
) -> FeatureCache:
    """Open the cache of a split, or make it. Raises as `FeatureCache.open_or_build`."""
    root = features.cache_root(recipe.feature_cache, recipe.data_dir)
    assert root is not None, "feature_cache is not off"
    return features.cached_features(
        encoder,
        encoder_fingerprint(encoder),
        images.paths,
        root,
        split=split,
        dtype=recipe.feature_cache_dtype,
        views=_views(recipe, split),
        num_workers=recipe.num_workers,
        check_all=check_all,
    )


def _views(recipe: Recipe, split: str) -> Views | None:
    """Random crops of training images; validation shows whole images."""
    if split != "train" or not recipe.feature_cache_views:
        return None
    return Views(recipe.feature_cache_views, recipe.seed)
