"""Features of a frozen encoder: computed once per image, memory-mapped afterwards.

::

    ROOT/KEY/features.bin       a record per image: its features, then their CRC-32
    ROOT/KEY/features.building  the same while it is written; an interrupted build continues here
    ROOT/KEY/index.json         what the records are and how fast they were made
    ROOT/KEY/.lock              exclusive for the one process that builds, shared by those that read
    ROOT/.pictures-DIGEST       content hash of a list of images, kept while no file is touched

KEY hashes everything that features depend on: encoder weights, preprocessing, images, format.
A cache of another encoder or of other images is therefore never found.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import in_batches, prefetch
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import DataError
from vlm_bridge.quantization import to_int8

LAYOUT = "vlm-bridge features 3"
FREE_SPACE_TO_LEAVE = 512 * 2**20
LOG_EVERY_SECONDS = 10.0
CHECKSUM_BYTES = SCALE_BYTES = 4
ENCODE_BATCH = {"cpu": 8, "cuda": 64}
"""Images encoded together, by kind of device: a GPU is full with 64 x 257 tokens of DINOv2."""
_KEY = re.compile(r"[0-9a-f]{24}")

FeatureDtype = Literal["float16", "bfloat16", "int8", "float32"]
logger = logging.getLogger(__name__)


class CacheUnavailable(DataError):
    """There is no room or no permission for a cache; images can still be encoded in every step."""


class Encoder(Protocol):
    """A frozen vision encoder: pixels [B, 3, h, w] -> features [B, N, D]."""

    num_tokens: int
    embed_dim: int

    def preprocess(self, images: list[Image.Image]) -> Any: ...
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def __call__(self, pixels_bchw: torch.Tensor) -> torch.Tensor: ...


class Features(Protocol):
    """By image index: features [B, N, D] of a cache, or pixels [B, 3, h, w] to encode."""

    def __getitem__(self, indices: np.ndarray) -> Any: ...


# What is encoded: images, or random views of them.


@dataclass(frozen=True)
class Views:
    """Random crops of every image, half of them mirrored; fixed by (seed, image, view).

    Mirrored images contradict captions that name left or right.
    """

    count: int
    seed: int

    # Crops as in BLIP's training (Li et al. 2022): smaller ones lose what captions name.
    AREA: ClassVar = (0.5, 1.0)
    # Width over height (Szegedy et al. 2015).
    ASPECT: ClassVar = (3 / 4, 4 / 3)

    def view(self, image: Image.Image, index: int, number: int) -> Image.Image:
        """Make view ``number`` of image ``index``."""
        random = np.random.default_rng([self.seed, index, number])
        area = random.uniform(*self.AREA) * image.width * image.height
        aspect = math.exp(random.uniform(*np.log(self.ASPECT)))
        width = min(image.width, max(1, round(math.sqrt(area * aspect))))
        height = min(image.height, max(1, round(math.sqrt(area / aspect))))
        left = int(random.integers(image.width - width + 1))
        top = int(random.integers(image.height - height + 1))
        cropped = image.crop((left, top, left + width, top + height))
        return ImageOps.mirror(cropped) if random.random() < 0.5 else cropped

    def of_epoch(self, num_images: int, epoch: int) -> np.ndarray:
        """Return the view [num_images] of each image in an epoch: each once in ``count`` epochs."""
        first = np.random.default_rng(self.seed).integers(self.count, size=num_images)
        return (first + epoch) % self.count


class OnTheFlyPixels:
    """Images opened when they are needed: ``[indices]`` gives encoder input [B, 3, h, w].

    With ``views``, index i is view i % count of image i // count.
    """

    def __init__(
        self,
        paths: Sequence[ImageFile],
        preprocess: Callable[[list[Image.Image]], Any],
        views: Views | None = None,
    ):
        self.paths = paths
        self.preprocess = preprocess
        self.views = views

    def __len__(self) -> int:
        return len(self.paths) * (self.views.count if self.views else 1)

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.preprocess([self._image(int(index)) for index in indices])

    def _image(self, index: int) -> Image.Image:
        if self.views is None:
            return open_image(self.paths[index])
        image, view = divmod(index, self.views.count)
        return self.views.view(open_image(self.paths[image]), image, view)


@dataclass(frozen=True)
class SplitFeatures:
    """Features or pixels of a split by image index; of several views, those of one epoch."""

    items: Features
    num_images: int
    views: Views | None = None

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.in_epoch(0)[indices]

    def in_epoch(self, epoch: int) -> Features:
        """Return the features that an epoch shows."""
        if self.views is None:
            return self.items
        chosen = self.views.of_epoch(self.num_images, epoch)
        return _Chosen(self.items, np.arange(self.num_images) * self.views.count + chosen)


@dataclass(frozen=True)
class _Chosen:
    items: Features
    item_of_image: np.ndarray

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.items[self.item_of_image[indices]]


def cache_root(feature_cache: str, data_dir: str | Path) -> Path | None:
    """Return the folder of the caches that a recipe's ``feature_cache`` names; None for ``off``."""
    if feature_cache == "off":
        return None
    return Path(data_dir) / ".features" if feature_cache == "auto" else Path(feature_cache)


def cached_features(
    encoder: Encoder,
    fingerprint: str,
    paths: Sequence[ImageFile],
    root: Path,
    *,
    split: str,
    dtype: FeatureDtype = "float16",
    views: Views | None = None,
    num_workers: int = 0,
    check_all: bool = False,
) -> FeatureCache:
    """Open the cache of some images below ``root``, or make it.

    Raises: as `FeatureCache.open_or_build`.
    """
    key = cache_key(LAYOUT, fingerprint, images_digest(paths, root), dtype, repr(views))
    device = next(encoder.parameters()).device

    @torch.no_grad()
    def encode(pixels_bchw: torch.Tensor) -> torch.Tensor:
        return encoder(pixels_bchw.to(device))

    return FeatureCache.open_or_build(
        root / key,
        FeatureFormat(encoder.num_tokens, encoder.embed_dim, dtype),
        OnTheFlyPixels(paths, encoder.preprocess, views),
        encode,
        name=split,
        batch_images=ENCODE_BATCH.get(device.type, 32),
        num_workers=num_workers,
        check_all=check_all,
    )


def cache_key(*parts: str) -> str:
    """Return the folder name of a cache from everything it depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def images_digest(paths: Sequence[ImageFile], root: Path) -> str:
    """Hash the content of image files, in order; ``root`` keeps the hash while no file is touched.

    Raises:
        DataError: an image is missing.
    """
    seen = hashlib.blake2b(digest_size=12)
    try:
        for path in paths:
            status = path.stat()
            seen.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        known = root / f".pictures-{seen.hexdigest()}"
        with contextlib.suppress(OSError):
            return known.read_text(encoding="ascii")
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = pool.map(lambda path: hashlib.blake2b(path.read_bytes()).hexdigest(), paths)
            content = cache_key(*digests)
    except FileNotFoundError as error:
        raise DataError(f"image {error.filename} is missing: make the data folder again") from None
    with contextlib.suppress(OSError):  # a read-only folder
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(known, content.encode())
    return content


# The cache.


@dataclass(frozen=True)
class FeatureFormat:
    """Features [N, D] of one image as bytes; `int8` has a float32 scale per token, behind the values."""

    num_tokens: int
    dim: int
    dtype: FeatureDtype = "float16"

    @property
    def record_bytes(self) -> int:
        if self.dtype == "int8":
            return self.num_tokens * (self.dim + SCALE_BYTES)
        return self.num_tokens * self.dim * getattr(torch, self.dtype).itemsize

    def pack(self, features_bnd: torch.Tensor) -> np.ndarray:
        """Features [B, N, D] -> records [B, ``record_bytes``] of bytes.

        Raises:
            OverflowError: a feature is not finite, or becomes infinite in this format.
        """
        if not torch.isfinite(features_bnd).all():
            raise OverflowError("are not finite numbers")
        if self.dtype == "int8":
            return np.concatenate([_bytes_of(part) for part in to_int8(features_bnd)], axis=1)
        stored_bnd = features_bnd.to(getattr(torch, self.dtype))
        if not torch.isfinite(stored_bnd).all():
            raise OverflowError(f"do not fit into {self.dtype}")
        return _bytes_of(stored_bnd)

    def unpack(self, records: np.ndarray) -> torch.Tensor:
        """Records [B, ``record_bytes``] -> features [B, N, D]; those of `int8` in float32."""
        shape = len(records), self.num_tokens, self.dim
        if self.dtype == "int8":
            num_values = self.num_tokens * self.dim
            levels = torch.from_numpy(records[:, :num_values].view(np.int8)).view(shape)
            scales = torch.from_numpy(records[:, num_values:].copy().view(np.float32))
            return levels * scales[..., None]
        dtype = getattr(torch, self.dtype)
        return torch.from_numpy(records.view(f"i{dtype.itemsize}")).view(dtype).view(shape)


def _bytes_of(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().flatten(1).view(torch.uint8).cpu().numpy()


class FeatureCache:
    """Features of a cache that is whole: ``cache[indices]`` is a tensor [len(indices), N, D].

    While it lives it holds a shared lock, so that no eviction removes the files.
    """

    def __init__(self, folder: Path, format: FeatureFormat, num_images: int, lock: IO[bytes]):
        self.folder = folder
        self.format = format
        self.num_images = num_images
        self.was_there = False
        self._stride = format.record_bytes + CHECKSUM_BYTES
        self._lock = lock

    @classmethod
    def open_or_build(
        cls,
        folder: Path,
        format: FeatureFormat,
        pixels: Features,
        encode: Callable[[Any], torch.Tensor],
        *,
        name: str = "features",
        batch_images: int = 32,
        num_workers: int = 0,
        check_all: bool = False,
    ) -> FeatureCache:
        """Open the cache in ``folder``; encode what is missing or damaged.

        Decoding runs in threads: Pillow releases the interpreter lock, so processes are no faster.

        Args:
            pixels: what to encode, with a length.
            encode: pixels -> features [B, N, D].
            name: of the images, for the log.
            num_workers: batches decoded ahead of the encoder.
            check_all: compare every checksum instead of one at random.

        Raises:
            CacheUnavailable: no room, or the files cannot be written.
            ImageError: an image cannot be read.
            DataError: features do not fit into the format.
        """
        building = folder / "features.building"
        try:
            lock = _lock(folder)
        except OSError as error:
            raise CacheUnavailable(f"cannot cache features in {folder}: {error}") from error
        cache = cls(folder, format, len(pixels), lock)  # type: ignore[arg-type]
        try:
            cache.was_there = cache._is_sound(check_all)
            waiting = False
            while not (cache.was_there or _try_lock(lock)):
                if not waiting:
                    logger.info("%s: waiting for the process that builds %s", name, folder)
                    waiting = True
                time.sleep(0.1)
                # Shared: the process that built it keeps a shared lock for as long as it reads.
                fcntl.flock(lock, fcntl.LOCK_SH)
                cache.was_there = cache._is_sound(check_all)
            cache.was_there = cache.was_there or cache._is_sound(check_all)
            if not cache.was_there:
                cache._build(building, pixels, encode, name, batch_images, num_workers)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):  # of another user
                os.utime(folder / ".lock")  # the time of last use
            cache._map()
        except BaseException as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if building.is_file() and (is_full or not building.stat().st_size):
                shutil.rmtree(folder, ignore_errors=True)  # checkpoints need the room
            lock.close()
            if isinstance(error, OSError):
                raise CacheUnavailable(f"cannot cache features in {folder}: {error}") from error
            raise
        return cache

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        # Announced, records are read side by side, each in one piece, instead of page by page.
        for index in indices.tolist():
            start = index * self._stride
            before = start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, start - before, before + self._stride)
        return self.format.unpack(self._records[indices][:, :-CHECKSUM_BYTES])

    @property
    def num_bytes(self) -> int:
        return self.num_images * self._stride

    @property
    def index(self) -> dict[str, Any]:
        """What was written when the cache was made."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "index.json").read_bytes())
        return {}

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _map(self) -> None:
        with (self.folder / "features.bin").open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._records = np.frombuffer(self._mapped, np.uint8).reshape(-1, self._stride)

    def _is_sound(self, check_all: bool) -> bool:
        """Check the size and one checksum, or all; a damaged file becomes an unfinished one."""
        path = self.folder / "features.bin"
        if not path.is_file():
            return False
        with path.open("rb") as file:
            sample = int(np.random.default_rng().integers(self.num_images))
            is_sound = path.stat().st_size == self.num_bytes and all(
                self._is_whole(file, number)
                for number in (range(self.num_images) if check_all else [sample])
            )
        if not is_sound and _try_lock(self._lock):
            logger.warning("%s is damaged: encoding the damaged features again", path)
            path.replace(self.folder / "features.building")
        return is_sound

    def _is_whole(self, file: IO[bytes], number: int) -> bool:
        file.seek(number * self._stride)
        record = file.read(self._stride)
        checksum = zlib.crc32(record[:-CHECKSUM_BYTES]).to_bytes(CHECKSUM_BYTES, "little")
        return len(record) == self._stride and record[-CHECKSUM_BYTES:] == checksum

    def _build(
        self,
        building: Path,
        pixels: Features,
        encode: Callable[[Any], torch.Tensor],
        name: str,
        batch_images: int,
        num_workers: int,
    ) -> None:
        """Encode the images behind the last sound record of ``building``, and give it its name."""
        with building.open("a+b") as file:
            first = 0
            while self._is_whole(file, first):
                first += 1
            first = min(first, self.num_images)
            file.truncate(first * self._stride)
            remaining = (self.num_images - first) * self._stride
            _check_room(self.folder, remaining)
            logger.info(
                "%s: encoding %s images into %s (%s)",
                name, f"{self.num_images - first:,}", self.folder, as_bytes(remaining),
            )  # fmt: skip
            batches = in_batches(range(first, self.num_images), batch_images)
            loaded = prefetch(batches, lambda batch: pixels[np.array(batch)], num_workers)
            progress = _Progress(name, first, self.num_images)
            for batch, values in zip(batches, loaded, strict=True):
                try:
                    records = self.format.pack(encode(values))
                except OverflowError as error:
                    raise DataError(
                        f"the features of images {batch[0]} to {batch[-1]} {error}: "
                        "train with feature_cache_dtype=bfloat16, or with feature_cache=off"
                    ) from None
                sums = np.array([zlib.crc32(record) for record in records], "<u4")
                file.write(np.hstack([records, sums[:, None].view(np.uint8)]).tobytes())
                progress(batch[-1] + 1)
            file.flush()
            os.fsync(file.fileno())
        facts = {"layout": LAYOUT, "images": self.num_images, "dtype": self.format.dtype}
        facts |= {"shape": [self.format.num_tokens, self.format.dim], "split": name}
        facts["images_per_second"] = round(progress.rate, 2)
        write_atomically(self.folder / "index.json", json.dumps(facts, indent=2).encode())
        building.replace(self.folder / "features.bin")


class _Progress:
    """Logs how long encoding will take, and measures its rate."""

    def __init__(self, name: str, done: int, total: int):
        self.name, self.first, self.total = name, done, total
        self.started = self.logged = time.perf_counter()
        self.rate = 0.0

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        self.rate = (done - self.first) / max(now - self.started, 1e-9)
        if now - self.logged > LOG_EVERY_SECONDS:
            self.logged = now
            minutes = (self.total - done) / self.rate / 60
            logger.info(
                "%s: encoded %s of %s images, %.1f a second, about %.0f min left",
                self.name, f"{done:,}", f"{self.total:,}", self.rate, minutes,
            )  # fmt: skip


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted and free < wanted + FREE_SPACE_TO_LEAVE:
        raise CacheUnavailable(
            f"no room for {as_bytes(wanted)} of cached features below {folder.parent}: "
            f"{as_bytes(free)} are free, and {as_bytes(FREE_SPACE_TO_LEAVE)} are left for checkpoints"
        )


def as_bytes(count: float) -> str:
    """Return a number of bytes for people: ``4.9 KiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1000:
            return (
                f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
            )
        count /= 1024
    return f"{count:.1f} TiB"


# Locks (of the kernel: they end with their process) and eviction.


def _lock(folder: Path) -> IO[bytes]:
    """Open and share the lock of a cache, whose folder is made if need be. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    readable = path.is_file() and not os.access(path, os.W_OK)  # a cache for all to read
    file = path.open("rb" if readable else "a+b")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _try_lock(file: IO[bytes]) -> bool:
    """Make a lock exclusive, unless another process holds it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@dataclass(frozen=True)
class CacheOnDisk:
    """A cache, whole or not. ``last_used``: seconds since the epoch."""

    folder: Path
    num_bytes: int
    last_used: float


def caches_below(root: Path) -> list[CacheOnDisk]:
    """Return the caches below a folder, the least recently used first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if _KEY.fullmatch(folder.name):
            sizes = [path.stat().st_size for path in folder.iterdir()]
            lock = folder / ".lock"
            used = (lock if lock.is_file() else folder).stat().st_mtime
            found.append(CacheOnDisk(folder, sum(sizes), used))
    return sorted(found, key=lambda cache: cache.last_used)


def evict(root: Path, max_bytes: int) -> list[CacheOnDisk]:
    """Remove the least recently used caches until the rest fits into ``max_bytes``; none in use."""
    caches = caches_below(root)
    total = sum(cache.num_bytes for cache in caches)
    removed = []
    for cache in caches:
        if total <= max_bytes:
            break
        with _lock(cache.folder) as lock:
            if _try_lock(lock):
                shutil.rmtree(cache.folder, ignore_errors=True)
                removed.append(cache)
                total -= cache.num_bytes
    return removed
