"""Images, captions and features of a training, and the order in which steps read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import DataFolder
from vlm_bridge.data_pipeline.loader import (
    CaptionFormat,
    EpochPlan,
    Row,
    TokenizedImages,
    in_batches,
    prefetch,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.model_architecture.captioner import CaptionModel, caption_format
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.features import SplitFeatures, split_features, usable_images
from vlm_bridge.training_strategy.objectives import Batch, CrossEntropy

STANDARDIZE_ON_IMAGES, STANDARDIZE_BATCH = 512, 32


@dataclass(frozen=True)
class TrainingData:
    """Images, captions and features that a training reads, and its number of steps."""

    recipe: Recipe
    world: World
    format: CaptionFormat
    train_images: list[CaptionedImage]
    val_images: list[CaptionedImage]
    train: TokenizedImages
    val: TokenizedImages
    train_features: SplitFeatures
    val_features: SplitFeatures
    plan: EpochPlan
    total_steps: int

    @classmethod
    def open(
        cls, folder: DataFolder, model: CaptionModel, recipe: Recipe, world: World
    ) -> TrainingData:
        """Read the splits, tokenize captions and open or build the feature caches.

        Raises:
            DataError: too many captions or images cannot be read.
            ConfigurationError: a process has other data than the first.
        """
        log_dir = Path(recipe.log_dir) if world.is_first else None
        with world.first_of_machine_first():
            train_images = usable_images(folder, "train", recipe, log_dir)
            val_images = usable_images(folder, "val", recipe, log_dir)
        format = caption_format(model.language_model, recipe)
        train = TokenizedImages(train_images, format)
        val = TokenizedImages(val_images, format)
        if world.size > 1:
            digests = train.digest(), val.digest()
            world.check_same({"data": folder.fingerprint, "captions in use": digests})
        encoder = model.vision_encoder
        plan = epoch_plan(recipe, train.captions_per_image, train.caption_lengths)
        train_features = split_features(encoder, recipe, "train", train_images, world)
        val_features = split_features(encoder, recipe, "val", val_images, world)
        return cls(
            recipe, world, format, train_images, val_images, train, val,
            train_features, val_features, plan, count_steps(recipe, plan),
        )  # fmt: skip

    def steps_in_epoch(self, epoch: int) -> int:
        return -(-self.plan.num_batches(epoch) // self.recipe.gradient_accumulation_steps)

    def rows_of(self, epoch: int, step_in_epoch: int) -> list[Row]:
        """Return the rows of a step, of all processes."""
        batches, accumulated = self.plan.batches(epoch), self.recipe.gradient_accumulation_steps
        group = in_batches(range(len(batches)), accumulated)[step_in_epoch]
        return [row for index in group for row in batches[index]]

    def steps(
        self, objective: CrossEntropy, epoch: int, step_in_epoch: int
    ) -> Iterator[Sequence[Batch]]:
        """Yield the micro-batches of each remaining step of an epoch, on their way to the device.

        Of several processes each gets its share of the rows of every micro-batch.
        """
        batches, features = self.plan.batches(epoch), self.train_features.in_epoch(epoch)
        groups = in_batches(range(len(batches)), self.recipe.gradient_accumulation_steps)

        def load(group: list[int]) -> Sequence[Batch]:
            shares = [rows for index in group if (rows := self.world.share(batches[index]))]
            return [objective.load(rows, features) for rows in shares]

        return prefetch(groups[step_in_epoch:], load, self.recipe.num_workers)

    def sample_features(self, model: CaptionModel) -> torch.Tensor:
        """Return features of some training images [S, N, D], for the channel statistics."""
        count = min(STANDARDIZE_ON_IMAGES, len(self.train))
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.train))
        chosen = np.sort(order[:count])
        parts = np.array_split(chosen, -(-count // STANDARDIZE_BATCH))
        read = (torch.as_tensor(self.train_features[part]) for part in parts)
        return torch.cat([model.features(features).float().cpu() for features in read])


def epoch_plan(
    recipe: Recipe,
    captions_per_image: Sequence[int] | np.ndarray,
    caption_lengths: np.ndarray | None,
) -> EpochPlan:
    """Plan which captions meet in which batch; with sampled captions, which images.

    Args:
        caption_lengths: see `TokenizedImages`; needed with ``tokens_per_batch``.
    """
    if recipe.objective == "scst":
        return EpochPlan(
            np.ones(len(captions_per_image), np.int64),
            row_captions=1,
            batch_captions=recipe.batch_size // recipe.scst_samples,
            seed=recipe.seed,
        )
    return EpochPlan(
        captions_per_image,
        row_captions=recipe.captions_per_image,
        batch_captions=recipe.batch_size,
        seed=recipe.seed,
        batch_positions=recipe.tokens_per_batch,
        caption_lengths=caption_lengths,
    )


def count_steps(recipe: Recipe, plan: EpochPlan) -> int:
    """Count the optimizer steps of the whole training."""
    steps = 0
    for epoch in range(recipe.num_epochs):
        steps += -(-plan.num_batches(epoch) // recipe.gradient_accumulation_steps)
        if recipe.max_steps is not None and steps >= recipe.max_steps:
            return recipe.max_steps
    return steps
