"""Decode every image of a split once, so that a damaged one does not end a training in its middle."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import PIL

from vlm_bridge.data_pipeline.caption_folder import DataFolder
from vlm_bridge.data_pipeline.images import check_image
from vlm_bridge.data_pipeline.loader import in_batches, logged, prefetch
from vlm_bridge.data_pipeline.samples import (
    CaptionedImage,
    ImageFile,
    Skipped,
    remembered,
    state_of,
    write_listing,
)
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import ImageError

logger = logging.getLogger(__name__)

CHECK_TOGETHER = 64
MOST_THREADS = 16


def usable_images(
    folder: DataFolder,
    split: SplitName,
    *,
    limit: int | None = None,
    max_skipped_share: float,
    listing: Path | None = None,
    remember_in: Path | None = None,
) -> list[CaptionedImage]:
    """Return the images of a split without captions and images that cannot be read.

    Args:
        limit: look at the first images only.
        max_skipped_share: of captions, and of images.
        listing: the file that lists everything skipped; not written where there is nothing.
        remember_in: the folder that keeps the outcome while no image is touched.

    Raises:
        DataError: there is no such split, or more than ``max_skipped_share`` is skipped.
    """
    captions, unreadable = Skipped(f"{split} captions"), Skipped(f"{split} images")
    images = folder.split(split, captions)[:limit]
    problems = check_images([image.path for image in images], remember_in)
    unreadable.total = len(images)
    for index, reason in problems.items():
        unreadable.add(images[index].path, reason)
    if listing is not None:
        write_listing(listing, [captions, unreadable])
    for part in (captions, unreadable):
        part.check(max_skipped_share, listing=listing, setting="max_bad_samples")
        if len(part):
            counts = f"{len(part):,} of {part.total:,} {part.kind}"
            logger.info(f"skipped {counts}: {part.summary(listing)}")
    return [image for index, image in enumerate(images) if index not in problems]


def check_images(paths: Sequence[ImageFile], remember_in: Path | None = None) -> dict[int, str]:
    """Decode images in threads; return why some cannot be, by index. Args as `usable_images`."""

    def problems_of(part: list[int]) -> list[tuple[int, str]]:
        problems = []
        for index in part:
            try:
                check_image(paths[index])
            except ImageError as error:
                problems.append((index, error.reason))
        return problems

    def check() -> str:
        parts = in_batches(range(len(paths)), CHECK_TOGETHER)
        # Pillow releases the interpreter lock while it decodes.
        checked = prefetch(parts, problems_of, min(MOST_THREADS, os.cpu_count() or 1, len(parts)))
        text = f"checked %s of %s batches of {CHECK_TOGETHER} images"
        return json.dumps(
            [problem for part in logged(checked, len(parts), text) for problem in part]
        )

    try:
        place = (
            remember_in / f".checked-{PIL.__version__}-{state_of(paths)}" if remember_in else None
        )
    except OSError:  # an image is missing
        place = None
    return dict(json.loads(check() if place is None else remembered(place, check)))
