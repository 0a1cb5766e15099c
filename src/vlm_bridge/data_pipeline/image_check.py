"""Which images of a split training can use: every image is decoded once, before anything is made of it.

Found in the middle of a training, a damaged image would end it, or change what the steps after it see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL

from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.data_pipeline.data_folder import DataFolder, SplitImages
from vlm_bridge.data_pipeline.images import MAX_PIXELS, check_image
from vlm_bridge.data_pipeline.loader import prefetch
from vlm_bridge.data_pipeline.samples import ImageFile, Skipped, write_listing
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import ImageError
from vlm_bridge.parsing import parse_json

logger = logging.getLogger(__name__)

CHECK_TOGETHER = 64
MOST_THREADS = 16
LOG_EVERY_SECONDS = 10.0


def usable_images(
    folder: DataFolder,
    split: SplitName,
    *,
    limit: int | None = None,
    max_bad_share: float,
    listing: Path | None = None,
    remember_in: Path | None = None,
) -> SplitImages:
    """The images of a split without the captions that cannot be read and the images that cannot be decoded.

    Args:
        limit: look at the first images only.
        max_bad_share: of captions, and of images.
        listing: the file that lists everything skipped; not written where there is nothing.
        remember_in: the folder that keeps the outcome while no image is touched.

    Raises:
        DataError: there is no such split, or more than ``max_bad_share`` is skipped.
    """
    captions, unreadable = Skipped(f"{split} captions"), Skipped(f"{split} images")
    images = folder.split(split, captions)[:limit]
    bad = check_images(images.paths, remember_in)
    unreadable.total = len(images)
    for index, reason in bad.items():
        unreadable.add(images.path(index), reason)
    if listing is not None:
        write_listing(listing, [captions, unreadable])
    for part in (captions, unreadable):
        part.check(max_bad_share, listing=listing, setting="max_bad_samples")
        if len(part):
            logger.info(
                f"skipped {len(part):,} of {part.total:,} {part.kind}: {part.summary(listing)}"
            )
    return images.take(np.setdiff1d(np.arange(len(images)), list(bad))) if bad else images


def check_images(paths: Sequence[ImageFile], remember_in: Path | None = None) -> dict[int, str]:
    """Decode every image, in threads; why some cannot be, by index. Arguments as of `usable_images`."""
    if not len(paths):
        return {}
    remembered = remember_in / f".checked-{_state_of(paths)}" if remember_in is not None else None
    if remembered is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return {
                int(index): str(reason) for index, reason in parse_json(remembered.read_bytes())
            }
    bad: dict[int, str] = {}
    done, logged = 0, time.monotonic()
    parts = [
        range(start, min(start + CHECK_TOGETHER, len(paths)))
        for start in range(0, len(paths), CHECK_TOGETHER)
    ]
    # Pillow lets go of the interpreter while it decodes.
    threads = min(MOST_THREADS, os.cpu_count() or 1, len(parts))
    for part, problems in zip(
        parts, prefetch(parts, lambda part: _problems(paths, part), threads), strict=True
    ):
        bad |= problems
        done += len(part)
        if time.monotonic() - logged > LOG_EVERY_SECONDS:
            logged = time.monotonic()
            logger.info(f"checked {done:,} of {len(paths):,} images")
    if remembered is not None:
        with contextlib.suppress(OSError):  # a read-only folder remembers nothing
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(remembered, json.dumps(list(bad.items())).encode())
    return bad


def _problems(paths: Sequence[ImageFile], part: range) -> dict[int, str]:
    problems = {}
    for index in part:
        try:
            check_image(paths[index])
        except ImageError as error:
            problems[index] = error.reason
    return problems


def _state_of(paths: Sequence[ImageFile]) -> str:
    """Hash names, times and sizes of the files, and the version of the decoder."""
    digest = hashlib.blake2b(f"{PIL.__version__} {MAX_PIXELS}".encode(), digest_size=12)
    for path in paths:
        try:
            status = path.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
