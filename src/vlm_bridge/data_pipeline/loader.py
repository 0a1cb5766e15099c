"""From captioned images to packed token batches.

A row is one image and up to K of its captions, one behind the other: the image side of a step is computed once
per row, and five short captions leave far fewer pads than five rows would. A batch holds so many captions, or rows of
like length within a budget of positions. Which rows form which batch depends only on (seed, epoch), so an interrupted
epoch continues exactly. Captions are kept as arrays of tokens, four bytes each, however many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple, TypeVar, overload

import numpy as np

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError

IGNORE_INDEX = -100
TOKENIZE_TOGETHER = 4096
"""Captions given to the tokenizer at once; only these exist as lists of Python's integers."""
WINDOW_BATCHES = 50
"""Rows are sorted by length within windows of so many batches: few pads, and other neighbours in every epoch."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class TokenizedCaption(NamedTuple):
    """Input ids and, at each position, the token to predict there (IGNORE_INDEX inside the prompt)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class Row(NamedTuple):
    """One row of a batch: an image and the captions of it that the row holds, as indices."""

    image: int
    captions: tuple[int, ...]


@dataclass(frozen=True)
class CaptionFormat:
    """How a caption becomes tokens: ``start, prompt..., caption..., EOS``. EOS is supervised, the prompt is not.

    Attributes:
        encode_all: texts -> token ids of each, without special tokens.
        max_caption_tokens: longer captions are cut there, and then carry no EOS: a cut caption has not ended.
    """

    encode_all: Callable[[list[str]], list[list[int]]]
    start_id: int
    eos_id: int
    prompt: str = ""
    max_caption_tokens: int = 128

    @cached_property
    def prompt_ids(self) -> list[int]:
        """What generation starts from, the same tokens as in training."""
        return (
            [self.start_id, *self.encode_all([self.prompt])[0]] if self.prompt else [self.start_id]
        )

    def tokenize(self, caption: str) -> TokenizedCaption:
        return self.with_targets(self.targets([caption])[0])

    def targets(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokens to predict for each caption: its words and EOS, cut at ``max_caption_tokens``."""
        # Behind a prompt, words begin with a space as in running text.
        texts = [f" {caption}" if self.prompt else caption for caption in captions]
        return [
            [*words, self.eos_id][: self.max_caption_tokens] for words in self.encode_all(texts)
        ]

    def with_targets(self, targets: Sequence[int]) -> TokenizedCaption:
        prompt = self.prompt_ids
        return TokenizedCaption(
            input_ids=(*prompt, *targets[:-1]),
            labels=(*[IGNORE_INDEX] * (len(prompt) - 1), *targets),
        )


class TokenizedImages:
    """The captions of a split as tokens: one flat array, with the place where each caption begins.

    Attributes:
        captions_per_image: [images].
        caption_lengths: [captions], positions that each takes in a row; image after image.
        image_lengths: [images], positions of all captions of each.
    """

    def __init__(self, images: Sequence[CaptionedImage], format: CaptionFormat):
        if not len(images):
            raise DataError("there are no captioned images to load")
        self.format = format
        self.captions_per_image = np.zeros(len(images), np.int64)

        def read() -> Iterator[str]:
            for index, image in enumerate(images):
                self.captions_per_image[index] = len(image.captions)
                yield from image.captions

        captions = read()
        tokens, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        while some := list(islice(captions, TOKENIZE_TOGETHER)):
            targets = format.targets(some)
            tokens.append(np.fromiter(chain.from_iterable(targets), np.int32))
            lengths.append(np.fromiter(map(len, targets), np.int64))
        self._first_caption = _starts(self.captions_per_image)
        self._targets, num_targets = np.concatenate(tokens), np.concatenate(lengths)
        self._first_target = _starts(num_targets)
        self.caption_lengths = num_targets + len(format.prompt_ids) - 1
        self.image_lengths = _sums(self.caption_lengths, self._first_caption)

    def __len__(self) -> int:
        return len(self.captions_per_image)

    @property
    def num_captions(self) -> int:
        return len(self.caption_lengths)

    @property
    def mean_length(self) -> float:
        """Positions that a caption takes, on average."""
        return float(self.caption_lengths.mean())

    @property
    def token_diversity(self) -> float:
        """Distinct tokens over all tokens."""
        return len(np.unique(self._targets)) / len(self._targets)

    def caption(self, image: int, number: int) -> TokenizedCaption:
        """Caption ``number`` of an image, as its format tokenises it."""
        place = self._first_caption[image] + number
        targets = self._targets[self._first_target[place] : self._first_target[place + 1]]
        return self.format.with_targets(targets.tolist())

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Lay the captions of each row one behind the other and pad the rows to one length."""
        chosen = [[self.caption(row.image, number) for number in row.captions] for row in rows]
        return pack_rows([row.image for row in rows], chosen)

    def digest(self) -> str:
        """Hash over the tokens of all captions, in order."""
        digest = hashlib.blake2b(digest_size=12)
        for array in (self._targets, self.caption_lengths, np.array(self.format.prompt_ids)):
            digest.update(f"{array.dtype} {len(array)}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens. ``segments`` holds 0 for pads, otherwise the caption's number within its row.

    ``labels[:, t]`` is what position t must predict; ``image_indices`` [B]: the image of each row.
    """

    image_indices: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    num_captions: int

    @cached_property
    def supervised(self) -> np.ndarray:
        """[V], where something is supervised: indices into the B x T positions, row after row."""
        return np.flatnonzero(self.labels != IGNORE_INDEX)

    @property
    def num_supervised(self) -> int:
        return len(self.supervised)

    @cached_property
    def num_tokens(self) -> int:
        return int(np.count_nonzero(self.segments))

    @property
    def num_positions(self) -> int:
        """B x T: tokens and pads."""
        return self.segments.size


def pack_rows(
    images: Sequence[int],
    captions_of_rows: Sequence[Sequence[TokenizedCaption]],
) -> PackedBatch:
    """Lay the captions of each row one behind the other and pad the rows to one length.

    Args:
        images: [B], whose features each row reads.
    """
    shape = (
        len(images),
        max(sum(len(c.input_ids) for c in captions) for captions in captions_of_rows),
    )
    input_ids, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for b, captions in enumerate(captions_of_rows):
        start = 0
        for number, caption in enumerate(captions):
            end = start + len(caption.input_ids)
            input_ids[b, start:end] = caption.input_ids
            labels[b, start:end] = caption.labels
            segments[b, start:end] = number + 1
            start = end
    num_captions = sum(map(len, captions_of_rows))
    return PackedBatch(np.asarray(images), input_ids, labels, segments, num_captions)


@dataclass(frozen=True)
class TokenBudget:
    """Batches of rows of like length that take at most ``positions`` positions, pads included.

    A single row that is longer is a batch of its own. Soft tokens of a bridge are not counted.

    Attributes:
        caption_lengths: [captions], see `TokenizedImages`.
    """

    positions: int
    caption_lengths: np.ndarray


class EpochPlan:
    """Which captions meet in which batch: every caption once per epoch, in an order fixed by (seed, epoch).

    Args:
        row_captions: captions of an image in one row, at most.
        batch_captions: captions in a batch; not read where there is a ``budget``.
        budget: fill batches by positions instead; the number of batches then differs from epoch to epoch.
        shuffle_buffer: 0 shuffles all rows. Otherwise an epoch is read as a stream is: shards in an order of their own,
            the images of each in their order, shuffled within windows of so many images. Windows begin elsewhere in
            every epoch. A batch may reach over two windows; one that is filled by positions does not.
        shards: [images], the number of the shard that each image lies in; None where all lie in one.
    """

    def __init__(
        self,
        captions_per_image: Sequence[int] | np.ndarray,
        *,
        row_captions: int,
        batch_captions: int,
        seed: int,
        budget: TokenBudget | None = None,
        shuffle_buffer: int = 0,
        shards: np.ndarray | None = None,
    ):
        counts = np.asarray(captions_per_image, np.int64)
        self.rows_per_batch = max(1, batch_captions // row_captions)
        self.seed = seed
        self.budget = budget
        self.shuffle_buffer = shuffle_buffer
        self._shards = np.zeros(len(counts), np.int64) if shards is None else shards
        # Rows of an image stand side by side: row r has places row_start[r] to row_start[r + 1] of all captions.
        self._counts, self._first_caption = counts, _starts(counts)
        rows_of_image = -(-counts // row_captions)
        self._row_image = np.repeat(np.arange(len(counts)), rows_of_image)
        number_in_image = np.arange(len(self._row_image)) - np.repeat(
            _starts(rows_of_image)[:-1], rows_of_image
        )
        starts = self._first_caption[self._row_image] + number_in_image * row_captions
        self._row_start = np.append(starts, self._first_caption[-1])

    def num_batches(self, epoch: int) -> int:
        if self.budget is None:
            return -(-len(self._row_image) // self.rows_per_batch)
        return len(self.batches(epoch))

    def batches(self, epoch: int) -> EpochBatches:
        random = np.random.default_rng([self.seed, epoch])
        captions = self._shuffled_captions(random)
        windows = self._windows(random)
        if self.budget is None:
            rows = np.concatenate(windows)
            batches = np.split(rows, range(self.rows_per_batch, len(rows), self.rows_per_batch))
        else:
            places = captions + np.repeat(self._first_caption[:-1], self._counts)
            lengths = _sums(self.budget.caption_lengths[places], self._row_start)
            batches = []
            for rows in windows:
                of_window = bucketed(rows, lengths, self.budget.positions)
                batches += [of_window[index] for index in random.permutation(len(of_window))]
        return EpochBatches(batches, self._row_image, self._row_start, captions)

    def _windows(self, random: np.random.Generator) -> list[np.ndarray]:
        """All rows in the order of an epoch, shuffled within each of these parts."""
        if not self.shuffle_buffer:
            return [random.permutation(len(self._row_image))]
        turn_of_shard = random.permutation(int(self._shards.max()) + 1)
        stream = np.argsort(turn_of_shard[self._shards], kind="stable")
        place = np.empty_like(stream)
        place[stream] = np.arange(len(stream))
        window = (place + random.integers(self.shuffle_buffer)) // self.shuffle_buffer
        window_of_row = window[self._row_image]
        rows = np.lexsort((random.permutation(len(window_of_row)), window_of_row))
        return np.split(rows, np.flatnonzero(np.diff(window_of_row[rows])) + 1)

    def _shuffled_captions(self, random: np.random.Generator) -> np.ndarray:
        """Numbers of captions [captions], those of each image in an order of their own."""
        counts = self._counts
        ends = np.flatnonzero(np.append(counts[1:] != counts[:-1], True)) + 1
        runs = zip(np.append(0, ends[:-1]).tolist(), ends.tolist(), strict=True)
        # Images with equally many captions are shuffled together: Flickr's and COCO's nearly all have five.
        shuffled = [
            random.permuted(
                np.tile(np.arange(int(counts[start])), (end - start, 1)), axis=1
            ).ravel()
            for start, end in runs
        ]
        return np.concatenate(shuffled)


class EpochBatches(Sequence[list[Row]]):
    """The batches of an epoch; their rows are made when they are asked for."""

    def __init__(
        self,
        batches: list[np.ndarray],
        row_image: np.ndarray,
        row_start: np.ndarray,
        captions: np.ndarray,
    ):
        self._batches = batches
        self._row_image, self._row_start, self._captions = row_image, row_start, captions

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> list[Row]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Row]]: ...
    def __getitem__(self, index: int | slice) -> list[Row] | list[list[Row]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [self._row(row) for row in self._batches[index].tolist()]

    def _row(self, row: int) -> Row:
        captions = self._captions[self._row_start[row] : self._row_start[row + 1]]
        return Row(int(self._row_image[row]), tuple(captions.tolist()))


def bucketed(rows: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Shuffled ``rows`` in batches of like length whose longest times their number is at most ``budget``.

    Each window of `WINDOW_BATCHES` batches is sorted, longest first, and cut whenever a batch is full.

    Args:
        lengths: positions of each row, by row.
    """
    window = WINDOW_BATCHES * max(1, round(budget / lengths.mean()))
    batches = []
    for start in range(0, len(rows), window):
        some = rows[start : start + window]
        some = some[np.argsort(-lengths[some], kind="stable")]
        while len(some):
            size = max(1, budget // lengths[some[0]])
            batches.append(some[:size])
            some = some[size:]
    return batches


def whole_rows(captions_per_image: Sequence[int] | np.ndarray) -> list[Row]:
    """One row per image with all its captions, in order: what validation reads."""
    return [Row(image, tuple(range(count))) for image, count in enumerate(captions_per_image)]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where parts of these lengths begin, laid one behind the other; and behind them all, where they end."""
    return np.concatenate(([0], np.cumsum(lengths)))


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum of each part that begins at ``starts[i]`` and ends before ``starts[i + 1]``."""
    return np.diff(_starts(values)[starts])


def in_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def prefetch(items: Sequence[Item], work: Callable[[Item], Result], depth: int) -> Iterator[Result]:
    """Yield ``work(item)`` in order while up to ``depth`` later items are worked on in threads (0 = none)."""
    if depth < 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(max_workers=depth) as pool:
        pending = []
        remaining = iter(items)
        try:
            for item in remaining:
                pending.append(pool.submit(work, item))
                if len(pending) > depth:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
