"""From captions to packed batches: what is supervised, and which captions meet in which batch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import (
    IGNORE_INDEX,
    CaptionFormat,
    EpochPlan,
    Row,
    TokenBudget,
    TokenizedCaption,
    TokenizedImages,
    in_batches,
    prefetch,
    whole_rows,
)
from vlm_bridge.errors import DataError

START, EOS = 1, 2


def encode(text: str) -> list[int]:
    """A token per character; never one of the special ones."""
    return [ord(character) for character in text]


def encode_all(texts: list[str]) -> list[list[int]]:
    return [encode(text) for text in texts]


def caption_format(**changes: object) -> CaptionFormat:
    return CaptionFormat(**{"encode_all": encode_all, "start_id": START, "eos_id": EOS, **changes})  # type: ignore[arg-type]


def tokenized(*captions_of_images: tuple[str, ...], **changes: object) -> TokenizedImages:
    images = [
        CaptionedImage(Path(f"{n}.jpg"), captions, str(n))
        for n, captions in enumerate(captions_of_images)
    ]
    return TokenizedImages(images, caption_format(**changes))


def tokenize(caption: str, **changes: object) -> TokenizedCaption:
    format = caption_format(**changes)
    return format.with_targets(format.targets([caption])[0])


def test_every_token_and_the_end_are_supervised() -> None:
    assert tokenize("ab") == ((START, 97, 98), (97, 98, EOS))
    assert tokenize("") == ((START,), (EOS,))


def test_the_prompt_is_read_but_not_supervised() -> None:
    caption = tokenize("ab", prompt="P:")
    assert caption.input_ids == (START, *encode("P: ab"))
    assert caption.labels == (IGNORE_INDEX, IGNORE_INDEX, *encode(" ab"), EOS)
    assert list(caption.input_ids[:3]) == caption_format(prompt="P:").prompt_ids


@pytest.mark.parametrize(
    ("limit", "labels"), [(1, "a"), (2, "ab"), (3, "abc"), (4, "abc$"), (9, "abc$")]
)
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


@pytest.mark.parametrize("eos", [0, EOS])
def test_ends_are_supervised_whatever_the_pad_id_is(eos: int) -> None:
    # Rows are filled with zeros: nothing may be concluded from a token id.
    batch = tokenized(("ab",), ("a",), eos_id=eos).pack([Row(0, (0,)), Row(1, (0,))])
    assert batch.labels.tolist() == [[97, 98, eos], [97, eos, IGNORE_INDEX]]


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no captioned images"):
        TokenizedImages([], caption_format())


CAPTIONS = (("abcd", "x"), ("ab",), ("a longer one", "", "abc"))


@pytest.mark.parametrize("prompt", ["", "P:"])
def test_stored_captions_are_those_tokenized_one_by_one(
    prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_bridge.data_pipeline.loader.TOKENIZE_TOGETHER", 4)
    changes = {"prompt": prompt, "max_caption_tokens": 8}
    data = tokenized(*CAPTIONS, **changes)
    expected = [[tokenize(caption, **changes) for caption in captions] for captions in CAPTIONS]
    found = [
        [data.caption(i, j) for j in range(len(captions))] for i, captions in enumerate(CAPTIONS)
    ]
    assert found == expected
    lengths = [[len(caption.input_ids) for caption in captions] for captions in expected]
    assert data.caption_lengths.tolist() == [length for some in lengths for length in some]
    assert data.image_lengths.tolist() == [sum(some) for some in lengths]
    assert (len(data), data.num_captions, data.captions_per_image.tolist()) == (3, 6, [2, 1, 3])


def assert_once_per_epoch(batches: Sequence[list[Row]], counts: Sequence[int] | np.ndarray) -> None:
    seen = Counter(
        (row.image, caption) for rows in batches for row in rows for caption in row.captions
    )
    assert seen == Counter((image, c) for image, count in enumerate(counts) for c in range(count))


def test_captions_are_shuffled_image_by_image() -> None:
    random, counts = np.random.default_rng([0, 3]), (5, 1, 3, 2, 5, 4, 0, 2)
    rows = []
    for image, count in enumerate(counts):
        order = random.permutation(count).tolist()
        rows += [Row(image, tuple(order[start : start + 2])) for start in range(0, count, 2)]
    expected = [rows[index] for index in random.permutation(len(rows))]
    plan = EpochPlan(counts, row_captions=2, batch_captions=6, seed=0)
    assert plan.batches(3) == in_batches(expected, 3)


COUNTS = np.random.default_rng(5).integers(1, 6, 200)
LENGTHS = np.random.default_rng(6).integers(4, 40, COUNTS.sum())


def make_plan(
    row_captions: int = 2,
    *,
    seed: int = 0,
    budget: int | None = None,
) -> EpochPlan:
    return EpochPlan(
        COUNTS,
        row_captions=row_captions,
        batch_captions=4 * row_captions,
        seed=seed,
        budget=TokenBudget(budget, LENGTHS) if budget else None,
    )


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
            if budget is None:
                assert len(batch) <= 4
            else:
                assert max(lengths) * len(lengths) <= budget or len(batch) == 1
    assert plan.batches(0) != plan.batches(1)
    other = make_plan(row_captions, seed=1, budget=budget)
    assert plan.batches(0) != other.batches(0)


def test_a_budget_changes_which_rows_meet_and_no_row() -> None:
    rows, expected = (
        [row for batch in make_plan(budget=budget).batches(1) for row in batch]
        for budget in (160, None)
    )
    assert rows != expected
    assert sorted(rows) == sorted(expected)


def test_under_a_budget_few_positions_are_pads_and_batches_are_mixed() -> None:
    def padding_share(batches: Sequence[list[Row]]) -> float:
        lengths = [row_lengths(batch) for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(max(some) * len(some) for some in lengths)

    batches = make_plan(budget=160).batches(0)
    assert padding_share(batches) < 0.1
    assert padding_share(make_plan().batches(0)) > 0.25
    longest = [max(row_lengths(batch)) for batch in batches]
    assert longest != sorted(longest, reverse=True)
    halves = np.array_split(longest, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.2 * np.mean(longest)


def test_validation_reads_whole_rows_in_order() -> None:
    assert whole_rows([2, 1]) == [Row(0, (0, 1)), Row(1, (0,))]


def test_in_batches_keeps_the_order_and_the_rest() -> None:
    assert in_batches(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert in_batches([], 2) == []


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
class TestPrefetch:
    def test_keeps_the_order(self, depth: int) -> None:
        assert list(prefetch(range(10), lambda n: n * n, depth)) == [n * n for n in range(10)]
        assert list(prefetch([], lambda n: n, depth)) == []

    def test_passes_errors_on_in_their_place(self, depth: int) -> None:
        results = prefetch([1, 2, 0, 4], lambda n: 8 // n, depth)
        assert [next(results), next(results)] == [8, 4]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_works_no_further_ahead_than_asked(self, depth: int) -> None:
        begun: list[int] = []
        results = prefetch(range(50), lambda n: begun.append(n) or n, depth)
        next(results)
        results.close()
        assert len(begun) <= depth + 1
        assert all("ThreadPoolExecutor" not in thread.name for thread in threading.enumerate())
