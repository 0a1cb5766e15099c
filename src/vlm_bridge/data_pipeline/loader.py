"""From captioned images to packed token batches.

A row is one image and up to K of its captions, one behind the other; where images only edit the
text, several share a row. Which rows form which batch depends only on (seed, epoch), so an
interrupted epoch continues exactly.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.errors import DataError

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
LOG_EVERY_SECONDS = 10.0
TOKENIZE_TOGETHER = 4096
SHARED_ROW = 256  # positions of a row that captions of several images share
WINDOW_BATCHES = 50  # rows are sorted by length within windows of so many batches
Item = TypeVar("Item")
Result = TypeVar("Result")


class TokenizedCaption(NamedTuple):
    """Input ids and, at each position, the token to predict (IGNORE_INDEX inside the prompt)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class Row(NamedTuple):
    """One row of a batch: an image and the captions of it that the row holds, as indices."""

    image: int
    captions: tuple[int, ...]


@dataclass(frozen=True)
class CaptionFormat:
    """Tokens of a caption: ``start, prompt..., caption..., EOS``; the prompt is not supervised.

    Attributes:
        encode_all: texts -> token ids of each, without special tokens.
        max_caption_tokens: longer captions are cut there and carry no EOS.
    """

    encode_all: Callable[[list[str]], list[list[int]]]
    start_id: int
    eos_id: int
    prompt: str = ""
    max_caption_tokens: int = 128

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The tokens that generation starts from."""
        return [self.start_id, *(self.encode_all([self.prompt])[0] if self.prompt else [])]

    def targets(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the tokens to predict for each caption: its words and EOS."""
        # Behind a prompt, words begin with a space as in running text.
        texts = [f" {caption}" if self.prompt else caption for caption in captions]
        encoded = self.encode_all(texts)
        return [[*words, self.eos_id][: self.max_caption_tokens] for words in encoded]

    def with_targets(self, targets: Sequence[int], hint: Sequence[int] = ()) -> TokenizedCaption:
        prompt = with_hint(self.prompt_ids, hint)
        ignored = [IGNORE_INDEX] * (len(prompt) - 1)
        return TokenizedCaption((*prompt, *targets[:-1]), (*ignored, *targets))


def hint_tokens(
    words: Iterable[Sequence[str]], encode_all: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """Return the tokens of words, which stand in the first line of a prompt."""
    return encode_all([f"{', '.join(some)}\n" if some else "" for some in words])


def with_hint(prompt_ids: Sequence[int], hint: Sequence[int]) -> list[int]:
    """Return a prompt with a hint (`hint_tokens`) behind its start token."""
    return [*prompt_ids[:1], *hint, *prompt_ids[1:]]


class TokenizedImages:
    """The captions of a split as tokens, four bytes each.

    Attributes:
        captions_per_image: [images].
        caption_lengths: [captions], positions that each takes in a row; image after image.
        image_lengths: [images], positions of all captions of each.
        mean_length: mean number of positions of a caption.
        token_diversity: distinct tokens over all tokens.

    Args:
        words: for each caption, those of its prompt (`hint_words`); None for no words.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        format: CaptionFormat,
        words: Sequence[Sequence[str]] | None = None,
    ):
        if not images:
            raise DataError("there are no captioned images to load")
        captions = [caption for image in images for caption in image.captions]
        self.format = format
        hints = hint_tokens(words, format.encode_all) if words is not None else [[]] * len(captions)
        self._hints = [np.array(hint, np.int32) for hint in hints]
        self._targets = [
            np.array(targets, np.int32)
            for some in in_batches(captions, TOKENIZE_TOGETHER)
            for targets in format.targets(some)
        ]
        self.num_captions = len(captions)
        self.captions_per_image = np.array([len(image.captions) for image in images])
        self._first_caption = _starts(self.captions_per_image)
        tokens = zip(self._hints, self._targets, strict=True)
        lengths = [len(format.prompt_ids) - 1 + len(h) + len(targets) for h, targets in tokens]
        self.caption_lengths = np.array(lengths)
        self.image_lengths = np.diff(_starts(lengths)[self._first_caption])
        self.mean_length = float(self.caption_lengths.mean())
        tokens = np.concatenate(self._targets)
        self.token_diversity = len(np.unique(tokens)) / len(tokens)

    def __len__(self) -> int:
        return len(self.captions_per_image)

    def caption(self, image: int, number: int) -> TokenizedCaption:
        index = self._first_caption[image] + number
        return self.format.with_targets(self._targets[index].tolist(), self._hints[index].tolist())

    def pack(self, rows: Sequence[Row], *, share_rows: bool = False) -> PackedBatch:
        chosen = [[self.caption(row.image, number) for number in row.captions] for row in rows]
        return pack_rows([row.image for row in rows], chosen, share_rows=share_rows)


@dataclass(frozen=True)
class PackedBatch:
    """R rows of T tokens about B images: a row each, or fewer rows that images share.

    Attributes:
        image_indices: [B].
        labels: [R, T], what each position must predict.
        segments: [R, T], 0 for pads, otherwise the caption's number within its row, from 1.
        places: [B, L], where each image's text is in the R x T positions, and R x T for none; None
            for a row each.
    """

    image_indices: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    num_captions: int
    places: np.ndarray | None = None

    @cached_property
    def supervised(self) -> np.ndarray:
        """[V], indices into the R x T positions, row after row."""
        return np.flatnonzero(self.labels != IGNORE_INDEX)

    @property
    def num_supervised(self) -> int:
        return len(self.supervised)

    @cached_property
    def num_tokens(self) -> int:
        return int(np.count_nonzero(self.segments))

    @property
    def num_positions(self) -> int:
        """Tokens and pads."""
        return self.segments.size


def pack_rows(
    images: Sequence[int],
    captions_of_images: Sequence[Sequence[TokenizedCaption]],
    *,
    share_rows: bool = False,
) -> PackedBatch:
    """Lay the captions of each image one behind the other and pad the rows to one length.

    Args:
        images: [B].
        share_rows: lay several images one behind the other, which leaves fewer pads.
    """
    lengths = [sum(len(c.input_ids) for c in captions) for captions in captions_of_images]
    rows = shared_rows(lengths) if share_rows else [[b] for b in range(len(images))]
    shape = len(rows), max(sum(lengths[b] for b in row) for row in rows)
    input_ids, segments = np.zeros((2, *shape), np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    places = np.full((len(images), max(lengths)), input_ids.size)
    for r, row in enumerate(rows):
        start, number = 0, 0
        for b in row:
            places[b, : lengths[b]] = r * shape[1] + start + np.arange(lengths[b])
            for caption in captions_of_images[b]:
                number, end = number + 1, start + len(caption.input_ids)
                input_ids[r, start:end] = caption.input_ids
                labels[r, start:end] = caption.labels
                segments[r, start:end] = number
                start = end
    num_captions = sum(map(len, captions_of_images))
    indices = np.asarray(images)
    return PackedBatch(
        indices, input_ids, labels, segments, num_captions, places if share_rows else None
    )


def shared_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Spread items over rows of about 256 positions: the longest first, each to the emptiest."""
    rows: list[list[int]] = [[] for _ in range(-(-sum(lengths) // SHARED_ROW))]
    filled = [0] * len(rows)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        emptiest = filled.index(min(filled))
        rows[emptiest].append(item)
        filled[emptiest] += lengths[item]
    return [row for row in rows if row]


@dataclass(frozen=True)
class EpochPlan:
    """Rows of each batch: every caption once per epoch, in an order fixed by (seed, epoch).

    Attributes:
        row_captions: captions of an image in one row, at most.
        batch_rows: rows in a batch; not read with ``batch_positions``.
        batch_positions: fill batches with rows of like length, pads included; a single row that
            is longer is a batch of its own. Needs ``caption_lengths``.
    """

    captions_per_image: Sequence[int] | np.ndarray
    row_captions: int
    batch_rows: int
    seed: int
    batch_positions: int | None = None
    caption_lengths: np.ndarray | None = None

    def num_batches(self, epoch: int) -> int:
        if self.batch_positions is not None:
            return len(self.batches(epoch))
        num_rows = sum(-(-int(count) // self.row_captions) for count in self.captions_per_image)
        return -(-num_rows // self.batch_rows)

    def batches(self, epoch: int) -> list[list[Row]]:
        random = np.random.default_rng([self.seed, epoch])
        rows: list[Row] = []
        for image, count in enumerate(self.captions_per_image):
            order = random.permutation(int(count)).tolist()
            rows += [Row(image, tuple(part)) for part in in_batches(order, self.row_captions)]
        shuffled = [rows[number] for number in random.permutation(len(rows))]
        if self.batch_positions is None or self.caption_lengths is None:
            return in_batches(shuffled, self.batch_rows)
        batches = self._bucketed(shuffled, self.batch_positions, self.caption_lengths)
        return [batches[index] for index in random.permutation(len(batches))]

    def _bucketed(
        self, rows: list[Row], budget: int, caption_lengths: np.ndarray
    ) -> list[list[Row]]:
        """Cut rows into batches of like length, each window of them sorted, longest first."""
        first, of_caption = _starts(self.captions_per_image).tolist(), caption_lengths.tolist()
        sized = [(sum(of_caption[first[row.image] + c] for c in row.captions), row) for row in rows]
        mean = sum(length for length, _ in sized) / len(sized)
        batches = []
        for window in in_batches(sized, WINDOW_BATCHES * max(1, round(budget / mean))):
            window.sort(key=lambda pair: -pair[0])
            while window:
                size = max(1, budget // window[0][0])
                batches.append([row for _, row in window[:size]])
                window = window[size:]
        return batches


def whole_rows(captions_per_image: Sequence[int] | np.ndarray) -> list[Row]:
    """Return one row per image with all its captions, in order, for validation."""
    return [Row(image, tuple(range(count))) for image, count in enumerate(captions_per_image)]


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where parts of these lengths begin, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(lengths)))


def in_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def logged(items: Iterable[Item], total: int, text: str) -> Iterator[Item]:
    """Yield items; log ``text`` with their number and the total every ten seconds."""
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > LOG_EVERY_SECONDS:
            last = time.monotonic()
            logger.info(text, f"{number:,}", f"{total:,}")
        yield item


def prefetch(items: Iterable[Item], work: Callable[[Item], Result], depth: int) -> Iterator[Result]:
    """Yield ``work(item)`` in order; up to ``depth`` later items are worked on in threads."""
    if depth < 1:
        yield from map(work, items)
        return
    pool, pending = ThreadPoolExecutor(max_workers=depth), deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
