"""Decode every image of a split once, so that a damaged one does not end a training in its middle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import PIL

from vlm_bridge.data_pipeline.caption_folder import DataFolder
from vlm_bridge.data_pipeline.images import MAX_PIXELS, check_image
from vlm_bridge.data_pipeline.loader import in_batches, logged, prefetch
from vlm_bridge.data_pipeline.samples import CaptionedImage, ImageFile, Skipped, write_listing
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.errors import ImageError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import parse_json

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
    remembered = remember_in / f".checked-{_state_of(paths)}" if remember_in and paths else None
    if remembered is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = parse_json(remembered.read_bytes())
            return {int(index): str(reason) for index, reason in known}
    problems: dict[int, str] = {}
    parts = in_batches(range(len(paths)), CHECK_TOGETHER)
    # Pillow releases the interpreter lock while it decodes.
    threads = min(MOST_THREADS, os.cpu_count() or 1, len(parts))
    checked = prefetch(parts, lambda part: _problems(paths, part), threads)
    for found in logged(
        checked, len(parts), f"checked %s of %s batches of {CHECK_TOGETHER} images"
    ):
        problems |= found
    if remembered is not None:
        with contextlib.suppress(OSError):  # a read-only folder
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(remembered, json.dumps(list(problems.items())).encode())
    return problems


def _problems(paths: Sequence[ImageFile], part: list[int]) -> dict[int, str]:
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
