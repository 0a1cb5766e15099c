"""The data side of training: does an epoch grow with its captions and nothing else, and how much of it is pads?

    python -m benchmarks.data --data-dir data/flickr8k [--json FILE]

1. Whole epochs of 1,000 to 35,000 captions, each from a feature cache of random numbers through a captioner so small
   that the data side shows; planning and packing alone; and the most memory that the process itself held after any
   step. Pages of the cache's files are left out of it: the system takes them back when it needs them.
2. The same captions in batches filled by positions (`tokens_per_batch`), in batches of a number of captions, and in
   batches of one row a caption, padded to the longest.

Captions are those of a caption folder, or drawn with Flickr8k's lengths; a word is a token.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.harness import Peak, Report, Variant
from vlm_bridge.configuration import Recipe, override_recipe, recipe_from_dict
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.features import FeatureCache, FeatureFormat
from vlm_bridge.data_pipeline.loader import CaptionFormat, Row, TokenizedImages, prefetch
from vlm_bridge.model_architecture.bridges import build_bridge
from vlm_bridge.model_architecture.captioner import (
    CaptionModel,
    choose_trainable,
    trained_parameters,
)
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.training_strategy.data import epoch_plan
from vlm_bridge.training_strategy.step import adamw
from vlm_bridge.training_strategy.validation import LoadedBatch, batch_loss, load_batch

SIZES, TINY_SIZES = (1_000, 5_000, 15_000, 35_000), (50, 100, 200)
ORDER_CAPTIONS = 2_000
"""Captions that the orders of part 2 are compared on."""
CAPTIONS_PER_IMAGE, BATCH_CAPTIONS, NUM_WORKERS = 5, 40, 2
WORDS_MEAN, WORDS_STD = 11.8, 3.9
"""Of a Flickr8k caption."""
VOCABULARY, START, EOS = 8192, 1, 2
FORMAT = FeatureFormat(num_tokens=49, dim=256)


class NoEncoder(nn.Module):
    """Features come from the cache."""

    embed_dim, num_tokens, grid = FORMAT.dim, FORMAT.num_tokens, (7, 7)


@dataclass(frozen=True)
class Task:
    """What an epoch trains, and on what."""

    recipe: Recipe
    model: CaptionModel
    data: TokenizedImages
    features: FeatureCache

    def packed(self) -> Iterator[int]:
        """Plan and pack the first epoch's batches, and read nothing; gives the positions of each."""
        for rows in self._batches():
            yield self.data.pack(rows).num_positions

    def train(self) -> Iterator[None]:
        """Train on the first epoch, as the trainer does; yields after each step."""
        optimizer, _ = adamw(trained_parameters(self.model, self.recipe.trainable), self.recipe)
        batches = self._batches()

        def load(index: int) -> LoadedBatch:
            return load_batch(self.data.pack(batches[index]), self.features, self.model.device)

        for batch in prefetch(range(len(batches)), load, NUM_WORKERS):
            (batch_loss(self.model, batch).total / batch.packed.num_supervised).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield

    def variant(self, name: str) -> Variant:
        return Variant(name, lambda: run(self.train()), self.data.num_captions, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return int(self.data.caption_lengths.sum())

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / sum(self.packed())

    def _batches(self) -> list[list[Row]]:
        return epoch_plan(
            self.recipe, self.data.captions_per_image, self.data.caption_lengths
        ).batches(0)


def run(steps: Iterator[object]) -> None:
    for _ in steps:
        pass


# What is trained.


def small_recipe(seed: int) -> Recipe:
    bridge = {"kind": "deep_prefix", "num_queries": 8, "depth": 1, "width": 64, "num_heads": 4}
    return recipe_from_dict(
        {
            "bridge": {**bridge, "enter_at_layer": 1, "standardize_features": False},
            "captions_per_image": CAPTIONS_PER_IMAGE,
            "batch_size": BATCH_CAPTIONS,
            "seed": seed,
        }
    )


def small_captioner(recipe: Recipe, *, tiny: bool) -> CaptionModel:
    width = 32 if tiny else 256
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    language_model = LanguageModel(LlamaForCausalLM(config).eval(), None)
    bridge = build_bridge(
        recipe.bridge, NoEncoder.embed_dim, language_model.shape, NoEncoder.num_tokens
    )
    model = CaptionModel(NoEncoder(), language_model, bridge, standardize=False)
    choose_trainable(model, recipe.trainable)
    return model.train()


def captioned_images(num_captions: int, data_dir: Path | None, seed: int) -> list[CaptionedImage]:
    """Images with so many captions together, or as many as a folder has."""
    images: list[CaptionedImage] = []
    for image in _from_folder(data_dir) if data_dir else _drawn(seed):
        images.append(image)
        num_captions -= len(image.captions)
        if num_captions <= 0:
            break
    return images


def _from_folder(data_dir: Path) -> Iterator[CaptionedImage]:
    folder = CaptionFolder.open(data_dir)
    for split in folder.splits:
        yield from folder.split(split)  # type: ignore[arg-type]


def _drawn(seed: int) -> Iterator[CaptionedImage]:
    random, number = np.random.default_rng(seed), 0
    while True:
        lengths = (
            random.normal(WORDS_MEAN, WORDS_STD, CAPTIONS_PER_IMAGE).round().clip(2, 40).astype(int)
        )
        captions = (
            " ".join(f"word{word}" for word in random.integers(0, VOCABULARY, n)) for n in lengths
        )
        yield CaptionedImage(Path(f"{number}.jpg"), tuple(captions), str(number))
        number += 1


def encode_words(texts: Sequence[str]) -> list[list[int]]:
    """A token for each word: a number of its own, nearly."""
    return [
        [EOS + 1 + zlib.crc32(word.encode()) % (VOCABULARY - EOS - 1) for word in t.split()]
        for t in texts
    ]


def tokenized(num_captions: int, options: argparse.Namespace) -> TokenizedImages:
    images = captioned_images(num_captions, options.data_dir, options.seed)
    return TokenizedImages(images, CaptionFormat(encode_words, start_id=START, eos_id=EOS))


def random_cache(folder: Path, num_images: int) -> FeatureCache:
    """A cache of random features, made once."""
    drawn = torch.randn(256, FORMAT.num_tokens, FORMAT.dim)

    class Numbers:
        def __len__(self) -> int:
            return num_images

        def __getitem__(self, indices: np.ndarray) -> np.ndarray:
            return indices % len(drawn)

    return FeatureCache(folder, FORMAT, Numbers(), lambda numbers: drawn[numbers]).open()


# The two parts.


def measure_growth(
    sizes: Sequence[int], model: CaptionModel, features: FeatureCache, options: argparse.Namespace
) -> tuple[list[harness.Measurement], list[Task]]:
    recipe = small_recipe(options.seed)
    tasks = [Task(recipe, model, tokenized(size, options), features) for size in sizes]
    variants = [task.variant(epoch_of(size)) for task, size in zip(tasks, sizes, strict=True)]
    variants += [
        Variant(
            plan_of(size),
            lambda task=task: run(task.packed()),
            task.data.num_captions,
            task.num_tokens,
        )
        for task, size in zip(tasks, sizes, strict=True)
    ]
    return harness.measure(variants, options.repeats, model.device), tasks


def epoch_of(size: int) -> str:
    return f"epoch of {size:,} captions"


def plan_of(size: int) -> str:
    return f"plan and pack {size:,} captions"


def orders(
    model: CaptionModel, features: FeatureCache, options: argparse.Namespace
) -> dict[str, Task]:
    """The same captions in batches of about as many positions, put together in four ways."""
    data = tokenized(min(ORDER_CAPTIONS, max(sizes_of(options))), options)
    positions = round(BATCH_CAPTIONS * data.caption_lengths.mean())
    overrides = {
        "an image a row, by positions": [f"tokens_per_batch={positions}"],
        "an image a row, by captions": [],
        "a caption a row, by positions": ["captions_per_image=1", f"tokens_per_batch={positions}"],
        "a caption a row, padded to the longest": ["captions_per_image=1"],
    }
    recipe = small_recipe(options.seed)
    return {
        name: Task(override_recipe(recipe, some), model, data, features)
        for name, some in overrides.items()
    }


def own_peak(options: argparse.Namespace, device: torch.device) -> Peak:
    """Peak of this process's own memory (without pages of files) over an epoch of ``--peak-of`` captions."""
    recipe = small_recipe(options.seed)
    model = small_captioner(recipe, tiny=options.tiny).to(device)  # type: ignore[arg-type]
    before = own_memory()
    data = tokenized(options.peak_of, options)
    task = Task(recipe, model, data, random_cache(options.cache, options.cache_images))
    peak = max(own_memory() for _ in task.train())
    return Peak(peak, max(peak - before, 0))


def own_memory() -> int:
    """Resident bytes of this process that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def sizes_of(options: argparse.Namespace) -> tuple[int, ...]:
    return TINY_SIZES if options.tiny else SIZES


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.argument_parser(__doc__, repeats=3)
    parser.add_argument(
        "--data-dir", type=Path, help="caption folder to take captions from; else they are drawn"
    )
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache-images", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child_arguments(options: argparse.Namespace, size: int, features: FeatureCache) -> list[str]:
    """The command line of a process that measures the peak of an epoch."""
    arguments = ["--peak-of", str(size), "--seed", str(options.seed), "--device", options.device]
    arguments += ["--cache", str(features.folder), "--cache-images", str(len(features))]
    if options.data_dir is not None:
        arguments += ["--data-dir", str(options.data_dir)]
    return [*arguments, "--tiny"] if options.tiny else arguments


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = harness.prepare(options)
    if options.peak_of:
        harness.print_peak(own_peak(options, device))
        return

    sizes = sizes_of(options)
    num_images = len(captioned_images(max(sizes), options.data_dir, options.seed))
    model = small_captioner(small_recipe(options.seed), tiny=options.tiny).to(device)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        features = random_cache(Path(folder) / "cache", num_images)
        growth, tasks = measure_growth(sizes, model, features, options)
        by_order = orders(model, features, options)
        variants = [task.variant(name) for name, task in by_order.items()]
        report = Report(
            growth + harness.measure(variants, options.repeats, device), device, options.seed
        )
        for size in sizes:
            peak = harness.peak_in_child(
                "benchmarks.data", child_arguments(options, size, features)
            )
            report.add_peak(epoch_of(size), peak)

    small, large = min(sizes), max(sizes)
    report.add_ratio(
        epoch_of(large), epoch_of(small), f"samples/s at {large:,} / {small:,} captions"
    )
    report.add_memory_ratio(epoch_of(large), epoch_of(small))
    report.ratios[f"planning and packing: share of the {epoch_of(large)}"] = (
        report[plan_of(large)].median_seconds / report[epoch_of(large)].median_seconds
    )
    report.ratios[f"bytes a caption: {large:,} captions as tokens"] = (
        bytes_of(tasks[-1].data) / large
    )
    first, *others = by_order
    for name in others:
        report.add_ratio(first, name)
    for name, task in by_order.items():
        report.ratios[f"share of pads: {name}"] = task.padding_share
    report.finish(options.json)


def bytes_of(data: TokenizedImages) -> int:
    return sum(value.nbytes for value in vars(data).values() if isinstance(value, np.ndarray))


if __name__ == "__main__":
    main()
