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


def test_every_token_and_the_end_are_supervised() -> None:
    caption = caption_format().tokenize("ab")
    assert caption.input_ids == (START, 97, 98)
    assert caption.labels == (97, 98, EOS)


def test_the_prompt_is_read_but_not_supervised() -> None:
    format = caption_format(prompt="P:")
    caption = format.tokenize("ab")
    assert caption.input_ids == (START, *encode("P: ab"))
    assert caption.labels == (IGNORE_INDEX, IGNORE_INDEX, *encode(" ab"), EOS)
    assert list(caption.input_ids[:3]) == format.prompt_ids


@pytest.mark.parametrize(
    ("limit", "labels"), [(1, "a"), (2, "ab"), (3, "abc"), (4, "abc$"), (9, "abc$")]
)
def test_a_cut_caption_has_not_ended(limit: int, labels: str) -> None:
    caption = caption_format(max_caption_tokens=limit).tokenize("abc")
    assert list(caption.labels) == [EOS if c == "$" else ord(c) for c in labels]
    assert len(caption.input_ids) == len(caption.labels)
    assert EOS not in caption.input_ids


def test_an_empty_caption_is_just_its_end() -> None:
    caption = caption_format().tokenize("")
    assert (caption.input_ids, caption.labels) == ((START,), (EOS,))


def test_pads_are_never_supervised() -> None:
    data = tokenized(("abcd", "x"), ("ab",))
    batch = data.pack([Row(0, (1, 0)), Row(1, (0,))])
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]]
    pads = batch.segments == 0
    assert (batch.labels[pads] == IGNORE_INDEX).all()
    assert (batch.labels[~pads] != IGNORE_INDEX).all()
    assert batch.labels[0].tolist() == [ord("x"), EOS, *encode("abcd"), EOS]
    assert (batch.num_supervised, batch.num_tokens, batch.num_captions) == (10, 10, 3)
    assert batch.image_indices.tolist() == [0, 1]


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
def test_stored_captions_are_those_tokenised_one_by_one(
    prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_bridge.data_pipeline.loader.TOKENIZE_TOGETHER", 4)
    changes = {"prompt": prompt, "max_caption_tokens": 8}
    data, format = tokenized(*CAPTIONS, **changes), caption_format(**changes)
    expected = [[format.tokenize(caption) for caption in captions] for captions in CAPTIONS]
    found = [
        [data.caption(i, j) for j in range(len(captions))] for i, captions in enumerate(CAPTIONS)
    ]
    assert found == expected
    lengths = [[len(caption.input_ids) for caption in captions] for captions in expected]
    assert data.caption_lengths.tolist() == [length for some in lengths for length in some]
    assert data.image_lengths.tolist() == [sum(some) for some in lengths]
    assert (len(data), data.num_captions, data.captions_per_image.tolist()) == (3, 6, [2, 1, 3])


def test_a_token_takes_four_bytes() -> None:
    data = tokenized(*[("a" * 49,)] * 1000)
    held = sum(value.nbytes for value in vars(data).values() if isinstance(value, np.ndarray))
    assert held < 1000 * (4 * 50 + 50)


def test_supervised_positions_are_those_with_a_label() -> None:
    batch = tokenized(*CAPTIONS, prompt="P:").pack([Row(0, (1, 0)), Row(1, (0,))])
    assert np.array_equal(
        batch.labels.ravel()[batch.supervised], batch.labels[batch.labels != IGNORE_INDEX]
    )
    assert batch.num_positions == batch.input_ids.size


def assert_once_per_epoch(batches: Sequence[list[Row]], counts: Sequence[int] | np.ndarray) -> None:
    seen = Counter(
        (row.image, caption) for rows in batches for row in rows for caption in row.captions
    )
    assert seen == Counter((image, c) for image, count in enumerate(counts) for c in range(count))


class TestEpochPlan:
    counts = (5, 1, 3, 2, 5, 4, 0, 2)

    def plan(self, row_captions: int = 2, batch_captions: int = 6, seed: int = 0) -> EpochPlan:
        return EpochPlan(
            self.counts, row_captions=row_captions, batch_captions=batch_captions, seed=seed
        )

    @pytest.mark.parametrize("row_captions", [1, 2, 5])
    def test_every_caption_comes_once_per_epoch(self, row_captions: int) -> None:
        plan = self.plan(row_captions, batch_captions=5 * row_captions)
        batches = plan.batches(0)
        assert len(batches) == plan.num_batches(0)
        assert_once_per_epoch(batches, self.counts)
        assert all(len(row.captions) <= row_captions for rows in batches for row in rows)
        assert max(map(len, batches)) <= 5

    def test_the_order_depends_on_seed_and_epoch_alone(self) -> None:
        assert list(self.plan().batches(3)) == list(self.plan().batches(3))
        assert list(self.plan().batches(3)) != list(self.plan().batches(4))
        assert list(self.plan().batches(3)) != list(self.plan(seed=1).batches(3))

    def test_captions_are_shuffled_image_by_image(self) -> None:
        # What runs of images are shuffled together for speed comes out as if each were shuffled alone.
        random, rows = np.random.default_rng([0, 3]), []
        for image, count in enumerate(self.counts):
            order = random.permutation(count).tolist()
            rows += [Row(image, tuple(order[start : start + 2])) for start in range(0, count, 2)]
        expected = [rows[index] for index in random.permutation(len(rows))]
        batches = self.plan().batches(3)
        assert [row for batch in batches for row in batch] == expected
        assert batches[1:3] == in_batches(expected, 3)[1:3]


class TestTokenBudget:
    random = np.random.default_rng(5)
    counts = random.integers(1, 6, 300)
    lengths = random.integers(4, 40, counts.sum())
    budget = 160

    def plan(self, row_captions: int = 2, seed: int = 0, budget: int | None = budget) -> EpochPlan:
        chosen = TokenBudget(budget, self.lengths) if budget else None
        return EpochPlan(
            self.counts, row_captions=row_captions, batch_captions=8, seed=seed, budget=chosen
        )

    def row_lengths(self, batch: list[Row]) -> list[int]:
        first = np.concatenate(([0], np.cumsum(self.counts)))
        return [int(sum(self.lengths[first[row.image] + c] for c in row.captions)) for row in batch]

    @pytest.mark.parametrize("row_captions", [1, 2, 5])
    @pytest.mark.parametrize("budget", [1, 60, 160, 10**9])
    def test_every_caption_comes_once_per_epoch_and_no_batch_is_too_large(
        self, row_captions: int, budget: int
    ) -> None:
        plan = self.plan(row_captions, budget=budget)
        for epoch in range(2):
            batches = plan.batches(epoch)
            assert len(batches) == plan.num_batches(epoch)
            assert_once_per_epoch(batches, self.counts)
            for batch in batches:
                lengths = self.row_lengths(batch)
                assert max(lengths) * len(lengths) <= budget or len(batch) == 1

    def test_rows_are_those_of_a_plan_without_budget(self) -> None:
        rows, expected = (
            [row for batch in self.plan(budget=budget).batches(1) for row in batch]
            for budget in (self.budget, None)
        )
        assert rows != expected
        assert sorted(rows) == sorted(expected)

    def test_the_order_depends_on_seed_and_epoch_alone(self) -> None:
        assert list(self.plan().batches(3)) == list(self.plan().batches(3))
        assert list(self.plan().batches(3)) != list(self.plan().batches(4))
        assert list(self.plan().batches(3)) != list(self.plan(seed=1).batches(3))

    def test_few_positions_are_pads(self) -> None:
        def padding_share(batches: Sequence[list[Row]]) -> float:
            lengths = [self.row_lengths(batch) for batch in batches]
            return 1 - sum(map(sum, lengths)) / sum(max(some) * len(some) for some in lengths)

        assert padding_share(self.plan().batches(0)) < 0.1
        assert padding_share(self.plan(budget=None).batches(0)) > 0.25

    def test_long_and_short_batches_are_mixed(self) -> None:
        longest = [max(self.row_lengths(batch)) for batch in self.plan().batches(0)]
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


def test_packed_batches_are_what_torch_reads() -> None:
    batch = tokenized(("ab", "c")).pack([Row(0, (0, 1))])
    assert all(array.dtype == np.int64 for array in (batch.input_ids, batch.labels, batch.segments))
