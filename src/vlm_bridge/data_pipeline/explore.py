"""Statistics of captioned pictures, before (a source) or after (a caption folder) they are transformed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from vlm_bridge.data_pipeline.bad_samples import BadSamples
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.data_folder import DataFolder
from vlm_bridge.data_pipeline.images import image_size, open_image
from vlm_bridge.data_pipeline.sources.base import Rejected, SourceItem, iter_pictures
from vlm_bridge.data_pipeline.splits import SPLITS
from vlm_bridge.data_pipeline.tags import TagCounter, strip_tags
from vlm_bridge.errors import ImageError

UNDECIDED = "undecided"
"""Split of images whose source leaves it to ``transform``."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_MOST_COMMON = 20
_CAPTIONS_AT_ONCE = 1000


def folder_items(folder: DataFolder, set_aside: list[Rejected] | None = None) -> list[SourceItem]:
    """Return the images of a caption folder or of shards, all splits, as if it were a source.

    Args:
        set_aside: takes the samples that are skipped, of shards and of folders that other tools prepared.
    """
    items: list[SourceItem] = []
    for split in SPLITS:
        if split not in folder.splits:
            continue
        bad = None if isinstance(folder, CaptionFolder) and folder.is_checked else BadSamples(split)
        items += [
            SourceItem(image.original_id, list(image.captions), split, path=image.path)
            for image in folder.split(split, bad)
        ]
        if set_aside is not None and bad is not None:
            set_aside += [Rejected(sample.where, sample.reason) for sample in bad.samples]
    return items


def describe_items(
    items: Sequence[SourceItem],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
) -> dict[str, Any]:
    """Return counts, caption lengths, vocabulary, tags and picture sizes (pixels, from the headers) as plain data.

    A distribution is ``{"min", "median", "p95", "max"}``, or None of nothing; ``unreadable`` lists pictures
    whose header cannot be read. Drawn pictures have no size before they are drawn. Words and tokens are those
    of captions without grounding tags, which ``tags`` counts (:meth:`TagCounter.summary`).

    Args:
        count_tokens: the number of tokens of each caption; without it ``tokens_per_caption`` is None.
    """
    vocabulary: Counter[str] = Counter()
    tags = TagCounter()
    num_words: list[int] = []
    num_tokens: list[int] = []
    for captions in _batches(
        (caption for item in items for caption in item.captions), _CAPTIONS_AT_ONCE
    ):
        plain = [plain_caption(caption) for caption in captions]
        for caption, text in zip(captions, plain, strict=True):
            tags.add(caption[:MAX_CAPTION_CHARACTERS])
            words = _words(text)
            num_words.append(len(words))
            vocabulary.update(words)
        if count_tokens is not None:
            num_tokens += count_tokens(plain)
    sizes, unreadable = _picture_sizes(items, progress)
    splits = Counter(item.split or UNDECIDED for item in items)
    films = Counter(item.film for item in items if item.film is not None)
    return {
        "images": len(items),
        "captions": sum(len(item.captions) for item in items),
        "images_per_split": {
            split: splits[split] for split in (*SPLITS, UNDECIDED) if splits[split]
        },
        "films": len(films),
        "images_per_film": distribution(films.values()),
        "captions_per_image": distribution(len(item.captions) for item in items),
        "words_per_caption": distribution(num_words),
        "tokens_per_caption": distribution(num_tokens),
        "vocabulary": {
            "words": len(vocabulary),
            "seen_once": sum(count == 1 for count in vocabulary.values()),
            "most_common": vocabulary.most_common(_MOST_COMMON),
        },
        "tags": tags.summary(),
        "picture_width": distribution(width for width, _ in sizes),
        "picture_height": distribution(height for _, height in sizes),
        "unreadable": [{"id": item.id, "reason": item.reason} for item in unreadable],
    }


def plain_caption(caption: str) -> str:
    """Return a caption without grounding tags, on one line; a text too long to be a caption keeps what looks so."""
    plain = strip_tags(caption) if len(caption) <= MAX_CAPTION_CHARACTERS else caption
    return " ".join(plain.split())


def distribution(values: Iterable[int]) -> dict[str, float] | None:
    """Return minimum, median, 95th percentile and maximum; None of nothing."""
    array = np.fromiter(values, dtype=np.int64)
    if not array.size:
        return None
    low, median, p95, high = np.percentile(array, [0, 50, 95, 100]).tolist()
    return {"min": low, "median": median, "p95": p95, "max": high}


def sample_items(items: Sequence[SourceItem], count: int, seed: int = 0) -> list[SourceItem]:
    """Return up to ``count`` items at random, in their own order."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]


def find_broken(
    items: Sequence[SourceItem], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Rejected]:
    """Decode the picture of every item in full and return those that fail."""
    broken: list[Rejected] = []
    for done, item in enumerate(items, start=1):
        try:
            if item.path is not None:
                open_image(item.path)
        except ImageError as error:
            broken.append(Rejected(item.image_id, error.reason))
        progress(done, len(items))
    return broken


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def _batches(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    captions = iter(captions)
    while batch := list(islice(captions, size)):
        yield batch


def _picture_sizes(
    items: Sequence[SourceItem], progress: Callable[[int, int], None]
) -> tuple[list[tuple[int, int]], list[Rejected]]:
    sizes: list[tuple[int, int]] = []
    unreadable: list[Rejected] = []
    made = [item for item in items if item.draw is None]
    for done, (item, picture) in enumerate(zip(made, iter_pictures(made), strict=True), start=1):
        try:
            if picture is None:
                raise ImageError(item.image_id, "the source holds no picture for it")
            assert not callable(picture)
            sizes.append(image_size(picture))
        except ImageError as error:
            unreadable.append(Rejected(item.image_id, error.reason))
        progress(done, len(made))
    return sizes, unreadable
