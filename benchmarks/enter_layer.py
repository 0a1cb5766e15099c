"""Where an image enters the language model: quality against speed, at equal time.

    python -m benchmarks.enter_layer --seconds 120 [--data-dir data/flickr8k] [--json FILE]

Trains the `lite` recipe once a variant: `deep_prefix` from layers 0, 5, 10, 16 and 20, `cross_attention` at layers
0 and 8, each above layer 0 with and without cached text states. The seconds of a step are measured first; every
variant then gets as many steps as fit into ``--seconds``, its schedule drawn over them, and is validated at the end.
Loading, caches and validation are outside these seconds. Single runs: a few hundredths of loss are noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTImageProcessorPil, ViTModel

from benchmarks.harness import argument_parser, environment, markdown, prepare
from vlm_bridge.configuration import (
    Recipe,
    load_recipe,
    override_recipe,
    recipe_from_dict,
    shipped_recipe,
)
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.model_architecture.weights import word_piece_tokenizer
from vlm_bridge.training_strategy.trainer import TrainingResult, train

LAYERS = {"deep_prefix": (0, 5, 10, 16, 20), "cross_attention": (0, 8)}
TINY_LAYERS = {"deep_prefix": (0, 2), "cross_attention": (0, 1)}
SHORT, LONG = 5, 25
"""Steps of two runs whose difference in time is that of the steps between them."""


@dataclass(frozen=True)
class Result:
    variant: str
    seconds_per_step: float
    steps: int
    captions: int
    loss: float
    visual_gain: float

    @property
    def samples_per_second(self) -> float:
        return self.captions / self.steps / self.seconds_per_step


def variants(base: Recipe, options: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """Names and recipes, in the order of the table."""
    plain = base.to_dict()
    for kind, layers in (TINY_LAYERS if options.tiny else LAYERS).items():
        bridge: dict[str, Any] = plain["bridge"]
        changes: dict[str, Any] = {}
        if kind == "cross_attention":
            bridge = {"kind": kind, "dropout": bridge["dropout"]}
            changes = {"learning_rate": options.cross_attention_learning_rate}
        for layer in layers:
            recipe = recipe_from_dict(
                {**plain, **changes, "bridge": {**bridge, "enter_at_layer": layer}}
            )
            yield f"{kind} at {layer}", recipe


def run_steps(recipe: Recipe, steps: int) -> TrainingResult:
    with tempfile.TemporaryDirectory() as folder:
        where = [f"checkpoint_dir={folder}/checkpoints", f"log_dir={folder}/logs"]
        return train(override_recipe(recipe, [*where, f"max_steps={steps}"]))


def measure(name: str, recipe: Recipe, seconds: float) -> Result:
    """Train a variant for as many steps as fit into ``seconds``."""
    run_steps(recipe, 1)  # builds its caches
    short, long = (run_steps(recipe, steps).seconds for steps in (SHORT, LONG))
    seconds_per_step = max((long - short) / (LONG - SHORT), 1e-4)
    steps = max(1, round(seconds / seconds_per_step))
    validation = run_steps(recipe, steps).validation
    assert validation is not None, "the last step is validated"
    result = Result(
        name,
        seconds_per_step,
        steps,
        steps * recipe.batch_size,
        validation.loss,
        validation.visual_gain,
    )
    print(f"{name}: {result}", flush=True)
    return result


@contextmanager
def tiny_base(seed: int) -> Iterator[Recipe]:
    """A recipe of small random models and drawn scenes, for the time of a block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transform(Scenes(24, 8, 8, seed=seed, wordings=1), folder / "data", workers=1, seed=seed)
        images = CaptionFolder.open(folder / "data").split("train")
        tokenizer = word_piece_tokenizer([caption for i in images for caption in i.captions], 200)
        tokenizer.save_pretrained(folder / "text")
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(
            folder / "text"
        )
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(
            folder / "vision"
        )
        size = {"height": 32, "width": 32}
        ViTImageProcessorPil(size=size).save_pretrained(folder / "vision")
        yield recipe_from_dict(
            {
                "vision_encoder": {"name": str(folder / "vision")},
                "language_model": {"name": str(folder / "text")},
                "bridge": {
                    "kind": "deep_prefix",
                    "num_queries": 4,
                    "depth": 1,
                    "width": 32,
                    "num_heads": 4,
                },
                "data_dir": str(folder / "data"),
                "batch_size": 8,
                "num_workers": 0,
            }
        )


@contextmanager
def base_recipe(options: argparse.Namespace) -> Iterator[Recipe]:
    """The recipe that all variants change, which validates once, at the end, and keeps nothing."""
    quiet = [
        "num_epochs=100000", "validate_every=100000 epochs", "save_every=100000 epochs", "num_validation_samples=0",
        "early_stopping_patience=null", f"seed={options.seed}", f"device={options.device}",
    ]  # fmt: skip
    if options.tiny:
        with tiny_base(options.seed) as recipe:
            yield override_recipe(recipe, quiet)
    else:
        lite = shipped_recipe("lite-flickr8k")
        counted = ["batch_size=40", "tokens_per_batch=null"]
        where = [f"data_dir={options.data_dir}", f"warmup_steps={options.warmup_steps}"]
        yield load_recipe(lite, [*quiet, *counted, *where])


def report(results: list[Result], options: argparse.Namespace, device: torch.device) -> None:
    columns = {
        "variant": [r.variant for r in results],
        "s/step": [f"{r.seconds_per_step:.3f}" for r in results],
        "steps": [str(r.steps) for r in results],
        "samples/s": [f"{r.samples_per_second:.1f}" for r in results],
        "validation loss": [f"{r.loss:.3f}" for r in results],
        "visual gain": [f"{r.visual_gain:+.3f}" for r in results],
    }
    facts = environment(device, options.seed)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\n{markdown(columns)}\n")
    slowest = {r.variant.split(" at ")[0]: r for r in results if r.variant.endswith(" at 0")}
    ratios = {
        f"{r.variant} / at 0: samples/s": r.samples_per_second / slowest[kind].samples_per_second
        for r in results
        if (kind := r.variant.split(" at ")[0]) in slowest and r is not slowest[kind]
    }
    for name, value in ratios.items():
        print(f"{name:60} {value:.3f}")
    if options.json:
        rows = [
            {
                "variant": r.variant,
                "samples_per_second": r.samples_per_second,
                "tokens_per_second": None,
                "peak_bytes": None,
                "spread": None,
                "steps": r.steps,
                "validation_loss": r.loss,
                "visual_gain": r.visual_gain,
            }
            for r in results
        ]
        text = json.dumps({"environment": facts, "rows": rows, "ratios": ratios}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="of training, for every variant")
    parser.add_argument("--data-dir", default="data/flickr8k", help="caption folder of Flickr8k")
    parser.add_argument("--cross-attention-learning-rate", type=float, default=2e-4)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="only these, as the table calls them (all)"
    )
    options = parser.parse_args()
    device = prepare(options)
    with base_recipe(options) as base:
        recipes = dict(variants(base, options))
        if unknown := set(options.variants or ()) - recipes.keys():
            parser.error(f"no variant {', '.join(unknown)}; there are: {', '.join(recipes)}")
        names = options.variants or list(recipes)
        report([measure(name, recipes[name], options.seconds) for name in names], options, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
