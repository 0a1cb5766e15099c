"""From captions to packed batches: what is supervised, and which captions meet in which batch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from captioners import random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.loader import (
    IGNORE_INDEX,
    CaptionFormat,
    EpochPlan,
    Row,
    TokenizedCaption,
    TokenizedImages,
    prefetch,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.model_architecture.captioner import caption_format
from vlm_bridge.training_strategy.data import TrainingData, epoch_plan
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.validation import batch_loss, load_batch

START, EOS = 1, 2


def encode(text: str) -> list[int]:
    """A token per character; never one of the special ones."""
    return [ord(character) for character in text]


def make_format(**changes: Any) -> CaptionFormat:
    options = {"encode_all": lambda texts: [encode(text) for text in texts], "eos_id": EOS}
    return CaptionFormat(**{**options, "start_id": START, **changes})


def images_of(*captions_of_images: tuple[str, ...]) -> list[CaptionedImage]:
    return [
        CaptionedImage(Path(f"{n}.jpg"), captions, str(n))
        for n, captions in enumerate(captions_of_images)
    ]


def tokenized(*captions_of_images: tuple[str, ...], **changes: Any) -> TokenizedImages:
    return TokenizedImages(images_of(*captions_of_images), make_format(**changes))


def tokenize(caption: str, **changes: Any) -> TokenizedCaption:
    format = make_format(**changes)
    return format.with_targets(format.targets([caption])[0])


def test_every_token_and_the_end_are_supervised_and_the_prompt_is_not() -> None:
    assert tokenize("ab") == ((START, 97, 98), (97, 98, EOS))
    assert tokenize("") == ((START,), (EOS,))
    caption = tokenize("ab", prompt="P:")
    assert caption.input_ids == (START, *encode("P: ab"))
    assert caption.labels == (IGNORE_INDEX, IGNORE_INDEX, *encode(" ab"), EOS)
    assert list(caption.input_ids[:3]) == make_format(prompt="P:").prompt_ids


@pytest.mark.parametrize(("limit", "labels"), [(1, "a"), (3, "abc"), (4, "abc$"), (9, "abc$")])
def test_a_cut_caption_has_not_ended(limit: int, labels: str) -> None:
    caption = tokenize("abc", max_caption_tokens=limit)
    assert list(caption.labels) == [EOS if c == "$" else ord(c) for c in labels]
    assert len(caption.input_ids) == len(caption.labels)
    assert EOS not in caption.input_ids


def test_pads_are_never_supervised() -> None:
    batch = tokenized(("abcd", "x"), ("ab",)).pack([Row(0, (1, 0)), Row(1, (0,))])
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]]
    pads = batch.segments == 0
    assert (batch.labels[pads] == IGNORE_INDEX).all()
    assert (batch.labels[~pads] != IGNORE_INDEX).all()
    assert batch.labels[0].tolist() == [ord("x"), EOS, *encode("abcd"), EOS]
    assert (batch.num_supervised, batch.num_tokens, batch.num_captions) == (10, 10, 3)
    assert (batch.num_positions, batch.image_indices.tolist()) == (14, [0, 1])
    labels = batch.labels.ravel()[batch.supervised]
    assert np.array_equal(labels, batch.labels[batch.labels != IGNORE_INDEX])
    assert all(array.dtype == np.int64 for array in (batch.input_ids, batch.labels, batch.segments))


def test_ends_are_supervised_where_they_have_the_id_of_pads() -> None:
    batch = tokenized(("ab",), ("a",), eos_id=0).pack([Row(0, (0,)), Row(1, (0,))])
    assert batch.labels.tolist() == [[97, 98, 0], [97, 0, IGNORE_INDEX]]


@pytest.mark.parametrize("prompt", ["", "P:"])
def test_stored_captions_are_those_tokenized_one_by_one(
    prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_bridge.data_pipeline.loader.TOKENIZE_TOGETHER", 4)
    captions_of_images = (("abcd", "x"), ("ab",), ("a longer one", "", "abc"))
    changes = {"prompt": prompt, "max_caption_tokens": 8}
    data = tokenized(*captions_of_images, **changes)
    lengths = []
    for i, captions in enumerate(captions_of_images):
        expected = [tokenize(caption, **changes) for caption in captions]
        assert [data.caption(i, j) for j in range(len(captions))] == expected
        lengths.append([len(caption.input_ids) for caption in expected])
    assert data.caption_lengths.tolist() == [length for some in lengths for length in some]
    assert data.image_lengths.tolist() == [sum(some) for some in lengths]
    assert (len(data), data.num_captions, data.captions_per_image.tolist()) == (3, 6, [2, 1, 3])


# The order of an epoch.


def assert_once_per_epoch(batches: Sequence[list[Row]], counts: Sequence[int] | np.ndarray) -> None:
    rows = [row for batch in batches for row in batch]
    seen = Counter((row.image, caption) for row in rows for caption in row.captions)
    assert seen == Counter((image, c) for image, count in enumerate(counts) for c in range(count))


COUNTS = np.random.default_rng(5).integers(1, 6, 200)
LENGTHS = np.random.default_rng(6).integers(4, 40, COUNTS.sum())


def make_plan(row_captions: int = 2, *, seed: int = 0, budget: int | None = None) -> EpochPlan:
    return EpochPlan(COUNTS, row_captions, 4, seed, budget, LENGTHS)


def row_lengths(batch: list[Row]) -> list[int]:
    first = np.concatenate(([0], np.cumsum(COUNTS)))
    return [int(sum(LENGTHS[first[row.image] + c] for c in row.captions)) for row in batch]


@pytest.mark.parametrize("row_captions", [1, 2, 5])
@pytest.mark.parametrize("budget", [None, 1, 160, 10**9])
def test_every_caption_comes_once_per_epoch_in_an_order_of_seed_and_epoch(
    row_captions: int, budget: int | None
) -> None:
    plan, again = (make_plan(row_captions, budget=budget) for _ in range(2))
    for epoch in (1, 0):
        batches = plan.batches(epoch)
        assert batches == again.batches(epoch)
        assert len(batches) == plan.num_batches(epoch)
        assert_once_per_epoch(batches, COUNTS)
        for batch in batches:
            lengths = row_lengths(batch)
            assert all(len(row.captions) <= row_captions for row in batch)
            positions = max(lengths) * len(lengths)
            assert len(batch) == 1 or (len(batch) <= 4 if budget is None else positions <= budget)
    assert plan.batches(0) != plan.batches(1)
    assert plan.batches(0) != make_plan(row_captions, seed=1, budget=budget).batches(0)


def test_under_a_budget_few_positions_are_pads_and_batches_are_mixed() -> None:
    def padding_share(batches: Sequence[list[Row]]) -> float:
        lengths = [row_lengths(batch) for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(max(some) * len(some) for some in lengths)

    batches, others = make_plan(budget=160).batches(0), make_plan().batches(0)
    assert padding_share(batches) < 0.1
    assert padding_share(others) > 0.25
    rows, other_rows = ([row for batch in some for row in batch] for some in (batches, others))
    assert rows != other_rows and sorted(rows) == sorted(other_rows)
    longest = [max(row_lengths(batch)) for batch in batches]
    assert longest != sorted(longest, reverse=True)
    halves = np.array_split(longest, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.2 * np.mean(longest)


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_prefetch_keeps_the_order_and_works_no_further_ahead_than_asked(depth: int) -> None:
    assert list(prefetch(range(10), lambda n: n * n, depth)) == [n * n for n in range(10)]
    assert list(prefetch([], lambda n: n, depth)) == []
    results = prefetch([1, 2, 0, 4], lambda n: 8 // n, depth)
    assert [next(results), next(results)] == [8, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    begun: list[int] = []
    results = prefetch(range(50), lambda n: begun.append(n) or n, depth)
    next(results)
    results.close()
    assert len(begun) <= depth + 1
    assert all("ThreadPoolExecutor" not in thread.name for thread in threading.enumerate())


# Plans of a recipe.


@pytest.fixture
def recipe(tiny_vit_dir: Path, tiny_llama_dir: Path) -> Recipe:
    return tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix", captions_per_image=2)


@torch.no_grad()
def test_a_budget_changes_the_order_and_not_the_loss(recipe: Recipe) -> None:
    random = np.random.default_rng(3)
    words = ["a", "small", "red", "square", "and", "two", "dogs", "near", "the", "pool"]
    captions = [
        tuple(" ".join(random.choice(words, random.integers(1, 12))) for _ in range(count))
        for count in random.integers(1, 4, 20)
    ]
    model: Any = tiny_captioner(recipe)
    data = TokenizedImages(images_of(*captions), caption_format(model.language_model, recipe))
    features = random_features(model, len(data))
    sums = []
    for override in ("batch_size=8", "tokens_per_batch=60"):
        changed = override_recipe(recipe, [override])
        plan = epoch_plan(changed, data.captions_per_image, data.caption_lengths)
        packed = [data.pack(rows) for rows in plan.batches(1)]
        losses = [batch_loss(model, load_batch(b, features, model.device)).total for b in packed]
        sums.append((sum(losses), sum(batch.num_supervised for batch in packed)))
    assert sums[0][1] == sums[1][1]
    torch.testing.assert_close(sums[0][0], sums[1][0], atol=0, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_every_epoch(recipe: Recipe, accumulation: int) -> None:
    overrides = [f"gradient_accumulation_steps={accumulation}", "tokens_per_batch=40"]
    recipe = override_recipe(recipe, [*overrides, "num_epochs=6"])
    plan = epoch_plan(recipe, COUNTS, LENGTHS)
    of_epochs = [len(plan.batches(epoch)) for epoch in range(6)]
    assert len(set(of_epochs)) > 1  # which captions share a row differs from epoch to epoch
    steps = sum(-(-batches // accumulation) for batches in of_epochs)
    captions = SimpleNamespace(captions_per_image=COUNTS, caption_lengths=LENGTHS)
    split: Any = SimpleNamespace(captions=captions)
    for most, expected in (("null", steps), (7, 7), (steps + 1, steps)):
        limited = override_recipe(recipe, [f"max_steps={most}"])
        data = TrainingData(limited, World(torch.device("cpu")), None, split, split)  # type: ignore[arg-type]
        assert data.total_steps == expected
