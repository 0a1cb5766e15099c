"""Features of a frozen encoder: computed once per image, read from disk afterwards.

::

    ROOT/KEY/features.bin       a record per image: its features, then their CRC-32
    ROOT/KEY/features.building  the same while it is written; an interrupted build continues here
    ROOT/KEY/.lock              held by the one process that builds
    ROOT/.hash-STATE            content hash of a list of images, kept while no file is touched
    ROOT/.checked-PIL-STATE     which of them cannot be decoded

KEY hashes everything that features depend on: encoder weights, preprocessing, images, format.
A folder's time of change is that of its last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from vlm_bridge.data_pipeline.images import check_image, open_image
from vlm_bridge.data_pipeline.loader import in_batches, logged, prefetch
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import DataError, ImageError
from vlm_bridge.files import write_atomically

logger = logging.getLogger(__name__)

LAYOUT = "vlm-bridge features 3"
FREE_SPACE_TO_LEAVE = 512 * 2**20  # for checkpoints
FeatureDtype = Literal["float16", "bfloat16", "int8", "float32"]
OTHERWISE = " (choose feature_cache=FOLDER elsewhere, or feature_cache=off)"


class Features(Protocol):
    """By image index: features [B, N, D] of a cache, or pixels [B, 3, h, w] to encode."""

    def __getitem__(self, indices: np.ndarray, /) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Views:
    """Random crops of every image, half of them mirrored; fixed by (seed, image, view).

    Mirrored images contradict captions that name left or right.
    """

    count: int
    seed: int

    AREA: ClassVar = (0.5, 1.0)  # as in BLIP's training (Li et al. 2022)
    ASPECT: ClassVar = (3 / 4, 4 / 3)  # width over height (Szegedy et al. 2015)

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


@dataclass(frozen=True)
class OnTheFlyPixels:
    """Images opened when they are needed: ``[indices]`` gives encoder input [B, 3, h, w].

    With ``views``, index i is view i % count of image i // count.
    """

    paths: Sequence[ImageFile]
    preprocess: Callable[[list[Image.Image]], Any]
    views: Views | None = None

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
    views: Views | None = None
    epoch: int = 0

    def __getitem__(self, indices: np.ndarray) -> Any:
        if self.views is not None:
            chosen = self.views.of_epoch(len(self), self.epoch)
            indices = indices * self.views.count + chosen[indices]
        return self.items[indices]

    def __len__(self) -> int:
        return len(self.items) // (self.views.count if self.views else 1)

    def in_epoch(self, epoch: int) -> SplitFeatures:
        return replace(self, epoch=epoch)


def cache_root(feature_cache: str, data_dir: str | Path) -> Path | None:
    """Return the folder of the caches that a recipe's ``feature_cache`` names; None for ``off``."""
    if feature_cache == "off":
        return None
    return Path(data_dir) / ".features" if feature_cache == "auto" else Path(feature_cache)


def cache_key(*parts: str) -> str:
    """Return the folder name of a cache from everything it depends on."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def images_digest(paths: Sequence[ImageFile], root: Path) -> str:
    """Hash the content of images, in order; ``root`` keeps the hash while none is touched."""

    def hash_of(path: ImageFile) -> str:
        return hashlib.blake2b(path.read_bytes()).hexdigest()

    return _remembered(root, ".hash", paths, lambda: cache_key(*prefetch(paths, hash_of, 4)))


def check_images(paths: Sequence[ImageFile], remember_in: Path | None = None) -> dict[int, str]:
    """Decode every image, in threads; return why some cannot be, by index.

    Args:
        remember_in: the folder that keeps the outcome while no image is touched.
    """

    def problem_of(path: ImageFile) -> str:
        try:
            check_image(path)
        except ImageError as error:
            return error.reason
        return ""

    def check() -> str:
        # Pillow releases the interpreter lock while it decodes.
        problems = prefetch(paths, problem_of, min(16, os.cpu_count() or 1))
        checked = enumerate(logged(problems, len(paths), "checked %s of %s images"))
        return json.dumps([(index, problem) for index, problem in checked if problem])

    name = f".checked-{PIL.__version__}"
    return dict(json.loads(_remembered(remember_in, name, paths, check)))


def _remembered(
    folder: Path | None, name: str, paths: Sequence[ImageFile], compute: Callable[[], str]
) -> str:
    """Return what ``compute`` finds in images; a file keeps it while none of them is touched."""
    if folder is None:
        return compute()
    state = hashlib.blake2b(digest_size=12)
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise DataError(f"image {path} is missing: make the data folder again") from None
        line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"
        state.update(line.encode(errors="surrogateescape"))
    place = folder / f"{name}-{state.hexdigest()}"
    with contextlib.suppress(OSError, ValueError):
        return place.read_text()
    text = compute()
    with contextlib.suppress(OSError):  # a read-only folder
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text.encode())
    return text


def to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row symmetrically (LLM.int8(), Dettmers et al. 2022).

    Values are [..., D] and finite.

    Returns:
        Levels [..., D] in int8 and scales [..., 1] in float32; the product is off by half a scale.
    """
    values = values.float()
    scales = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales).round().to(torch.int8), scales


@dataclass(frozen=True)
class FeatureFormat:
    """Features [N, D] of an image as a record with a checksum; `int8` has a scale per token."""

    num_tokens: int
    dim: int
    dtype: FeatureDtype = "float16"

    @cached_property
    def record(self) -> np.dtype:
        num_bytes = self.dim * getattr(torch, self.dtype).itemsize
        features = ("features", "u1", (self.num_tokens, num_bytes))
        scales = ("scales", "<f4", (self.num_tokens, int(self.dtype == "int8")))
        return np.dtype([features, scales, ("checksum", "<u4")])

    def pack(self, features_bnd: torch.Tensor) -> np.ndarray:
        """Features [B, N, D] -> records [B].

        Raises:
            DataError: a feature is not finite, or becomes infinite in this format.
        """
        records, features_bnd = np.empty(len(features_bnd), self.record), features_bnd.cpu()
        if self.dtype == "int8":
            stored_bnd, scales_bn1 = to_int8(features_bnd)
            records["scales"] = scales_bn1.numpy()
        else:
            features_bnd = stored_bnd = features_bnd.to(getattr(torch, self.dtype))
        if not torch.isfinite(features_bnd).all():
            raise DataError(
                f"features are not finite in {self.dtype}: train with "
                "feature_cache_dtype=bfloat16, or with feature_cache=off"
            )
        records["features"] = stored_bnd.contiguous().view(torch.uint8).numpy()
        records["checksum"] = [_checksum(record) for record in records]
        return records

    def unpack(self, records: np.ndarray) -> torch.Tensor:
        """Records [B] -> features [B, N, D]; those of `int8` in float32."""
        stored_bnx = torch.from_numpy(np.ascontiguousarray(records["features"]))
        stored_bnd = stored_bnx.view(getattr(torch, self.dtype))
        if self.dtype != "int8":
            return stored_bnd
        return torch.from_numpy(stored_bnd.numpy() * records["scales"])


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[:-4])


@dataclass
class FeatureCache:
    """Features on disk: after `open`, ``cache[indices]`` is a tensor [len(indices), N, D].

    Attributes:
        encode: pixels -> features [B, N, D].
        name: of the images, for the log.
        num_workers: batches decoded ahead of the encoder, in threads.
        was_there: whether nothing had to be encoded.
    """

    folder: Path
    format: FeatureFormat
    pixels: Features
    encode: Callable[[Any], torch.Tensor]
    name: str = "features"
    batch_images: int = 32
    num_workers: int = 0
    was_there: bool = True
    records: np.ndarray = field(init=False)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return self.format.unpack(self.records[indices])

    @property
    def num_bytes(self) -> int:
        return len(self) * self.format.record.itemsize

    def open(self, check_all: bool = False) -> FeatureCache:
        """Open the file; encode what is missing or damaged.

        Args:
            check_all: compare every checksum, not only the size.

        Raises:
            DataError: no room, the files cannot be written, an image cannot be read, or features
                do not fit into the format.
        """
        path = self.folder / "features.bin"
        try:
            if not self._is_sound(path, check_all):
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / ".lock").open("ab") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # wait for another process that builds
                    self.was_there = self._is_sound(path, check_all)
                    if not self.was_there:
                        self._build(path)
            self.records = self._records(path)
            with contextlib.suppress(PermissionError):  # of another user
                os.utime(self.folder)
        except OSError as error:
            problem = f"cannot cache features in {self.folder}: {error}"
            raise DataError(problem + OTHERWISE) from error
        return self

    def _records(self, path: Path) -> np.ndarray:
        """Map the whole records of a file, which may be unfinished or missing."""
        count = path.stat().st_size // self.format.record.itemsize if path.is_file() else 0
        if count == 0:
            return np.empty(0, self.format.record)
        return np.memmap(path, self.format.record, "r", shape=(count,))

    def _is_sound(self, path: Path, check_all: bool) -> bool:
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        return not check_all or self._num_sound(path) == len(self)

    def _num_sound(self, path: Path) -> int:
        """Count the records before the first one that is damaged or missing."""
        records = self._records(path)[: len(self)]
        damaged = (n for n, r in enumerate(records) if _checksum(r) != r["checksum"])
        return next(damaged, len(records))

    def _build(self, path: Path) -> None:
        """Encode the images behind the last sound record."""
        building = path.with_suffix(".building")
        if path.is_file():
            logger.warning("%s is damaged: encoding what is damaged again", path)
            path.replace(building)
        first, stride = self._num_sound(building), self.format.record.itemsize
        num_bytes = (len(self) - first) * stride
        if shutil.disk_usage(self.folder).free < num_bytes + FREE_SPACE_TO_LEAVE:
            raise DataError(
                f"no room for {as_bytes(num_bytes)} of cached features in {self.folder}: "
                f"{as_bytes(FREE_SPACE_TO_LEAVE)} are left for checkpoints{OTHERWISE}"
            )
        size = f"{len(self) - first:,} images into {self.folder} ({as_bytes(num_bytes)})"
        logger.info("%s: encoding %s", self.name, size)
        batches = in_batches(range(first, len(self)), self.batch_images)
        loaded = prefetch(batches, lambda some: self.pixels[np.array(some)], self.num_workers)
        text = f"{self.name}: encoded %s of %s batches of {self.batch_images} images"
        with building.open("ab") as file:
            file.truncate(first * stride)
            for values in logged(loaded, len(batches), text):
                file.write(self.format.pack(self.encode(values)).tobytes())
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)


def as_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def caches_below(root: Path) -> dict[Path, int]:
    """Return the bytes of each cache below a folder, the least recently used first."""
    folders = [path for path in root.glob("*") if re.fullmatch("[0-9a-f]{24}", path.name)]
    folders.sort(key=lambda folder: folder.stat().st_mtime)
    return {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in folders}


def evict(root: Path, max_bytes: int) -> dict[Path, int]:
    """Remove the least recently used caches until the rest fits into ``max_bytes``.

    A process may still read one: its file lives until it is closed.
    """
    caches, removed = caches_below(root), {}
    while caches and sum(caches.values()) > max_bytes:
        folder = next(iter(caches))
        removed[folder] = caches.pop(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return removed
