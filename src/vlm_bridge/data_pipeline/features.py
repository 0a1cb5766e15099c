"""Features of a frozen encoder: computed once per image, read from disk afterwards.

::

    ROOT/KEY/features.bin       a record per image: its features, then their CRC-32
    ROOT/KEY/features.building  the same while it is written; an interrupted build continues here
    ROOT/KEY/.lock              held by the one process that builds
    ROOT/.pictures-STATE        content hash of a list of images, kept while no file is touched
    ROOT/.checked-PIL-STATE     which of them cannot be decoded

KEY hashes everything that features depend on: encoder weights, preprocessing, images, format.
A folder's time of change is that of its last use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, Protocol

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
FREE_SPACE_TO_LEAVE = 512 * 2**20
CHECKSUM_BYTES = SCALE_BYTES = 4
FeatureDtype = Literal["float16", "bfloat16", "int8", "float32"]
Encode = Callable[[Any], torch.Tensor]  # pixels -> features [B, N, D]


class CacheUnavailable(DataError):
    """There is no room or no permission for a cache; images can still be encoded in every step."""


class Features(Protocol):
    """By image index: features [B, N, D] of a cache, or pixels [B, 3, h, w] to encode."""

    def __getitem__(self, indices: np.ndarray) -> Any: ...
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
    num_images: int
    views: Views | None = None
    epoch: int = 0

    def __getitem__(self, indices: np.ndarray) -> Any:
        if self.views is None:
            return self.items[indices]
        chosen = self.views.of_epoch(self.num_images, self.epoch)
        return self.items[indices * self.views.count + chosen[indices]]

    def __len__(self) -> int:
        return self.num_images

    def in_epoch(self, epoch: int) -> SplitFeatures:
        return replace(self, epoch=epoch)


def cache_root(feature_cache: str, data_dir: str | Path) -> Path | None:
    """Return the folder of the caches that a recipe's ``feature_cache`` names; None for ``off``."""
    if feature_cache == "off":
        return None
    return Path(data_dir) / ".features" if feature_cache == "auto" else Path(feature_cache)


def cache_key(*parts: str) -> str:
    """Return the folder name of a cache from everything it depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def images_digest(paths: Sequence[ImageFile], root: Path) -> str:
    """Hash the content of images, in order. Raises DataError where one is missing.

    Args:
        root: the folder that keeps the hash while no image is touched.
    """

    def compute() -> str:
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = pool.map(lambda path: hashlib.blake2b(path.read_bytes()).hexdigest(), paths)
            return cache_key(*digests)

    return _remembered(root, ".pictures", paths, compute)


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
    """Features [N, D] of an image as bytes; `int8` has a float32 scale per token at the end."""

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
            DataError: a feature is not finite, or becomes infinite in this format.
        """
        is_int8 = self.dtype == "int8"
        stored_bnd = features_bnd.to(torch.float32 if is_int8 else getattr(torch, self.dtype))
        if not torch.isfinite(stored_bnd).all():
            is_finite = torch.isfinite(features_bnd).all()
            problem = f"do not fit into {self.dtype}" if is_finite else "are not finite numbers"
            cure = "train with feature_cache_dtype=bfloat16, or with feature_cache=off"
            raise DataError(f"features {problem}: {cure}")
        parts = to_int8(stored_bnd) if is_int8 else [stored_bnd]
        flat = [part.contiguous().flatten(1).view(torch.uint8).cpu().numpy() for part in parts]
        return np.concatenate(flat, axis=1)

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


@dataclass
class FeatureCache:
    """Features on disk: after `open`, ``cache[indices]`` is a tensor [len(indices), N, D].

    Attributes:
        name: of the images, for the log.
        num_workers: batches decoded ahead of the encoder, in threads.
        was_there: whether nothing had to be encoded.
    """

    folder: Path
    format: FeatureFormat
    pixels: Features
    encode: Encode
    name: str = "features"
    batch_images: int = 32
    num_workers: int = 0
    was_there: bool = True
    file: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder / "features.bin"
        self._building = self.folder / "features.building"
        self._stride = self.format.record_bytes + CHECKSUM_BYTES

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        records = np.empty((len(indices), self._stride), np.uint8)
        for record, index in zip(records, indices.tolist(), strict=True):
            os.preadv(self.file.fileno(), [record.data], index * self._stride)
        return self.format.unpack(records[:, :-CHECKSUM_BYTES])

    @property
    def num_bytes(self) -> int:
        return len(self) * self._stride

    def open(self, check_all: bool = False) -> FeatureCache:
        """Open the file; encode what is missing or damaged.

        Args:
            check_all: compare every checksum, not only the size.

        Raises:
            CacheUnavailable: no room, or the files cannot be written.
            DataError: an image cannot be read, or features do not fit into the format.
        """
        try:
            if not self._is_sound(check_all):
                with _lock(self.folder, self.name):
                    self.was_there = self._is_sound(check_all)
                    if not self.was_there:
                        self._build()
            self.file = self.path.open("rb")
            with contextlib.suppress(PermissionError):  # of another user
                os.utime(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._building.unlink(missing_ok=True)
            raise CacheUnavailable(f"cannot cache features in {self.folder}: {error}") from error
        finally:
            is_begun = self._building.is_file() and self._building.stat().st_size
            if not is_begun and not self.path.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def _is_sound(self, check_all: bool) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != self.num_bytes:
            return False
        with self.path.open("rb") as file:
            return not check_all or all(self._is_sound_at(file, n) for n in range(len(self)))

    def _is_sound_at(self, file: IO[bytes], number: int) -> bool:
        file.seek(number * self._stride)
        record = file.read(self._stride)
        checksum = zlib.crc32(record[:-CHECKSUM_BYTES]).to_bytes(CHECKSUM_BYTES, "little")
        return len(record) == self._stride and record[-CHECKSUM_BYTES:] == checksum

    def _build(self) -> None:
        """Encode the images behind the last sound record."""
        if self.path.is_file():
            logger.warning("%s is damaged: encoding the damaged features again", self.path)
            self.path.replace(self._building)
        with self._building.open("a+b") as file:
            first = 0
            while first < len(self) and self._is_sound_at(file, first):
                first += 1
            file.truncate(first * self._stride)
            remaining = (len(self) - first) * self._stride
            if shutil.disk_usage(self.folder).free < remaining + FREE_SPACE_TO_LEAVE:
                raise CacheUnavailable(
                    f"no room for {as_bytes(remaining)} of cached features in {self.folder}: "
                    f"{as_bytes(FREE_SPACE_TO_LEAVE)} are left for checkpoints"
                )
            size = f"{len(self) - first:,} images into {self.folder} ({as_bytes(remaining)})"
            logger.info("%s: encoding %s", self.name, size)
            batches = in_batches(range(first, len(self)), self.batch_images)
            loaded = prefetch(batches, lambda some: self.pixels[np.array(some)], self.num_workers)
            text = f"{self.name}: encoded %s of %s batches of {self.batch_images} images"
            for values in logged(loaded, len(batches), text):
                records = self.format.pack(self.encode(values))
                sums = np.array([zlib.crc32(record) for record in records], "<u4")
                file.write(np.hstack([records, sums[:, None].view(np.uint8)]).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._building.replace(self.path)


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of the process that builds; the kernel releases it with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for the process that builds %s", name, folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
