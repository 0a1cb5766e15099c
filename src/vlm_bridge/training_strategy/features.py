"""The encoder's side of training: features of a split, from a cache or pictures encoded as they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import feature_cache
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.model_architecture.captioner import CaptionerModel
from vlm_bridge.model_architecture.vision_encoder import encoder_fingerprint
from vlm_bridge.training_strategy.validation import Features


def split_features(
    model: CaptionerModel,
    recipe: Recipe,
    folder: CaptionFolder,
    split: str,
    images: Sequence[CaptionedImage],
    say: Callable[[str], None],
) -> Features:
    """The cached features of a split's images, built if need be; without a cache, their pixels as they are needed."""
    encoder: Any = model.vision_encoder
    paths = [image.path for image in images]

    def pixels_on_the_fly() -> Features:
        return feature_cache.OnTheFlyPixels(paths, lambda pictures: encoder.preprocess(pictures).numpy())

    if recipe.feature_cache == "off":
        return pixels_on_the_fly()
    root = Path(recipe.feature_cache) if recipe.feature_cache != "auto" else folder.root / ".features"
    shape = encoder.num_tokens, encoder.embed_dim
    size_gib = len(paths) * shape[0] * shape[1] * 2 / 2**30
    started = last_said = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal last_said
        if done == len(paths) or time.perf_counter() - last_said > 10:
            last_said = time.perf_counter()
            say(f"encoding {split} pictures: {done}/{len(paths)} ({done / (last_said - started):.0f}/s)")

    cache = feature_cache.open_or_build(
        root,
        feature_cache.cache_key(encoder_fingerprint(encoder), folder.fingerprint, split, str(len(paths))),
        paths,
        shape,
        lambda pictures: model.encode_images(pictures).float().cpu().numpy(),
        num_workers=recipe.num_workers,
        progress=progress,
    )
    if cache is None:
        say(
            f"no room for {size_gib:.1f} GiB of cached features below {root}: pictures are encoded in every step"
        )
        return pixels_on_the_fly()
    return cache
