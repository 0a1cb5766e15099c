"""Count what is in a source, a caption folder or shards: splits, captions, words, sizes."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from vlm_bridge.data_pipeline.captions import strip_tags
from vlm_bridge.data_pipeline.images import image_size
from vlm_bridge.data_pipeline.samples import DataFolder, ImageFile, Skipped, SkippedSample
from vlm_bridge.data_pipeline.sources import SourceItem, iter_images
from vlm_bridge.data_pipeline.splits import SPLITS
from vlm_bridge.errors import ImageError

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_UNDECIDED = "undecided"  # an image that `transform` will assign to a split

Progress = Callable[[int, int], None]
Value = TypeVar("Value")


def folder_items(folder: DataFolder, skipped: list[SkippedSample]) -> list[SourceItem]:
    """Return the images of all splits; ``skipped`` gets the samples that cannot be used."""
    items: list[SourceItem] = []
    for split in SPLITS:
        if split not in folder.splits:
            continue
        unusable = Skipped(split)
        for image in folder.split(split, unusable):
            captions = list(image.captions)
            items.append(SourceItem(image.original_id, captions, split, image.path))
        skipped += unusable.samples
    return items


def describe_items(
    items: Sequence[SourceItem],
    progress: Progress = lambda done, total: None,
    *,
    count_tokens: Callable[[list[str]], list[int]] = lambda texts: [],
) -> dict[str, Any]:
    """Return counts, lengths of captions, vocabulary and image sizes as plain data.

    Args:
        items: the images. Words and tokens are counted without grounding tags. Sizes in pixels
            come from the headers of the files; drawn images have none.
        progress: is called with the number of images measured and their total.
        count_tokens: returns the number of tokens of each caption.

    Returns:
        Distributions are ``{"min", "median", "p95", "max"}``, or None without values.
    """
    captions = [caption for item in items for caption in item.captions]
    plain = [plain_caption(caption) for caption in captions]
    words = [_WORD.findall(caption.lower()) for caption in plain]
    vocabulary = Counter(word for of_caption in words for word in of_caption)
    sizes, unreadable = read_images(items, image_size, progress)
    splits = Counter(item.split or _UNDECIDED for item in items)
    films = Counter(item.film for item in items if item.film is not None)
    return {
        "images": len(items),
        "captions": len(captions),
        "images_per_split": {s: splits[s] for s in (*SPLITS, _UNDECIDED) if splits[s]},
        "films": len(films),
        "images_per_film": distribution(films.values()),
        "captions_per_image": distribution(len(item.captions) for item in items),
        "words_per_caption": distribution(map(len, words)),
        "tokens_per_caption": distribution(count_tokens(plain)),
        "picture_width": distribution(width for width, _ in sizes),
        "picture_height": distribution(height for _, height in sizes),
        "vocabulary": {
            "words": len(vocabulary),
            "seen_once": sum(count == 1 for count in vocabulary.values()),
            "most_common": dict(vocabulary.most_common(20)),
        },
        "unreadable": [item.to_dict() for item in unreadable],
    }


def describe_samples(items: Sequence[SourceItem], *, keep_tags: bool) -> list[dict[str, Any]]:
    """Return id, split and captions of items, without grounding tags unless they are kept."""
    text_of = str if keep_tags else plain_caption
    return [
        {"id": i.image_id, "split": i.split, "captions": [text_of(text) for text in i.captions]}
        for i in items
    ]


def plain_caption(caption: str) -> str:
    """Return a caption on one line and without grounding tags."""
    return " ".join(strip_tags(caption).split())


def distribution(values: Iterable[int]) -> dict[str, float] | None:
    """Return minimum, median, 95th percentile and maximum; None without values."""
    array = np.fromiter(values, dtype=np.int64)
    if not array.size:
        return None
    of_array = np.percentile(array, [0, 50, 95, 100]).tolist()
    return dict(zip(("min", "median", "p95", "max"), of_array, strict=True))


def sample_items(items: Sequence[SourceItem], count: int, seed: int = 0) -> list[SourceItem]:
    """Return up to ``count`` items at random, in their own order."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]


def read_images(
    items: Sequence[SourceItem], read: Callable[[ImageFile | bytes], Value], progress: Progress
) -> tuple[list[Value], list[SkippedSample]]:
    """Apply ``read`` to stored images; return the values, and the images that fail."""
    values: list[Value] = []
    failed: list[SkippedSample] = []
    for done, (item, image) in enumerate(zip(items, iter_images(items), strict=True), start=1):
        try:
            if image is None:
                raise ImageError(item.image_id, "the source holds no image for it")
            if not callable(image):
                values.append(read(image))
        except ImageError as error:
            failed.append(SkippedSample(item.image_id, error.reason))
        progress(done, len(items))
    return values, failed
