"""Which captions a recipe's training reads in which step, and how many steps that makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.loader import EpochPlan, TokenBudget


def epoch_plan(
    recipe: Recipe,
    captions_per_image: Sequence[int] | np.ndarray,
    caption_lengths: np.ndarray | None,
    shards: np.ndarray | None = None,
) -> EpochPlan:
    """Which captions of a training meet in which batch; where captions are sampled, which images.

    Args:
        caption_lengths: see `TokenizedImages`; read where the recipe has ``tokens_per_batch``.
        shards: see `EpochPlan`; read where the recipe has a ``shuffle_buffer``.
    """
    if recipe.objective == "scst":  # a row is an image, whatever people wrote of it
        return EpochPlan(
            np.ones(len(captions_per_image), np.int64),
            row_captions=1,
            batch_captions=recipe.batch_size // recipe.scst_samples,
            seed=recipe.seed,
            shuffle_buffer=recipe.shuffle_buffer,
            shards=shards,
        )
    budget = None
    if recipe.tokens_per_batch is not None:
        assert caption_lengths is not None, (
            "a budget of positions needs to know those of every caption"
        )
        budget = TokenBudget(recipe.tokens_per_batch, caption_lengths)
    return EpochPlan(
        captions_per_image,
        row_captions=recipe.captions_per_image,
        batch_captions=recipe.batch_size,
        seed=recipe.seed,
        budget=budget,
        shuffle_buffer=recipe.shuffle_buffer,
        shards=shards,
    )


def count_steps(recipe: Recipe, plan: EpochPlan) -> int:
    """Optimiser steps of the whole training; the schedule is drawn over them."""
    steps = 0
    for epoch in range(recipe.num_epochs):
        steps += -(-plan.num_batches(epoch) // recipe.gradient_accumulation_steps)
        if recipe.max_steps is not None and steps >= recipe.max_steps:
            return recipe.max_steps
    return steps
