"""The feature cache: how quickly pictures are decoded, encoded and cached, and how quickly features come back.

    python -m benchmarks.features [--images 512] [--data-dir data/flickr8k] [--json FILE]

Encoding in batches of several sizes; decoding in threads and in processes; whole builds; reading the cache in every
format, from the system's memory and from the disk, against encoding on the fly; and opening a cache of 100,000 images.
Pictures are those of a caption folder, or drawn in the size of Flickr's. ``--cache-dir`` names the disk to measure.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, BitImageProcessorPil, Dinov2Config

from benchmarks.harness import Report, Variant, argument_parser, measure, prepare
from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.feature_cache import (
    CacheFiles,
    FeatureCache,
    OnTheFlyPixels,
    open_or_build,
)
from vlm_bridge.data_pipeline.feature_format import FeatureDtype, FeatureFormat
from vlm_bridge.data_pipeline.loader import in_batches, prefetch
from vlm_bridge.model_architecture.vision_encoder import (
    HuggingFaceVisionEncoder,
    build_vision_encoder,
)
from vlm_bridge.model_architecture.weights import known_architecture
from vlm_bridge.training_strategy.features import ENCODE_BATCH, ENCODE_BATCH_ELSEWHERE

ENCODE_BATCHES = {"cpu": (8, 32, 128), "cuda": (32, 128, 256, 512)}
STEP_IMAGES = 8
"""Images that a training step reads."""
LARGE_CACHE = 100_000
PICTURE_SIZE = (500, 375)
TINY_PICTURE_SIZE = (80, 60)


@dataclass(frozen=True)
class Work:
    """What all variants work on: an encoder, pictures, and a folder for caches."""

    encoder: Any
    paths: list[Path]
    root: Path
    device: torch.device
    workers: int
    batch: int

    @property
    def pixels(self) -> OnTheFlyPixels:
        return OnTheFlyPixels(self.paths, self.encoder.preprocess)

    @property
    def batches(self) -> list[list[int]]:
        return in_batches(range(len(self.paths)), self.batch)

    @torch.no_grad()
    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixels_bchw.to(self.device))

    def build(
        self, name: str, dtype: FeatureDtype = "float16", workers: int | None = None
    ) -> FeatureCache:
        format = FeatureFormat(self.encoder.num_tokens, self.encoder.embed_dim, dtype)
        return open_or_build(
            CacheFiles(self.root / name, format, len(self.paths)),
            self.pixels,
            self.encode,
            batch_images=self.batch,
            num_workers=self.workers if workers is None else workers,
        )


def encoding(work: Work) -> Iterator[Variant]:
    """The encoder alone, on pixels that are ready."""
    sizes = ENCODE_BATCHES.get(work.device.type, ENCODE_BATCHES["cpu"])
    pixels = work.pixels[np.arange(min(max(sizes), len(work.paths)))]

    def run(size: int) -> None:
        for part in pixels.split(size):
            work.encode(part).cpu()

    for size in sizes:
        yield Variant(f"encode, batch {size}", lambda size=size: run(size), samples=len(pixels))


def decoding(work: Work, pool: ProcessPoolExecutor) -> Iterator[Variant]:
    """From files to pixels."""

    def in_threads(workers: int) -> None:
        for _ in prefetch(work.batches, lambda indices: work.pixels[np.array(indices)], workers):
            pass

    def in_processes() -> None:
        for _ in pool.map(
            _decode, [[work.paths[index] for index in batch] for batch in work.batches]
        ):
            pass

    count = len(work.paths)
    yield Variant("decode, 1 thread", lambda: in_threads(1), count)
    yield Variant("decode, threads", lambda: in_threads(work.workers), count)
    yield Variant("decode, processes", in_processes, count)


def building(work: Work) -> Iterator[Variant]:
    """Whole caches, from files to files."""
    numbers = itertools.count()

    def run(workers: int) -> None:
        cache = work.build(f"built-{next(numbers)}", workers=workers)
        cache.close()
        shutil.rmtree(cache.files.folder)

    yield Variant("build, decoding ahead", lambda: run(work.workers), len(work.paths))
    yield Variant("build, one thing at a time", lambda: run(0), len(work.paths))


def reading(work: Work) -> Iterator[Variant]:
    """All images in random order, as many at a time as a training step takes."""
    order = in_batches(np.random.default_rng(0).permutation(len(work.paths)).tolist(), STEP_IMAGES)

    def run(read: Callable[[np.ndarray], object]) -> None:
        for batch in order:
            read(np.array(batch))

    def from_disk(cache: FeatureCache) -> None:
        for shard in range(cache.files.num_shards):
            _forget(cache.files.path(shard))
        run(cache.__getitem__)

    halves = work.build("float16")
    caches = {
        "float16": halves,
        "bfloat16": work.build("bfloat16", "bfloat16"),
        "int8": work.build("int8", "int8"),
    }
    for name, cache in caches.items():
        yield Variant(f"read {name}", lambda cache=cache: run(cache.__getitem__), len(work.paths))
    if hasattr(os, "posix_fadvise"):
        yield Variant("read float16 from disk", lambda: from_disk(halves), len(work.paths))
    yield Variant(
        "encode on the fly",
        lambda: run(lambda indices: work.encode(work.pixels[indices]).cpu()),
        len(work.paths),
    )


def opening(work: Work, num_images: int) -> Variant:
    """A large cache with empty space in place of features: records of zeros, and their checksums."""
    files = CacheFiles(work.root / "large", FeatureFormat(49, 1280), num_images)
    files.folder.mkdir()
    checksum = zlib.crc32(bytes(files.format.record_bytes))
    for shard in range(files.num_shards):
        count = len(files.images_of(shard))
        with files.path(shard).open("wb") as file:
            file.seek(count * files.format.record_bytes)
            file.write(np.full(count, checksum, "<u4").tobytes())
    files.write_index({})

    def run() -> None:
        open_or_build(files, work.pixels, work.encode).close()

    return Variant(f"open a cache of {num_images:,} images", run, num_images)


def _forget(path: Path) -> None:
    """Put a file out of the system's memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_preprocess: Any = None


def _start_worker(preprocess: Any) -> None:
    global _preprocess
    _preprocess = preprocess
    torch.set_num_threads(1)


def _decode(paths: list[Path]) -> np.ndarray:
    return OnTheFlyPixels(paths, _preprocess)[np.arange(len(paths))].numpy()


def build_encoder(name: str, tiny: bool) -> Any:
    """`lite` has its real weights; `dinov2-large` random ones, which take as long."""
    if name == "lite" and not tiny:
        return build_vision_encoder(VisionEncoderConfig())
    if tiny:
        size, config = (
            56,
            Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14),
        )
    else:
        known = known_architecture("facebook/dinov2-large")
        assert known is not None
        size, config = 224, known.config
    processor = BitImageProcessorPil(
        size={"shortest_edge": size * 256 // 224}, crop_size={"height": size, "width": size}
    )
    return (
        HuggingFaceVisionEncoder(AutoModel.from_config(config), processor, size)
        .requires_grad_(False)
        .eval()
    )


def pictures(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Files of pictures: those of a caption folder's training split, or smooth noise."""
    if options.data_dir is not None:
        return [image.path for image in CaptionFolder.open(options.data_dir).split("train")][
            : options.images
        ]
    folder.mkdir(parents=True)
    random = np.random.default_rng(options.seed)
    paths = [folder / f"{number:05}.jpg" for number in range(options.images)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        size = TINY_PICTURE_SIZE if options.tiny else PICTURE_SIZE
        coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


@contextmanager
def worker_processes(work: Work) -> Iterator[ProcessPoolExecutor]:
    """Processes that decode; the first task finds them started."""
    without_weights = copy.deepcopy(work.encoder).to("meta")  # preprocessing needs none
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        work.workers, context, _start_worker, (without_weights.preprocess,)
    ) as pool:
        yield pool


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--encoder", choices=("lite", "dinov2-large"), default="lite")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--data-dir", type=Path, help="caption folder whose pictures to encode; drawn if not given"
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="the disk to measure; the temporary folder's otherwise"
    )
    parser.add_argument(
        "--workers", type=int, default=max(2, os.cpu_count() or 2), help="that decode"
    )
    options = parser.parse_args()
    if options.tiny:
        options.images = min(options.images, 24)
    device = prepare(options)
    if options.cache_dir is not None:
        options.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.cache_dir) as folder:
        root = Path(folder)
        encoder = build_encoder(options.encoder, options.tiny).to(device)
        paths = pictures(options, root / "pictures")
        batch = ENCODE_BATCH.get(device.type, ENCODE_BATCH_ELSEWHERE)
        work = Work(
            encoder, paths, root, device, options.workers, min(batch, max(1, len(paths) // 4))
        )
        with worker_processes(work) as pool:
            variants = [
                *encoding(work),
                *decoding(work, pool),
                *building(work),
                *reading(work),
                opening(work, LARGE_CACHE),
            ]
            report = Report(measure(variants, options.repeats, device), device, options.seed)
    for fast, slow in (
        ("read float16", "encode on the fly"),
        ("read float16 from disk", "encode on the fly"),
        ("read int8", "read float16"),
        ("read float16 pooled", "read float16"),
        ("decode, threads", "decode, 1 thread"),
        ("decode, threads", "decode, processes"),
        ("build, decoding ahead", "build, one thing at a time"),
    ):
        if {fast, slow} <= {variant.name for variant in variants}:
            report.add_ratio(fast, slow)
    smallest, *_, largest = (v.name for v in variants if v.name.startswith("encode, batch"))
    report.add_ratio(largest, smallest)
    report.ratios["seconds to open the large cache"] = report[variants[-1].name].median_seconds
    report.finish(options.json)


if __name__ == "__main__":
    main()
