"""Do words look at their object? Drawn scenes of two objects, one left and one right, and the maps of `--explain`.

    python -m benchmarks.attention_sides                                   trains a small captioner first, then measures
    python -m benchmarks.attention_sides --checkpoint runs/quickstart      measures a captioner that knows scenes

Trains `projection` and a new cross-attending decoder on EfficientNet-Lite0 (minutes on two cores). Then, for 50 scenes
that training never showed, counts the objects whose shape word and whose colour word have more than half of their map
on the object's half of the picture. One of the two wordings of every caption begins with the object on the right, so
a word's place in the caption does not tell the side. An object that the caption does not name counts as a miss.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from vlm_bridge.captioning.explain import Explanation, attention_panels, explain
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.cli.options import quiet_transformers
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources import SourceItem
from vlm_bridge.data_pipeline.sources.scenes import Kind, Scene, Scenes, make_scene
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.model_architecture.weights import DecoderSize, write_new_decoder
from vlm_bridge.training_strategy.trainer import train

SEED = 0
NUM_SCENES, NUM_DRAWN, NUM_SHEETS = 50, 10_000, 6
"""Of the scenes drawn, about one in seven has one object beside another."""
BESIDE = "to the left of"
Side = Literal["left", "right"]


class SideBySide(Scenes):
    """Scenes of two objects, one beside the other."""

    def items(self) -> list[SourceItem]:
        return [item for item in super().items() if BESIDE in item.captions[0]]


def recipe(folder: Path) -> Recipe:
    return recipe_from_dict(
        {
            "vision_encoder": {"name": "efficientnet-lite0", "layers": [2, 4, 10]},
            "language_model": {"name": str(folder / "decoder"), "dtype": "float32"},
            "bridge": {"kind": "projection", "projection": "linear", "position_embeddings": True},
            "trainable": {"bridge.*": None, "language_model.*": None},
            "data_dir": str(folder / "data"),
            "captions_per_image": 2,
            "max_caption_tokens": 32,
            "amp_dtype": "float32",  # so small a model is quicker in float32
            "learning_rate": 1e-3,
            "min_lr": 2e-5,
            "num_epochs": 10,
            "batch_size": 64,
            "gradient_clip_val": 1.0,
            "weight_decay": 0.05,
            "warmup_steps": 100,
            "early_stopping_patience": None,
            "validate_every": "10 epochs",
            "save_every": "10 epochs",
            "log_every_n_steps": 100,
            "checkpoint_dir": str(folder / "checkpoints"),
            "log_dir": str(folder / "logs"),
            "decode": {"num_beams": 1, "max_new_tokens": 24},
        }
    )


def train_captioner(folder: Path) -> None:
    """Draw, make a decoder of 4 layers x 128, and train it with its bridge."""
    started = time.perf_counter()
    transform(SideBySide(NUM_DRAWN, 400, 0, seed=SEED), folder / "data", workers=2)
    images = CaptionFolder.open(folder / "data").split("train")
    captions = [caption for image in images for caption in image.captions]
    write_new_decoder(
        captions, folder / "decoder", DecoderSize(layers=4, width=128, heads=4), seed=SEED
    )
    train(recipe(folder))
    print(f"{len(images)} scenes, {time.perf_counter() - started:.0f} s with drawing")


@dataclass
class Looks:
    """Of how many objects on a side the word was said, and looked to its side."""

    said: int = 0
    colour: int = 0
    shape: int = 0


def side_mass(explanation: Explanation, kind: Kind, side: Side) -> tuple[float, float] | None:
    """Shares of the maps of an object's colour and shape word on a half of the picture; None if it is not named."""
    words = [word.word.lower() for word in explanation.words]
    for index, pair in enumerate(pairwise(words)):
        if pair == (kind.color, kind.shape):
            colour, shape = (_on_side(explanation.words[index + n].map, side) for n in (0, 1))
            return colour, shape
    return None


def _on_side(map_rc: np.ndarray, side: Side) -> float:
    """The middle column of an odd grid belongs to both sides by half."""
    columns = map_rc.sum(axis=0)
    half = len(columns) // 2
    middle = columns[half] / 2 if len(columns) % 2 else 0.0
    return float((columns[:half] if side == "left" else columns[-half:]).sum() + middle)


def unseen_scenes() -> list[Scene]:
    """The first scenes of validation with one object beside another, objects in the order left, right."""
    scenes = (make_scene(SEED + 1, "val", index) for index in range(100 * NUM_SCENES))
    return [scene for scene in scenes if scene.facts.relation == BESIDE][:NUM_SCENES]


def measure(captioner: Captioner, folder: Path) -> None:
    looks: dict[Side, Looks] = {"left": Looks(), "right": Looks()}
    whole = 0
    scenes = unseen_scenes()
    for number, scene in enumerate(scenes):
        picture = scene.draw()
        explanation = explain(captioner, picture)
        found = []
        for kind, (side, look) in zip(scene.facts.kinds, looks.items(), strict=True):
            mass = side_mass(explanation, kind, side)
            colour, shape = mass or (0.0, 0.0)
            look.said += mass is not None
            look.colour += colour > 0.5
            look.shape += shape > 0.5
            found += [colour > 0.5, shape > 0.5]
        whole += all(found)
        if number < NUM_SHEETS:
            folder.mkdir(parents=True, exist_ok=True)
            attention_panels(explanation, picture).save(folder / f"scene-{number}.png")
    print(
        f"object      named   shape word looks to its side   colour word does   (of {len(scenes)} scenes)"
    )
    for side, look in looks.items():
        print(f"{side:9} {look.said:7} {look.shape:30} {look.colour:18}")
    print(f"all four words look to their side: {whole} of {len(scenes)} scenes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="measure this captioner instead of training one"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/attention-sides"))
    options = parser.parse_args()
    quiet_transformers()
    if options.checkpoint is None:
        train_captioner(options.output_dir)
    captioner = Captioner.from_pretrained(options.checkpoint or options.output_dir / "checkpoints")
    measure(captioner, options.output_dir / "sheets")


if __name__ == "__main__":
    main()
