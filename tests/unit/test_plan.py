"""What a recipe's training reads in which step; filling batches by positions changes the order and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioners import random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.captioner import caption_format
from vlm_bridge.training_strategy.data import count_steps, epoch_plan
from vlm_bridge.training_strategy.validation import batch_loss, load_batch

WORDS = [
    "a",
    "small",
    "red",
    "square",
    "and",
    "two",
    "dogs",
    "near",
    "the",
    "water",
    "of",
    "green",
    "pool",
]


@pytest.fixture
def recipe(tiny_vit_dir: Path, tiny_llama_dir: Path) -> Recipe:
    return tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix", captions_per_image=2)


def captioned_images(count: int) -> list[CaptionedImage]:
    random = np.random.default_rng(3)

    def caption() -> str:
        return " ".join(random.choice(WORDS, random.integers(1, 12)))

    return [
        CaptionedImage(
            Path(f"{n}.jpg"), tuple(caption() for _ in range(random.integers(1, 4))), str(n)
        )
        for n in range(count)
    ]


@torch.no_grad()
def test_a_budget_changes_the_order_and_nothing_else(recipe: Recipe) -> None:
    model: Any = tiny_captioner(recipe)
    data = TokenizedImages(captioned_images(20), caption_format(model.language_model, recipe))
    features = random_features(model, len(data))
    sums, supervised = [], []
    for overrides in (["batch_size=8"], ["tokens_per_batch=60"]):
        changed = override_recipe(recipe, overrides)
        batches = epoch_plan(changed, data.captions_per_image, data.caption_lengths).batches(1)
        packed = [data.pack(rows) for rows in batches]
        sums.append(
            sum(
                batch_loss(model, load_batch(batch, features, model.device)).total
                for batch in packed
            )
        )
        supervised.append(sum(batch.num_supervised for batch in packed))
    assert supervised[0] == supervised[1]
    torch.testing.assert_close(sums[0], sums[1], atol=0, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_every_epoch(recipe: Recipe, accumulation: int) -> None:
    recipe = override_recipe(
        recipe,
        ["tokens_per_batch=40", "num_epochs=6", f"gradient_accumulation_steps={accumulation}"],
    )
    random = np.random.default_rng(0)
    counts = random.integers(1, 6, 100)
    plan = epoch_plan(recipe, counts, random.integers(3, 30, counts.sum()))
    of_epochs = [len(plan.batches(epoch)) for epoch in range(6)]
    assert len(set(of_epochs)) > 1  # which captions share a row differs from epoch to epoch
    steps = count_steps(recipe, plan)
    assert steps == sum(-(-batches // accumulation) for batches in of_epochs)
    assert count_steps(override_recipe(recipe, ["max_steps=7"]), plan) == 7
    assert count_steps(override_recipe(recipe, [f"max_steps={steps + 1}"]), plan) == steps


def test_under_a_budget_the_batch_size_is_not_read(recipe: Recipe) -> None:
    with pytest.raises(ConfigurationError, match="not a multiple"):
        override_recipe(recipe, ["batch_size=7"])
    assert override_recipe(recipe, ["batch_size=7", "tokens_per_batch=100"]).tokens_per_batch == 100
    with pytest.raises(ConfigurationError, match="tokens_per_batch"):
        override_recipe(recipe, ["tokens_per_batch=0"])
