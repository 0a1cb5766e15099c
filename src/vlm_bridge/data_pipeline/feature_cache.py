"""Features of frozen encoders, computed once per image and memory-mapped afterwards.

A cache is one `.npy` of float16 [images, N, D] in a folder named by a key over everything that its content
depends on (encoder weights, preprocessing, the pictures). Another encoder or another dataset has another key:
a stale or foreign cache is never found, let alone used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import in_batches, prefetch
from vlm_bridge.errors import DataError

FEATURES_NAME, INDEX_NAME = "features.npy", "index.json"
ENCODE_BATCH = 32
FREE_SPACE_TO_LEAVE = 512 * 2**20

EncodeImages = Callable[[list[Image.Image]], np.ndarray]
PreprocessImages = Callable[[list[Image.Image]], np.ndarray]


class FeatureCache:
    """Features of a list of images: ``cache[indices]`` is float16 [len(indices), N, D]."""

    def __init__(self, path: Path):
        self.path = path
        self.features = np.load(path, mmap_mode="r")

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.features[indices]


class OnTheFlyPixels:
    """The same interface without a cache: ``[indices]`` opens pictures and gives pixels [len(indices), 3, h, w]."""

    def __init__(self, paths: Sequence[Path], preprocess: PreprocessImages):
        self.paths = list(paths)
        self.preprocess = preprocess

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.preprocess([open_image(self.paths[index]) for index in indices])


def cache_key(*parts: str) -> str:
    """Folder name of a cache from all that it depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def open_or_build(
    root: Path,
    key: str,
    paths: Sequence[Path],
    shape: tuple[int, int],
    encode: EncodeImages,
    *,
    num_workers: int,
    progress: Callable[[int], None] = lambda done: None,
) -> FeatureCache | None:
    """Open the cache of ``key`` below ``root``, or encode every picture into a new one.

    Args:
        shape: (N, D) of one image's features.
        encode: pictures -> [len, N, D].
        progress: called with the number of pictures encoded so far.

    Returns:
        None when the disk has no room for it; the caller then encodes on the fly.

    Raises:
        ImageError: a picture cannot be read.
    """
    folder = root / key
    wanted = {"images": len(paths), "shape": list(shape), "key": key}
    if cache := _open_whole(folder, wanted):
        return cache
    size = len(paths) * shape[0] * shape[1] * 2
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < size + FREE_SPACE_TO_LEAVE:
        return None

    building = root / f".building-{key}-{os.getpid()}"
    building.mkdir(exist_ok=True)
    try:
        features = np.lib.format.open_memmap(
            building / FEATURES_NAME, mode="w+", dtype=np.float16, shape=(len(paths), *shape)
        )
        done = 0
        batches = in_batches(list(paths), ENCODE_BATCH)
        for images in prefetch(batches, lambda batch: [open_image(path) for path in batch], num_workers):
            with np.errstate(over="ignore"):
                encoded = encode(images).astype(np.float16)
            if not np.isfinite(encoded).all():
                raise DataError(
                    f"the features of pictures near {paths[done]} do not fit into float16: train with feature_cache=off"
                )
            features[done : done + len(images)] = encoded
            done += len(images)
            progress(done)
        features.flush()
        del features
        (building / INDEX_NAME).write_text(json.dumps(wanted), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return FeatureCache(folder / FEATURES_NAME)


def _open_whole(folder: Path, wanted: dict[str, object]) -> FeatureCache | None:
    """The cache in ``folder`` if it is there, whole and the one wanted; a damaged one is built anew."""
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        cache = FeatureCache(folder / FEATURES_NAME)
    except (OSError, ValueError, EOFError):  # what numpy and json make of missing and truncated files
        return None
    is_wanted = index == wanted and [*cache.features.shape] == [index["images"], *index["shape"]]
    return cache if is_wanted else None
