"""Features of frozen encoders, computed once per image and memory-mapped afterwards.

::

    ROOT/KEY/shard-00000      records of 2,048 images (`FeatureFormat`), then the CRC-32 of each record
    ROOT/KEY/index.json       what the shards hold and how quickly they were made; written last
    ROOT/KEY/.building-00000  a shard under way, locked by the process that writes it
    ROOT/KEY/.lock            shared by all who read or build; its time is that of the last use
    ROOT/.pictures-DIGEST     the content hash of a list of pictures, which saves reading them all at every start

KEY is a hash over everything that features depend on (encoder weights, preprocessing, the pictures, the format).
Another encoder or other pictures have another key: a stale or foreign cache is never found, let alone used.

Any number of processes may build one cache; they share it shard by shard. Locks are the kernel's (`flock`) and end
with their process, so there are no stale ones: what a killed process left is overwritten by the next. A shard has
its name only when it is whole, on disk and read back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image

from vlm_bridge.data_pipeline.augmentation import Views
from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.data_pipeline.feature_format import FeatureFormat
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import in_batches, prefetch
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.durable_files import bring_to_disk, not_as_written, take_name
from vlm_bridge.errors import DataError

LAYOUT = "vlm-bridge features 2"
INDEX_NAME, LOCK_NAME = "index.json", ".lock"
BUILDING = ".building-"
"""Begins the names of unfinished shards and folders."""
SHARD_IMAGES = 2048
ENCODE_BATCH = 32
"""Images encoded together where nobody says otherwise."""
RECORDS_CHECKED = 1
"""Records of each shard, chosen at random, whose checksums are compared when a cache is opened."""
FREE_SPACE_TO_LEAVE = 512 * 2**20
WAIT_SECONDS = 0.5
"""Between two looks at shards that another process is writing."""
CHECKSUM_BYTES = 4
_KEY = re.compile(r"[0-9a-f]{24}")

Say = Callable[[str], None]


class CacheUnavailable(DataError):
    """There can be no cache, and why; pictures can still be encoded as they are needed."""


class Pixels(Protocol):
    """What there is to encode, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Any:
        """Encoder input [len(indices), 3, h, w]; ImageError where a picture cannot be read."""
        ...


class OnTheFlyPixels:
    """Pictures as the encoder wants them: ``[indices]`` opens them and gives pixels [len(indices), 3, h, w].

    With ``views``, index i is view i % count of picture i // count.
    """

    def __init__(
        self,
        paths: Sequence[PictureFile],
        preprocess: Callable[[list[Image.Image]], Any],
        views: Views | None = None,
    ):
        self.paths = paths
        self.preprocess = preprocess
        self.views = views

    def __len__(self) -> int:
        return len(self.paths) * (self.views.count if self.views else 1)

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.preprocess([self._picture(int(index)) for index in indices])

    def _picture(self, index: int) -> Image.Image:
        if self.views is None:
            return open_image(self.paths[index])
        picture, view = divmod(index, self.views.count)
        return self.views.view(open_image(self.paths[picture]), picture, view)


# What a cache depends on.


def cache_key(*parts: str) -> str:
    """Folder name of a cache from all that it depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def pictures_digest(paths: Sequence[PictureFile], root: Path) -> str:
    """Hash over the content of picture files, in order; ``root`` remembers it while none of them is touched.

    Raises:
        DataError: a picture is missing.
    """
    seen = hashlib.blake2b(digest_size=12)
    try:
        for path in paths:
            status = path.stat()
            seen.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        remembered = root / f".pictures-{seen.hexdigest()}"
        with contextlib.suppress(OSError):
            return remembered.read_text(encoding="ascii")
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(
                pool.map(lambda path: hashlib.blake2b(path.read_bytes()).hexdigest(), paths)
            )
    except FileNotFoundError as error:
        raise DataError(
            f"picture {error.filename} is missing; make the caption folder again"
        ) from None
    content = cache_key(*digests)
    with contextlib.suppress(OSError):  # a read-only folder remembers nothing
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(remembered, content.encode())
    return content


# The files of one cache.


class MappedRecords:
    """The first records of a file, mapped into memory: ``records[places]`` is an array [len(places), record bytes]."""

    def __init__(self, path: Path, count: int, record_bytes: int):
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._records = np.frombuffer(self._map, np.uint8, count * record_bytes).reshape(
            count, record_bytes
        )

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        # Announced, the records come from the disk side by side, each in one piece; else page fault by page fault.
        record_bytes = self._records.shape[1]
        for place in places.tolist():
            start = place * record_bytes
            before = start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start - before, before + record_bytes)
        return self._records[places]


@dataclass(frozen=True)
class CacheFiles:
    """Where the features of ``num_images`` images lie; the folder's name is their key."""

    folder: Path
    format: FeatureFormat
    num_images: int
    shard_images: int = SHARD_IMAGES

    @property
    def num_bytes(self) -> int:
        return self.num_images * (self.format.record_bytes + CHECKSUM_BYTES)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_images)

    def images_of(self, shard: int) -> range:
        return range(
            shard * self.shard_images, min((shard + 1) * self.shard_images, self.num_images)
        )

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}"

    def missing(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self.path(shard).is_file()]

    def map(self, shard: int) -> MappedRecords:
        """The records of a shard, mapped into memory."""
        return MappedRecords(self.path(shard), len(self.images_of(shard)), self.format.record_bytes)

    def damage(
        self, shard: int, *, check_all: bool = False, path: Path | None = None
    ) -> str | None:
        """What is wrong with a shard that is there, if anything: its size, or the checksum of a record.

        Args:
            check_all: compare every record, not only ``RECORDS_CHECKED`` at random.
            path: where it is, if it has not got its name yet.
        """
        count, path = len(self.images_of(shard)), path or self.path(shard)
        wanted = count * (self.format.record_bytes + CHECKSUM_BYTES)
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != wanted:
                return f"it has {size} bytes, not {wanted}"
            file.seek(-count * CHECKSUM_BYTES, os.SEEK_END)
            checksums = np.frombuffer(file.read(), "<u4")
            sample = np.random.default_rng().integers(count, size=RECORDS_CHECKED)
            for record in range(count) if check_all else sample.tolist():
                file.seek(record * self.format.record_bytes)
                if zlib.crc32(file.read(self.format.record_bytes)) != checksums[record]:
                    return f"the checksum of its image {record} is wrong"
        return None

    def read_index(self) -> dict[str, Any] | None:
        """What was written when the cache was made; None while it is unfinished or where it is unreadable."""
        try:
            index = json.loads((self.folder / INDEX_NAME).read_bytes())
        except (OSError, ValueError):
            return None
        return index if isinstance(index, dict) and index.get("layout") == LAYOUT else None

    def write_index(self, facts: dict[str, Any]) -> None:
        own = {
            "layout": LAYOUT,
            "images": self.num_images,
            "shape": [self.format.num_tokens, self.format.dim],
            "dtype": self.format.dtype,
            "shard_images": self.shard_images,
        }
        write_atomically(self.folder / INDEX_NAME, json.dumps(own | facts, indent=2).encode())


class FeatureCache:
    """The features of a cache that is whole: ``cache[indices]`` is a tensor [len(indices), N, D].

    While it lives it holds the cache's lock, so that no eviction takes the files away.
    """

    def __init__(self, files: CacheFiles, lock: IO[bytes]):
        self.files = files
        self.index = files.read_index() or {}
        self._lock = lock
        self._shards = [files.map(shard) for shard in range(files.num_shards)]

    def __len__(self) -> int:
        return self.files.num_images

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        shards, places = np.divmod(indices, self.files.shard_images)
        records = np.empty((len(indices), self.files.format.record_bytes), np.uint8)
        for shard in np.unique(shards):
            chosen = shards == shard
            records[chosen] = self._shards[shard][places[chosen]]
        return self.files.format.unpack(records)

    def close(self) -> None:
        """Let go of the files."""
        self._shards.clear()
        self._lock.close()


# Opening and building.


def open_or_build(
    files: CacheFiles,
    pixels: Pixels,
    encode: Callable[[Any], torch.Tensor],
    *,
    facts: dict[str, Any] | None = None,
    batch_images: int = ENCODE_BATCH,
    num_workers: int = 0,
    check_all: bool = False,
    progress: Callable[[int, int], None] = lambda done, encoded: None,
    say: Say = lambda line: None,
) -> FeatureCache:
    """Open a cache; encode what is missing or damaged of it, together with any other process that does.

    Decoding runs in threads: Pillow and NumPy let go of the interpreter while they decode, resize and convert, so that
    they measure no slower than processes (`benchmarks.features`), and they start at once.

    Args:
        encode: pixels -> features [B, N, D].
        facts: about the cache, for its index.
        num_workers: batches that are decoded ahead of the encoder.
        check_all: compare the checksum of every record, not of a few.
        progress: called with the number of images that are there, and how many of them this call encoded.
        say: told what is damaged, and who is waited for.

    Raises:
        CacheUnavailable: no room, or the files cannot be written. What was finished stays, unless the disk is full.
        ImageError: a picture cannot be read.
        DataError: features do not fit into the format.
    """
    try:
        lock = lock_cache(files.folder)
        _touch(files.folder / LOCK_NAME)
        remove_unfinished(files.folder.parent)
        missing = files.missing()
        damaged = {
            shard: reason
            for shard in range(files.num_shards)
            if shard not in missing and (reason := files.damage(shard, check_all=check_all))
        }
    except OSError as error:
        raise _unavailable(files.folder, error) from error
    try:
        for shard, reason in damaged.items():
            say(f"{files.path(shard)} is damaged ({reason}): it is encoded again")
            files.path(shard).unlink(missing_ok=True)
        if missing or damaged or files.read_index() is None:
            _check_room(files)
            encoded, seconds = _build_missing(
                files, pixels, encode, batch_images, num_workers, progress, say
            )
            speed = {"images_per_second": round(encoded / seconds, 2)} if encoded else {}
            files.write_index({**(facts or {}), **speed})
        return FeatureCache(files, lock)
    except OSError as error:
        lock.close()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remove_unused(files.folder)  # checkpoints need the room
        raise _unavailable(files.folder, error) from error
    except BaseException:
        lock.close()
        _tidy(files.folder)
        raise


def _build_missing(
    files: CacheFiles,
    pixels: Pixels,
    encode: Callable[[Any], torch.Tensor],
    batch_images: int,
    num_workers: int,
    progress: Callable[[int, int], None],
    say: Say,
) -> tuple[int, float]:
    """Write shards until none is missing; how many images this process encoded, in how many seconds."""
    encoded, seconds, is_waiting = 0, 0.0, False
    while missing := files.missing():
        num_taken = 0
        for shard in missing:
            there = files.num_images - sum(len(files.images_of(other)) for other in files.missing())
            with _claimed(files, shard) as file:
                if file is None:
                    continue
                started = time.perf_counter()
                _write_shard(
                    files,
                    shard,
                    file,
                    pixels,
                    encode,
                    batch_images,
                    num_workers,
                    lambda done, there=there, before=encoded: progress(there + done, before + done),
                )
                seconds += time.perf_counter() - started
            num_taken += 1
            encoded += len(files.images_of(shard))
        if not num_taken:
            if not is_waiting:
                say(f"waiting for another process, which encodes the rest of {files.folder}")
                is_waiting = True
            time.sleep(WAIT_SECONDS)
    return encoded, seconds


@contextlib.contextmanager
def _claimed(files: CacheFiles, shard: int) -> Iterator[IO[bytes] | None]:
    """The file to write a shard to, under a lock; None where another process is writing or has written it."""
    building = files.folder / f"{BUILDING}{shard:05}"
    file = _lock(building)
    if file is None:
        yield None
        return
    with file:
        try:
            if files.path(shard).is_file():
                yield None
            else:
                file.truncate(0)  # what a killed process left
                yield file
        finally:
            building.unlink(missing_ok=True)


def _write_shard(
    files: CacheFiles,
    shard: int,
    file: IO[bytes],
    pixels: Pixels,
    encode: Callable[[Any], torch.Tensor],
    batch_images: int,
    num_workers: int,
    progress: Callable[[int], None],
) -> None:
    """Encode the images of a shard into a file; at the end it gets its name."""
    checksums: list[int] = []

    def write(records: np.ndarray) -> None:
        file.write(records.tobytes())
        checksums.extend(map(zlib.crc32, records))

    batches = in_batches(files.images_of(shard), batch_images)
    loaded = prefetch(batches, lambda indices: pixels[np.array(indices)], num_workers)
    with ThreadPoolExecutor(
        max_workers=1
    ) as writer:  # writes a batch while the next one is encoded
        written: list[Future[None]] = []
        for indices, batch in zip(batches, loaded, strict=True):
            try:
                records = files.format.pack(encode(batch))
            except OverflowError as error:
                raise DataError(
                    f"the features of pictures {indices[0]} to {indices[-1]} {error}: "
                    "train with feature_cache_dtype=bfloat16, or with feature_cache=off"
                ) from None
            if written:
                written.pop().result()
            written.append(writer.submit(write, records))
            progress(indices[-1] + 1 - batches[0][0])
        written.pop().result()
    file.write(np.array(checksums, "<u4").tobytes())
    bring_to_disk(file)
    building = Path(file.name)
    if files.damage(shard, check_all=True, path=building):
        raise not_as_written(files.path(shard))
    take_name(building, files.path(shard))


def _check_room(files: CacheFiles) -> None:
    """Raise CacheUnavailable where the disk has no room for what is missing."""
    missing = sum(len(files.images_of(shard)) for shard in files.missing())
    wanted = missing * (files.format.record_bytes + CHECKSUM_BYTES)
    free = shutil.disk_usage(files.folder).free
    if wanted and free < wanted + FREE_SPACE_TO_LEAVE:
        raise CacheUnavailable(
            f"no room for {as_bytes(wanted)} of cached features below {files.folder.parent}: {as_bytes(free)} are "
            f"free, and {as_bytes(FREE_SPACE_TO_LEAVE)} are left for checkpoints"
        )


def as_bytes(count: int) -> str:
    """A number of bytes for people, in the unit in which it has one to three digits before the point."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"


def _unavailable(folder: Path, error: OSError) -> CacheUnavailable:
    return CacheUnavailable(f"cannot cache features in {folder}: {error.strerror or error}")


# How quickly features can be read.


def measure_reading(
    read: Callable[[np.ndarray], object], count: int, seconds: float = 0.5
) -> float:
    """Images a second that ``read`` gives, in batches of 8 of at most 256 random images out of ``count``."""
    chosen = np.random.default_rng().permutation(count)[:256]
    started, done = time.perf_counter(), 0
    for batch in in_batches(chosen.tolist(), 8):
        read(np.array(batch))
        done += len(batch)
        if time.perf_counter() - started > seconds:
            break
    return done / (time.perf_counter() - started)


def measure_disk(files: CacheFiles, max_bytes: int = 32 * 2**20) -> float:
    """Images a second that could be read from the disk of a cache that is not there yet.

    Some records are written, put out of the system's memory and read as a cache's are.

    Raises:
        CacheUnavailable: the disk cannot be written.
    """
    count = max(1, min(64, files.num_images, max_bytes // files.format.record_bytes))
    records = np.random.default_rng().integers(
        0, 256, size=(count, files.format.record_bytes), dtype=np.uint8
    )
    probe = files.folder.parent / f".probe-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = MappedRecords(probe, *records.shape)
        return measure_reading(lambda indices: files.format.unpack(mapped[indices]), count)
    except OSError as error:
        raise _unavailable(files.folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


# Eviction.


@dataclass(frozen=True)
class CacheOnDisk:
    """A cache, whole or not: its bytes, and when it was last used (seconds since the epoch)."""

    folder: Path
    num_bytes: int
    last_used: float


def caches_below(root: Path) -> list[CacheOnDisk]:
    """The caches below a folder, the least recently used first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not _KEY.fullmatch(folder.name):
            continue
        statuses = [(path.name, path.stat()) for path in folder.iterdir()]
        used = [s.st_mtime for name, s in statuses if name == LOCK_NAME] or [folder.stat().st_mtime]
        found.append(CacheOnDisk(folder, sum(s.st_size for _, s in statuses), used[0]))
    return sorted(found, key=lambda cache: cache.last_used)


def evict(root: Path, max_bytes: int) -> list[CacheOnDisk]:
    """Remove the least recently used caches below ``root`` until they fit into ``max_bytes``; none that is in use.

    Returns:
        What was removed.
    """
    caches = caches_below(root)
    total = sum(cache.num_bytes for cache in caches)
    removed = []
    for cache in caches:
        if total > max_bytes and remove_unused(cache.folder):
            removed.append(cache)
            total -= cache.num_bytes
    return removed


def remove_unused(folder: Path) -> bool:
    """Remove a cache unless a process reads or builds it."""
    lock = _lock(folder / LOCK_NAME)
    if lock is None:
        return False
    with lock:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def remove_unfinished(root: Path) -> None:
    """Remove what killed processes left half-built below ``root``: shards of any cache, and whole folders.

    Those that a living process builds are locked, and stay.
    """
    for left in (*root.glob(f"{BUILDING}*"), *root.glob(f"*/{BUILDING}*")):
        with contextlib.suppress(OSError):  # not ours, or gone meanwhile
            if left.is_dir():
                remove_unused(left)
            elif (lock := _lock(left)) is not None:
                with lock:
                    left.unlink(missing_ok=True)


def lock_cache(folder: Path) -> IO[bytes]:
    """Hold a folder, made if need be, against `remove_unused` until the file returned is closed. Raises OSError."""
    lock = _lock(folder / LOCK_NAME, shared=True)
    assert lock is not None, "a shared lock waits"
    return lock


def _tidy(folder: Path) -> None:
    """Remove the folder of a cache that nobody finished a shard of."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK_NAME}:
            remove_unused(folder)


# Locks.


def _lock(path: Path, *, shared: bool = False) -> IO[bytes] | None:
    """The file at ``path``, made if need be and locked until it is closed; None while another holds it.

    A shared lock waits: who holds the other kind is removing the cache and will soon be done.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except FileNotFoundError:  # the folder was removed in between
            continue
        except OSError:
            if not (shared and path.is_file()):
                raise
            file = path.open("rb")  # a cache that others made for all to read
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        # Whoever held the lock may have removed or renamed the file: then this lock says nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # not ours
        os.utime(path)
