"""A cache holds what was encoded; stale, damaged and half-built ones are never used; processes share the work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlm_bridge.data_pipeline import feature_cache
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.feature_cache import (
    CacheFiles,
    CacheUnavailable,
    FeatureCache,
    OnTheFlyPixels,
    as_bytes,
    cache_key,
    caches_below,
    evict,
    lock_cache,
    measure_disk,
    measure_reading,
    open_or_build,
    pictures_digest,
    remove_unfinished,
    remove_unused,
)
from vlm_bridge.data_pipeline.feature_format import FeatureFormat
from vlm_bridge.errors import DataError, ImageError

TOKENS, DIM = 2, 3
NUM_IMAGES, SHARD_IMAGES = 22, 8
"""Three shards, the last of them shorter."""
KEYS = [f"{number:024x}" for number in range(4)]


class Numbers:
    """Pixels of no picture: those of image i are i."""

    def __init__(self, count: int = NUM_IMAGES):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).float()


class Encode:
    """An encoder that counts what it encodes; image i has features of i + token / 10."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.encoded: list[int] = []

    def __call__(self, pixels_b: torch.Tensor) -> torch.Tensor:
        self.encoded += pixels_b.int().tolist()
        return self.features(pixels_b)

    def features(self, pixels_b: torch.Tensor) -> torch.Tensor:
        tokens = torch.arange(TOKENS) / 10
        return self.scale * (pixels_b[:, None, None] + tokens[:, None]).expand(-1, TOKENS, DIM)


def files_in(root: Path, key: str = KEYS[0], dtype="float16") -> CacheFiles:
    return CacheFiles(root / key, FeatureFormat(TOKENS, DIM, dtype), NUM_IMAGES, SHARD_IMAGES)


def build(root: Path, encode=None, key: str = KEYS[0], **options) -> FeatureCache:
    return open_or_build(
        files_in(root, key), Numbers(), encode or Encode(), batch_images=3, **options
    )


def check(cache: FeatureCache) -> None:
    indices = np.random.default_rng(0).permutation(NUM_IMAGES)
    expected = Encode().features(torch.from_numpy(indices).float())
    torch.testing.assert_close(cache[indices].float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_image_is_encoded_once_and_found_again(tmp_path: Path, num_workers: int) -> None:
    encode, again = Encode(), Encode()
    done: list[tuple[int, int]] = []
    first = build(
        tmp_path, encode, num_workers=num_workers, progress=lambda *counts: done.append(counts)
    )
    assert encode.encoded == list(range(NUM_IMAGES))
    assert done[-1] == (NUM_IMAGES, NUM_IMAGES)
    check(first)
    second = build(tmp_path, again)
    assert again.encoded == []
    check(second)
    assert second[np.array([3, 0, 3])].shape == (3, TOKENS, DIM)
    assert second.index["images_per_second"] > 0


def test_another_key_is_another_cache(tmp_path: Path) -> None:
    build(tmp_path)
    other = Encode()
    build(tmp_path, other, key=KEYS[1])
    assert len(other.encoded) == NUM_IMAGES
    assert [cache.folder.name for cache in caches_below(tmp_path)] == KEYS[:2]


def test_keys_do_not_run_together() -> None:
    assert cache_key("ab", "c") != cache_key("a", "bc")
    assert cache_key("ab", "c") == cache_key("ab", "c")


# What pictures are.


@pytest.fixture
def paths(drawn_caption_folder: Path, tmp_path: Path) -> list[Path]:
    copied = shutil.copytree(drawn_caption_folder / "val", tmp_path / "pictures")
    return sorted((copied / "images").iterdir())


def test_the_digest_is_that_of_contents_in_order(tmp_path: Path, paths: list[Path]) -> None:
    digest = pictures_digest(paths, tmp_path / "one")
    moved = shutil.copytree(paths[0].parent, tmp_path / "moved")
    assert pictures_digest(sorted(moved.iterdir()), tmp_path / "two") == digest
    assert pictures_digest(paths[::-1], tmp_path / "one") != digest
    assert pictures_digest(paths[:-1], tmp_path / "one") != digest


def test_pictures_that_nobody_touched_are_not_read_again(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = pictures_digest(paths, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        assert pictures_digest(paths, tmp_path) == digest
    paths[2].write_bytes(paths[3].read_bytes())
    assert pictures_digest(paths, tmp_path) != digest


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg"):
        pictures_digest([tmp_path / "gone.jpg"], tmp_path)


def test_pixels_are_those_of_the_pictures(drawn_caption_folder: Path) -> None:
    images = CaptionFolder.open(drawn_caption_folder).split("val")
    pixels = OnTheFlyPixels(
        [image.path for image in images], lambda pictures: [p.size for p in pictures]
    )
    assert len(pixels) == len(images)
    assert pixels[np.array([1, 1, 0])] == [(64, 64)] * 3


def test_a_broken_picture_is_named_and_leaves_nothing(tmp_path: Path, paths: list[Path]) -> None:
    paths[1].write_bytes(b"\xff\xd8 not much")
    pixels = OnTheFlyPixels(paths, lambda pictures: torch.zeros(len(pictures)))
    files = CacheFiles(tmp_path / "caches" / KEYS[0], FeatureFormat(TOKENS, DIM), len(paths))
    with pytest.raises(ImageError, match=paths[1].name):
        open_or_build(files, pixels, Encode())
    assert list((tmp_path / "caches").iterdir()) == []


# Damage.


def flip_a_byte(files: CacheFiles) -> None:
    path = files.path(1)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def truncate(files: CacheFiles) -> None:
    path = files.path(1)
    path.write_bytes(path.read_bytes()[:-4])


def empty(files: CacheFiles) -> None:
    files.path(1).write_bytes(b"")


def remove(files: CacheFiles) -> None:
    files.path(1).unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, remove])
def test_a_damaged_shard_is_encoded_anew_and_no_other(tmp_path: Path, damage) -> None:
    build(tmp_path).close()
    damage(files_in(tmp_path))
    encode = Encode()
    said: list[str] = []
    check(build(tmp_path, encode, check_all=True, say=said.append))
    assert encode.encoded == list(range(SHARD_IMAGES, 2 * SHARD_IMAGES))
    assert damage is remove or "shard-00001 is damaged" in said[0]


def test_a_sample_of_every_shard_is_compared_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path).close()
    flip_a_byte(files_in(tmp_path))
    monkeypatch.setattr(feature_cache, "RECORDS_CHECKED", 300)  # of 8: all of them
    encode = Encode()
    check(build(tmp_path, encode))
    assert len(encode.encoded) == SHARD_IMAGES


@pytest.mark.parametrize("content", [None, "{", "[]", '{"layout": "another"}'])
def test_the_index_is_written_anew_without_encoding(tmp_path: Path, content: str | None) -> None:
    build(tmp_path).close()
    index = tmp_path / KEYS[0] / "index.json"
    index.unlink()
    if content is not None:
        index.write_text(content)
    encode = Encode()
    check(build(tmp_path, encode))
    assert encode.encoded == []
    assert files_in(tmp_path).read_index() is not None


def test_features_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"pictures 0 to 2 do not fit into float16.*feature_cache=off"
    ):
        build(tmp_path, Encode(scale=1e6))
    assert list(tmp_path.iterdir()) == []


# Interruption, several processes.


class StopAt(Encode):
    """Raises, or kills its process, at an image."""

    def __init__(self, image: int, signal_number: int | None = None):
        super().__init__()
        self.image, self.signal_number = image, signal_number

    def __call__(self, pixels_b: torch.Tensor) -> torch.Tensor:
        if self.image in pixels_b.int().tolist():
            if self.signal_number is not None:
                os.kill(os.getpid(), self.signal_number)
            raise KeyboardInterrupt
        return super().__call__(pixels_b)


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_an_interrupted_build_keeps_its_finished_shards(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, StopAt(SHARD_IMAGES + 1))
    names = {path.name for path in (tmp_path / KEYS[0]).iterdir()}
    assert names == {".lock", "shard-00000"}
    encode = Encode()
    check(build(tmp_path, encode))
    assert encode.encoded == list(range(SHARD_IMAGES, NUM_IMAGES))


def test_nothing_is_left_of_a_build_without_a_finished_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, StopAt(0))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    process = start(build, tmp_path, StopAt(SHARD_IMAGES + 4, signal.SIGKILL))
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / KEYS[0]
    assert (folder / ".building-00001").exists()
    encode = Encode()
    check(build(tmp_path, encode))
    assert encode.encoded == list(range(SHARD_IMAGES, NUM_IMAGES))
    assert not list(folder.glob(".building-*"))


def test_what_killed_processes_left_in_other_caches_goes_too_and_what_is_locked_stays(
    tmp_path: Path,
) -> None:
    """Shards lie in their cache; text states are built in whole folders beside theirs."""
    process = start(build, tmp_path, StopAt(SHARD_IMAGES + 4, signal.SIGKILL))
    process.join(30)
    shard = tmp_path / KEYS[0] / ".building-00001"
    folder, locked = (tmp_path / "text" / f".building-{name}" for name in ("a-host-1", "b-host-2"))
    for path in (folder, locked):
        path.mkdir(parents=True)
        (path / "states").write_bytes(b"half")
    assert shard.exists()
    with lock_cache(locked):
        build(tmp_path, key=KEYS[1]).close()
        assert not shard.exists()
        assert not folder.exists()
        assert (locked / "states").exists()
    remove_unfinished(tmp_path)
    assert not locked.exists()
    assert [path.name for path in (tmp_path / KEYS[0]).iterdir() if "shard" in path.name] == [
        "shard-00000"
    ]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 bytes"), (5_000, "4.9 KiB"), (512 * 2**20, "512 MiB"), (3 * 2**40, "3.0 TiB")],
)
def test_bytes_have_the_unit_that_fits(count: int, shown: str) -> None:
    assert as_bytes(count) == shown


class Slow(Encode):
    """Takes its time, and writes down what it encoded."""

    def __init__(self, log: Path):
        super().__init__()
        self.log = log

    def __call__(self, pixels_b: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        with self.log.open("a") as file:
            file.write("".join(f"{i}\n" for i in pixels_b.int().tolist()))
        return super().__call__(pixels_b)


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "WAIT_SECONDS", 0.01)
    logs = [tmp_path / f"log-{number}" for number in range(3)]
    processes = [start(build, tmp_path, Slow(log)) for log in logs[1:]]
    check(build(tmp_path, Slow(logs[0])))
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    encoded = [int(line) for log in logs if log.exists() for line in log.read_text().split()]
    assert sorted(encoded) == list(range(NUM_IMAGES))
    names = {path.name for path in (tmp_path / KEYS[0]).iterdir()}
    assert names == {".lock", "index.json", "shard-00000", "shard-00001", "shard-00002"}


# Room.


def test_without_room_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        CacheUnavailable, match=r"no room for .* 1000 bytes|1.0 KiB are free, and 512 MiB are left"
    ):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_cache_opens_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path).close()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    check(build(tmp_path))


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronised = []

    def full(descriptor: int) -> None:
        synchronised.append(descriptor)
        if len(synchronised) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheUnavailable, match="No space left on device"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CacheUnavailable, match="taken"):
        build(tmp_path / "taken")


# Eviction.


def used_at(root: Path, key: str, seconds: int) -> int:
    """Build a cache that was last used at a time; its bytes."""
    build(root, key=key).close()
    os.utime(root / key / ".lock", (seconds, seconds))
    return next(cache.num_bytes for cache in caches_below(root) if cache.folder.name == key)


def keys_in(root: Path) -> list[str]:
    return [cache.folder.name for cache in caches_below(root)]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    size = max(
        used_at(tmp_path, key, when) for key, when in zip(KEYS, (30, 10, 40, 20), strict=True)
    )
    assert keys_in(tmp_path) == [KEYS[1], KEYS[3], KEYS[0], KEYS[2]]
    removed = evict(tmp_path, 2 * size)
    assert [cache.folder.name for cache in removed] == [KEYS[1], KEYS[3]]
    assert keys_in(tmp_path) == [KEYS[0], KEYS[2]]
    assert evict(tmp_path, 2 * size) == []


def test_opening_is_use(tmp_path: Path) -> None:
    for key, when in zip(KEYS, (10, 20), strict=False):
        used_at(tmp_path, key, when)
    build(tmp_path, key=KEYS[0]).close()
    assert keys_in(tmp_path) == [KEYS[1], KEYS[0]]


def test_a_cache_in_use_stays(tmp_path: Path) -> None:
    in_use = build(tmp_path)
    used_at(tmp_path, KEYS[1], 10)
    assert [cache.folder.name for cache in evict(tmp_path, 0)] == [KEYS[1]]
    check(in_use)
    in_use.close()
    evict(tmp_path, 0)
    assert keys_in(tmp_path) == []


def test_a_cache_that_is_being_built_stays(tmp_path: Path) -> None:
    kept = []

    def encode(pixels_b: torch.Tensor) -> torch.Tensor:
        kept.append(not remove_unused(tmp_path / KEYS[0]))
        return Encode()(pixels_b)

    check(build(tmp_path, encode))
    assert all(kept)


def test_caches_of_the_first_layout_can_be_evicted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / KEYS[0]).mkdir()
    (tmp_path / KEYS[0] / "features.npy").write_bytes(bytes(100))
    (tmp_path / "photographs").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    evict(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "photographs"]
    assert evict(tmp_path / "nowhere", 0) == []


# Measuring.


def test_reading_is_measured_in_images(tmp_path: Path) -> None:
    cache = build(tmp_path)
    assert measure_reading(cache.__getitem__, len(cache)) > 0
    read: list[int] = []
    measure_reading(lambda indices: read.extend(indices), 1000)
    assert len(set(read)) == len(read) == 256


def test_measuring_a_disk_leaves_nothing(tmp_path: Path) -> None:
    assert measure_disk(files_in(tmp_path)) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CacheUnavailable, match="taken"):
        measure_disk(files_in(tmp_path / "taken"))
