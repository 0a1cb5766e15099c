"""When is a caption likely to be wrong? Label captions by hand, then fit a recipe's `confidence`.

    python -m benchmarks.confidence caption --data-dir data/flickr8k --limit 100 --output dev.csv
    python -m benchmarks.confidence fit dev.csv --test coco.csv

The first command writes a line for each image: image, caption, score, similarity, and the column `right`, into which
a person puts 1 or 0 before any confidence is computed. The rule: 1 if the subject of the caption, what its main verb
is about, is in the image and of that kind. A man for a woman, or a boy for a girl, is wrong; a person, or a child, is
right for both. Number, color, and what the subject does do not count.

The second fits the log-odds of `right` by logistic regression (Platt 1999) to the sum of score and similarity, each
standardized, and chooses `unsure_below` so that at most a tenth of the right captions are marked. Fitted apart, the
similarity gets no weight from images like those of training, where it says nothing; it is there for other images.
Needs the `photos` extra (scikit-learn).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import in_batches

COLUMNS = ("image", "caption", "score", "similarity", "right")
MOST_RIGHT_MARKED = 0.1
Table = dict[str, np.ndarray]


def read_labels(path: Path) -> Table:
    """Read a labeled file: arrays of score, similarity and right, and the captions."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in COLUMNS[2:]}
    return {**numbers, "caption": np.array([row["caption"] for row in rows])}


def fitted(table: Table) -> tuple[np.ndarray, float]:
    """Return the weights (constant, per nat, per similarity), and the threshold."""
    features = np.stack([table["score"], table["similarity"]], axis=1)
    mean, std = features.mean(0), features.std(0)
    together = ((features - mean) / std).mean(1, keepdims=True)
    model = LogisticRegression(C=1000).fit(together, table["right"])
    slopes = model.coef_[0] / (2 * std)
    weights = np.round([model.intercept_[0] - slopes @ mean, *slopes], 3)
    return weights, threshold_of(probabilities(table, weights), table["right"])


def probabilities(table: Table, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the confidence of each caption, as `familiarity.confidence` does."""
    constant, per_nat, per_similarity = weights
    log_odds = constant + per_nat * table["score"] + per_similarity * table["similarity"]
    return 1 / (1 + np.exp(-log_odds))


def threshold_of(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the highest threshold below which at most `MOST_RIGHT_MARKED` of the right ones are."""
    of_right = np.sort(confidence[right == 1])
    return math.floor(1000 * of_right[int(MOST_RIGHT_MARKED * len(of_right))]) / 1000


def report(name: str, table: Table, weights: np.ndarray, threshold: float) -> None:
    """Print the share of marked captions among right and wrong ones, and the reliability curve."""
    confidence, right = probabilities(table, weights), table["right"] == 1
    marked = confidence < threshold
    print(
        f"{name}: {right.sum()} of {len(right)} right; marked: {marked[right].mean():.1%} of the "
        f"right, {marked[~right].mean():.1%} of the wrong"
    )
    print("| confidence | captions | right |\n|---|---:|---:|")
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (confidence >= low) & (confidence < low + 0.2)
        share = f"{right[inside].mean():.0%}" if inside.any() else ""
        print(f"| {low:.1f} to {low + 0.2:.1f} | {inside.sum()} | {share} |")


def caption(options: argparse.Namespace) -> None:
    """Write captions with score and similarity, to be labeled."""
    from vlm_bridge import Captioner
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder

    captioner = Captioner.from_pretrained(options.checkpoint)
    model: Any = captioner.model
    images = open_data_folder(options.data_dir).split(options.split)[: options.limit]
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for some in in_batches(images, 16):
            results = captioner.caption([image.path for image in some])
            features = model.encode_images([open_image(image.path) for image in some])
            similarities = model.familiarity(model.bridge_features(features)).tolist()
            for image, result, similarity in zip(some, results, similarities, strict=True):
                shown = f"{result.score:.4f}", f"{similarity:.4f}"
                writer.writerow([image.original_id, result.caption, *shown, ""])


def fit(options: argparse.Namespace) -> None:
    """Print the recipe's `confidence`, and how it does on both files."""
    table = read_labels(options.labels)
    weights, threshold = fitted(table)
    print(f"confidence:\n  weights: {weights.tolist()}\n  unsure_below: {threshold:.3f}\n")
    report(options.labels.name, table, weights, threshold)
    for path in options.test:
        report(path.name, read_labels(path), weights, threshold)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("caption")
    command.add_argument("--checkpoint", help="(default: the bundled one)")
    command.add_argument("--data-dir", type=Path, required=True, help="caption folder")
    command.add_argument("--split", default="val")
    command.add_argument("--limit", type=int)
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=caption)
    command = commands.add_parser("fit")
    command.add_argument("labels", type=Path)
    command.add_argument("--test", type=Path, nargs="*", default=[])
    command.set_defaults(run=fit)
    options = parser.parse_args(arguments)
    with torch.inference_mode():
        options.run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
