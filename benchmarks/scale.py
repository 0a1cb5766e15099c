"""What do a million images cost? Time, disk and memory of each stage, from slopes measured at a few sizes.

    python -m benchmarks.scale --data-dir data/flickr8k [--images 1000000] [--sizes 1000 2000 4000]

The images of a caption folder are repeated under other names, so that only their number grows. Each size is measured
in a process of its own; features are encoded of a tenth of the images. Near-duplicates are searched among random
hashes. Everything runs in one process, and with the recipe's encoder and tokenizer; `transform --workers` shares
its time among processes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import harness
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline import features
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.data_pipeline.near_duplicates import near_duplicates
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.data_pipeline.sources import Source, SourceItem
from vlm_bridge.data_pipeline.splits import SplitRule
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.model_architecture.captioner import caption_format
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import build_language_model
from vlm_bridge.training_strategy.data import epoch_plan, split_features

SIZES, HASHES = (1_000, 2_000, 4_000), (10_000, 20_000, 40_000, 80_000, 160_000)
TINY_SIZES, TINY_HASHES = (40, 80), (100, 200)
ENCODED = 10  # one image in so many
WHEN = {
    "make the caption folder": "once",
    "search near-duplicates": "once",
    "check images": "once, with a cache",
    "hash images": "once, with a cache",
    "encode features": "once, with a cache",
    "read captions": "each start",
    "tokenize": "each start",
    "plan": "each epoch",
}

IN_BATCHES = {"check images", "hash images", "encode features"}  # memory does not grow


class Cost(NamedTuple):
    """Of a stage with so many images; memory is its peak beside what stages before it hold."""

    images: int
    seconds: float
    disk: int = 0
    memory: int = 0


@dataclass
class Repeated(Source):
    """Images of a caption folder under as many names as are asked for."""

    name = "repeated"
    description = licence_note = "copies of a caption folder's images"
    finds_near_duplicates = False

    images: Sequence[CaptionedImage] = ()
    count: int = 0
    default_split_rule: SplitRule = field(default=SplitRule("hash", 0.0, 0.0), init=False)

    def items(self) -> list[SourceItem]:
        chosen = ((n, self.images[n % len(self.images)]) for n in range(self.count))
        return [SourceItem(f"{n:07d}", list(i.captions), "train", i.path) for n, i in chosen]


def stage(images: int, work: Callable[[], Any], folder: Path | None = None) -> tuple[Any, Cost]:
    """Run a stage; return its result and its cost."""
    results, started = [], time.perf_counter()
    peak = harness.watch_peak(lambda: results.append(work()), torch.device("cpu"), times=1)
    seconds = time.perf_counter() - started
    files = (path for path in folder.rglob("*") if path.is_file()) if folder else ()
    disk = sum(path.stat().st_size for path in files)
    return results[0], Cost(images, seconds, disk, peak.over_models)


def measure(size: int, data_dir: Path, recipe: Recipe) -> dict[str, Cost]:
    """Measure all stages of one size but the search for near-duplicates."""
    costs: dict[str, Cost] = {}
    encoder: Any = build_vision_encoder(recipe.vision_encoder)
    format = caption_format(build_language_model(recipe.language_model), recipe)
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(place, "data"), Path(place, "features")
        source = Repeated(images=CaptionFolder.open(data_dir).split("train"), count=size)
        _, costs["make the caption folder"] = stage(size, lambda: transform(source, root), root)
        folder = CaptionFolder.open(root)
        images, costs["read captions"] = stage(size, lambda: folder.split("train"))
        data, costs["tokenize"] = stage(size, lambda: TokenizedImages(images, format))
        plan = epoch_plan(recipe, data.captions_per_image, data.caption_lengths)
        _, costs["plan"] = stage(size, lambda: plan.batches(0))
        paths = [image.path for image in images]
        _, costs["check images"] = stage(size, lambda: features.check_images(paths))
        _, costs["hash images"] = stage(size, lambda: features.images_digest(paths, cache))
        some = images[: max(1, size // ENCODED)]
        cached = recipe.replace(feature_cache=str(cache))
        _, costs["encode features"] = stage(
            len(some), lambda: split_features(encoder, cached, "train", some), cache
        )
    return costs


def search(size: int, seed: int) -> Cost:
    """Search near-duplicates among random hashes."""
    looks = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64).tolist()
    names = ["x"] * size
    return stage(size, lambda: near_duplicates(looks, names, names, 4))[1]


def at(costs: Sequence[Cost], images: int) -> Cost:
    """Extrapolate linearly to a number of images, by least squares."""
    sizes = [cost.images for cost in costs]
    lines = (np.polyfit(sizes, values, 1) for values in list(zip(*costs, strict=True))[1:])
    return Cost(images, *(max(0, float(np.polyval(line, images))) for line in lines))  # type: ignore[arg-type]


def table(costs: dict[str, list[Cost]], images: int) -> str:
    """Return the plan as Markdown, with seconds at each size and how they grow when it doubles."""
    rows: dict[str, list[str]] = {
        name: []
        for name in ("stage", "when", "images: seconds", "growth", "time", "disk", "memory")
    }
    for name, when in WHEN.items():
        planned = at(costs[name], images)
        growth = [b.seconds / a.seconds * a.images / b.images for a, b in pairwise(costs[name])]
        points = ", ".join(f"{cost.images:,}: {cost.seconds:.3g}" for cost in costs[name])
        memory = 0 if name in IN_BATCHES else planned.memory
        sizes = [features.as_bytes(n) if n >= 2**20 else "-" for n in (planned.disk, memory)]
        mean = f"{np.exp(np.mean(np.log(growth))):.2f}"
        values = (name, when, points, mean, f"{planned.seconds / 60:,.1f} min", *sizes)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    return harness.markdown(rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.argument_parser(__doc__, repeats=1)
    parser.add_argument("--data-dir", type=Path, required=True, help="caption folder")
    parser.add_argument("--config", default="lite-flickr8k", help="recipe: encoder and tokenizer")
    parser.add_argument("--images", type=int, default=1_000_000, help="images of the plan")
    parser.add_argument("--sizes", type=int, nargs="+", help="images that are measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sizes = options.sizes or (TINY_SIZES if options.tiny else SIZES)
    recipe = Recipe.load(options.config)
    costs: dict[str, list[Cost]] = {name: [] for name in WHEN}
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for size in sizes:
            of_size = pool.submit(measure, size, options.data_dir, recipe).result()
            for name, cost in of_size.items():
                costs[name].append(cost)
        for size in TINY_HASHES if options.tiny else HASHES:
            of_search = pool.submit(search, size, options.seed).result()
            costs["search near-duplicates"].append(of_search)
    print(f"{options.images:,} images; growth is that of seconds an image: 1 is linear\n")
    print(table(costs, options.images))
    if options.json:
        plan = {name: at(of_stage, options.images)._asdict() for name, of_stage in costs.items()}
        options.json.write_text(json.dumps({"measured": costs, "plan": plan}, indent=2))


if __name__ == "__main__":
    main()
