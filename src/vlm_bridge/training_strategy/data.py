"""Images, captions and features of a training, and the order in which steps read them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import features
from vlm_bridge.data_pipeline.features import FeatureCache, OnTheFlyPixels, SplitFeatures, Views
from vlm_bridge.data_pipeline.hints import (
    draw_words,
    in_prompt,
    shared_words,
    swap_words,
    with_swapped,
)
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import (
    CaptionFormat,
    EpochPlan,
    Row,
    TokenizedImages,
    in_batches,
    prefetch,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage, DataFolder, Skipped
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import ImageError
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionModel, caption_format
from vlm_bridge.model_architecture.generation import object_names
from vlm_bridge.model_architecture.vision_encoder import encoder_fingerprint
from vlm_bridge.training_strategy.distributed import World

logger = logging.getLogger(__name__)

ENCODE_BATCH = {"cpu": 8, "cuda": 64}  # images encoded together, by kind of device
STANDARDIZE_ON_IMAGES, STANDARDIZE_BATCH = 512, 32

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Split:
    """Images, captions and features of a split, by image index."""

    images: list[CaptionedImage]
    captions: TokenizedImages
    features: SplitFeatures


@dataclass(frozen=True)
class TrainingData:
    """What a training reads, and in which order."""

    recipe: Recipe
    world: World
    format: CaptionFormat
    train: Split
    val: Split
    unreadable: dict[int, str] = field(default_factory=dict)  # reasons by image, as they are found

    @classmethod
    def open(
        cls, folder: DataFolder, model: CaptionModel, recipe: Recipe, world: World
    ) -> TrainingData:
        """Read the splits, tokenize captions and open or build the feature caches.

        Raises DataError where too many captions or images cannot be read.
        """
        format = caption_format(model.language_model, recipe)
        with world.first_of_machine_first():
            images = {split: usable_images(folder, split, recipe) for split in ("train", "val")}
        captions = {split: TokenizedImages(some, format) for split, some in images.items()}
        if recipe.prompt_words:
            changed, words = prompted(images["train"], recipe)
            captions["train"] = TokenizedImages(changed, format, words)
        splits = [
            Split(some, captions[split], split_features(model.vision_encoder, recipe, split, some))
            for split, some in images.items()
        ]
        return cls(recipe, world, format, train=splits[0], val=splits[1])

    @cached_property
    def plan(self) -> EpochPlan:
        captions = self.train.captions
        return epoch_plan(self.recipe, captions.captions_per_image, captions.caption_lengths)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps, most = 0, self.recipe.max_steps
        for epoch in range(self.recipe.num_epochs):
            steps += self.steps_in_epoch(epoch)
            if most is not None and steps >= most:
                return most
        return steps

    def steps_in_epoch(self, epoch: int) -> int:
        return -(-self.plan.num_batches(epoch) // self.recipe.gradient_accumulation_steps)

    def steps(
        self, load: Callable[[Sequence[Row], SplitFeatures], Batch], epoch: int, step_in_epoch: int
    ) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step of an epoch, loaded ahead in threads.

        Of several processes each gets its share of the rows of every micro-batch, without those of
        images that cannot be read. The plan does not depend on them, so that runs resume exactly.
        Raises DataError as `readable`.
        """
        batches, features = self.plan.batches(epoch), self.train.features.in_epoch(epoch)
        groups = in_batches(batches, self.recipe.gradient_accumulation_steps)

        def load_share(group: list[list[Row]]) -> list[Batch]:
            return [item for batch in group for item in load_rows(self.world.share(batch))]

        def load_rows(rows: Sequence[Row]) -> list[Batch]:
            try:
                return [load(rows, features)] if rows else []
            except ImageError:
                sound = self.readable(row.image for row in rows)
                rows = [row for row in rows if row.image in sound]
                return [load(rows, features)] if rows else []

        return prefetch(groups[step_in_epoch:], load_share, self.recipe.num_workers)

    def readable(self, images: Iterable[int]) -> set[int]:
        """Read training images again; return those that can be, and log the others once.

        Raises:
            DataError: more than ``max_bad_samples`` of all training images are known to be damaged.
        """
        chosen = set(images)
        for index in sorted(chosen):
            try:
                open_image(self.train.images[index].path)
            except ImageError as error:
                chosen.remove(index)
                if index not in self.unreadable:
                    logger.warning(f"skipped its captions: {error}")
                self.unreadable[index] = error.reason
        damaged = Skipped("train images", len(self.train.images))
        for index, reason in sorted(self.unreadable.items()):
            damaged.add(self.train.images[index].path, reason)
        damaged.check(self.recipe.max_bad_samples, setting="max_bad_samples")
        return chosen

    def sample_features(self, model: CaptionModel) -> torch.Tensor:
        """Return features of some training images [S, N, D], for the channel statistics."""
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.train.images))
        chosen = np.sort(order[:STANDARDIZE_ON_IMAGES])

        def read(part: np.ndarray) -> torch.Tensor:
            try:
                return torch.as_tensor(self.train.features[part])
            except ImageError:
                sound = sorted(self.readable(part.tolist()))
                return torch.as_tensor(self.train.features[np.array(sound)])

        parts = np.array_split(chosen, -(-len(chosen) // STANDARDIZE_BATCH))
        return torch.cat([model.features(features).float().cpu() for features in map(read, parts)])


def prompted(
    images: Sequence[CaptionedImage], recipe: Recipe
) -> tuple[list[CaptionedImage], list[list[str]]]:
    """Draw words for each caption's prompt; return them, and images whose captions name them."""
    names, changed, prompts = object_names(), [], []
    for index, image in enumerate(images):
        shared, captions = shared_words(image.captions), []
        for number, caption in enumerate(image.captions):
            seed = [recipe.seed, index, number]
            own = set(simple_tokenize([caption])[0].split())
            drawn = draw_words([w for w in shared if w in own], recipe.prompt_words, seed)
            swapped = swap_words(drawn, names, [*seed, 1])
            prompts.append(in_prompt(drawn, swapped))
            captions.append(with_swapped(caption, swapped))
        changed.append(replace(image, captions=tuple(captions)))
    return changed, prompts


def epoch_plan(
    recipe: Recipe,
    captions_per_image: Sequence[int] | np.ndarray,
    caption_lengths: np.ndarray | None,
) -> EpochPlan:
    """Plan which captions meet in which batch; with sampled captions, which images."""
    samples = recipe.objective == "scst"
    row_captions = 1 if samples else recipe.captions_per_image
    return EpochPlan(
        np.ones(len(captions_per_image), np.int64) if samples else captions_per_image,
        row_captions,
        max(1, recipe.batch_size // (recipe.scst_samples if samples else row_captions)),
        seed=recipe.seed,
        batch_positions=recipe.tokens_per_batch,
        caption_lengths=caption_lengths,
    )


def usable_images(folder: DataFolder, split: SplitName, recipe: Recipe) -> list[CaptionedImage]:
    """Return the images of a split without captions and images that cannot be read.

    Each image is decoded once before. Without a feature cache, training images are not, so that
    the first step need not wait for them: `TrainingData.steps` finds the damaged ones.

    Raises:
        DataError: no such split, or more than ``max_bad_samples`` of captions or images.
    """
    captions, unreadable = Skipped(f"{split} captions"), Skipped(f"{split} images")
    limit = recipe.max_validation_images if split == "val" else None
    images = folder.split(split, captions)[:limit]
    unreadable.total = len(images)
    root, problems = features.cache_root(recipe.feature_cache, recipe.data_dir), {}
    if root or split != "train":
        paths = [image.path for image in images]
        problems = features.check_images(paths, root or folder.root / ".features")
    for index, reason in problems.items():
        unreadable.add(images[index].path, reason)
    for part in (captions, unreadable):
        part.check(recipe.max_bad_samples, setting="max_bad_samples")
        if len(part):
            logger.info(f"skipped {len(part):,} of {part.total:,} {part.kind}: {part.summary()}")
    return [image for index, image in enumerate(images) if index not in problems]


def split_features(
    encoder: Any, recipe: Recipe, split: str, images: list[CaptionedImage], check_all: bool = False
) -> SplitFeatures:
    """Open the feature cache of a split, or make it; with ``feature_cache=off``, read pixels.

    Training images are random crops with ``feature_cache_views``. Raises as `FeatureCache.open`.

    Args:
        check_all: compare every checksum of the cache.
    """
    has_views = split == "train" and recipe.feature_cache_views
    views = Views(recipe.feature_cache_views, recipe.seed) if has_views else None
    pixels = OnTheFlyPixels([image.path for image in images], encoder.preprocess, views)
    root = features.cache_root(recipe.feature_cache, recipe.data_dir)
    if root is None:
        return SplitFeatures(pixels, views)
    content, dtype = features.images_digest(pixels.paths, root), recipe.feature_cache_dtype
    key = features.LAYOUT, encoder_fingerprint(encoder), content, dtype, repr(views)
    device = next(encoder.parameters(), torch.empty(0)).device  # some encoders have no weights

    @torch.no_grad()
    def encode(pixels_bchw: torch.Tensor) -> torch.Tensor:
        return encoder(pixels_bchw.to(device))

    cache = FeatureCache(
        root / features.cache_key(*key),
        features.FeatureFormat(encoder.num_tokens, encoder.embed_dim, dtype),
        pixels,
        encode,
        name=split,
        batch_images=ENCODE_BATCH.get(device.type, 32),
        num_workers=recipe.num_workers,
    )
    return SplitFeatures(cache.open(check_all), views)
