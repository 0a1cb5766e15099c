"""What makes the `lite` system quick on a CPU, each as a ratio within one run.

    python -m benchmarks.lite_cpu

Compares, on random tokens and pictures with the real frozen models: five captions of an image packed into one row
against five rows; the language model's `eager` attention against `sdpa`; and the encoder in channels-last
memory against torch's default layout. Variants are interleaved; medians are printed.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import platform
import statistics
import time
from collections.abc import Callable

import torch

from vlm_bridge.cli.quiet import quiet_transformers
from vlm_bridge.configuration import load_recipe, shipped_recipe
from vlm_bridge.model_architecture.captioner import CaptionerModel, build_captioner

IMAGES, CAPTIONS, TOKENS, REPEATS = 8, 5, 15, 5


def training_step(model: CaptionerModel, packed: bool) -> None:
    rows, length = (IMAGES, CAPTIONS * TOKENS) if packed else (IMAGES * CAPTIONS, TOKENS)
    ids = torch.randint(5, 1000, (rows, length))
    segments = (torch.arange(length) // TOKENS + 1).expand(rows, length)
    encoder = model.vision_encoder
    features = torch.randn(rows, encoder.num_tokens, encoder.embed_dim)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.caption_loss(ids, ids, segments, model.image_state(features)).total
    loss.backward()


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each variant, interleaved, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, result: dict[str, float]) -> None:
    slowest = max(result.values())
    print(title)
    for name, seconds in result.items():
        print(f"  {name:32} {seconds * 1000:8.0f} ms   {slowest / seconds:.2f}x")


def main() -> None:
    quiet_transformers()
    torch.manual_seed(0)
    model = build_captioner(load_recipe(shipped_recipe("lite-flickr8k")))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")

    language_model = model.language_model.causal_lm
    language_model.set_attn_implementation("eager")
    show(
        f"training step of {IMAGES * CAPTIONS} captions",
        medians(
            {
                "one row an image (packed)": lambda: training_step(model, packed=True),
                "one row a caption": lambda: training_step(model, packed=False),
            }
        ),
    )

    def with_attention(implementation: str) -> None:
        language_model.set_attn_implementation(implementation)
        training_step(model, packed=True)

    show(
        "attention of the language model, same packed step",
        medians({name: lambda name=name: with_attention(name) for name in ("eager", "sdpa")}),
    )

    encoder = model.vision_encoder
    pixels = torch.randn(32, 3, 224, 224)

    def encode(layout: torch.memory_format) -> None:
        encoder.network.to(memory_format=layout)
        with torch.no_grad():
            encoder.network.extract_features(pixels.contiguous(memory_format=layout))

    layouts = {"channels last": torch.channels_last, "default layout": torch.contiguous_format}
    show(
        "encoding 32 pictures",
        medians({name: lambda layout=layout: encode(layout) for name, layout in layouts.items()}),
    )


if __name__ == "__main__":
    main()
