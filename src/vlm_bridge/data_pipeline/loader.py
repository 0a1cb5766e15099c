"""From captioned images to packed token batches.

A row is one image and up to K of its captions, one behind the other: the image side of a step is computed once
per row, and five short captions leave far fewer pads than five rows would. Which rows form which batch depends
only on (seed, epoch), so an interrupted epoch continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.errors import DataError

IGNORE_INDEX = -100
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
        encode: text -> token ids without special tokens.
        max_caption_tokens: longer captions are cut there, and then carry no EOS: a cut caption has not ended.
    """

    encode: Callable[[str], list[int]]
    start_id: int
    eos_id: int
    prompt: str = ""
    max_caption_tokens: int = 128

    @property
    def prompt_ids(self) -> list[int]:
        """What generation starts from, the same tokens as in training."""
        return [self.start_id, *self.encode(self.prompt)] if self.prompt else [self.start_id]

    def tokenize(self, caption: str) -> TokenizedCaption:
        prompt = self.prompt_ids
        # Behind a prompt, words begin with a space as in running text.
        words = self.encode(f" {caption}" if self.prompt else caption)
        targets = [*words, self.eos_id][: self.max_caption_tokens]
        return TokenizedCaption(
            input_ids=(*prompt, *targets[:-1]), labels=(*[IGNORE_INDEX] * (len(prompt) - 1), *targets)
        )


class TokenizedImages:
    """The captions of a split as tokens: ``captions[i][j]`` is caption j of image i."""

    def __init__(self, images: Sequence[CaptionedImage], format: CaptionFormat):
        if not images:
            raise DataError("there are no captioned images to load")
        self.images = list(images)
        self.captions = [[format.tokenize(caption) for caption in image.captions] for image in images]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_captions(self) -> int:
        return sum(map(len, self.captions))

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Lay the captions of each row one behind the other and pad the rows to one length."""
        chosen = [[self.captions[row.image][caption] for caption in row.captions] for row in rows]
        shape = len(rows), max(sum(len(c.input_ids) for c in captions) for captions in chosen)
        input_ids, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        for b, captions in enumerate(chosen):
            start = 0
            for number, caption in enumerate(captions, start=1):
                end = start + len(caption.input_ids)
                input_ids[b, start:end] = caption.input_ids
                labels[b, start:end] = caption.labels
                segments[b, start:end] = number
                start = end
        images = np.array([row.image for row in rows])
        return PackedBatch(images, input_ids, labels, segments, num_captions=sum(map(len, chosen)))


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens. ``segments`` holds 0 for pads, otherwise the caption's number within its row.

    ``labels[:, t]`` is what position t must predict; ``image_indices`` [B] says whose features a row reads.
    """

    image_indices: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    num_captions: int

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        return int((self.segments != 0).sum())


class EpochPlan:
    """Which captions meet in which batch: every caption once per epoch, in an order fixed by (seed, epoch)."""

    def __init__(
        self, captions_per_image: Sequence[int], *, row_captions: int, batch_captions: int, seed: int
    ):
        self.captions_per_image = list(captions_per_image)
        self.row_captions = row_captions
        self.rows_per_batch = max(1, batch_captions // row_captions)
        self.seed = seed

    @property
    def batches_per_epoch(self) -> int:
        rows = sum(-(-count // self.row_captions) for count in self.captions_per_image)
        return -(-rows // self.rows_per_batch)

    def batches(self, epoch: int) -> list[list[Row]]:
        random = np.random.default_rng([self.seed, epoch])
        rows = []
        for image, count in enumerate(self.captions_per_image):
            order = random.permutation(count).tolist()
            rows += [
                Row(image, tuple(order[start : start + self.row_captions]))
                for start in range(0, count, self.row_captions)
            ]
        shuffled = [rows[index] for index in random.permutation(len(rows))]
        return in_batches(shuffled, self.rows_per_batch)


def whole_rows(captions_per_image: Sequence[int]) -> list[Row]:
    """One row per image with all its captions, in order: what validation reads."""
    return [Row(image, tuple(range(count))) for image, count in enumerate(captions_per_image)]


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
