"""Train a bridge on drawn scenes in minutes, and evaluate it on unseen pairs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes, judge_caption
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.device import peak_rss_gib
from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation, write_json
from vlm_bridge.evaluation.run_folder import ReportedRun, read_curves
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train

logger = logging.getLogger(__name__)

NUM_TRAIN, NUM_VAL, NUM_TEST = 2500, 60, 200
TITLE = "vlm-bridge quickstart: scenes of unseen color-shape pairs"
ACCURACIES = {
    "colour_shape_accuracy": "color_shape", "relation_accuracy": "relation",
    "colour_accuracy": "color", "shape_accuracy": "shape", "count_accuracy": "count",
}  # fmt: skip
SCORES = ("visual_gain", "CIDEr", "BLEU-4", "perplexity", "versions")


def run(
    recipe: Recipe, output_dir: Path, *, workers: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], ReportedRun]:
    """Draw, train, evaluate on unseen pairs, and write the results to `output_dir`.

    Args:
        progress: of the training, as `train` calls it.

    Returns:
        The content of `metrics.json`, and the evaluation.
    """
    started = time.perf_counter()
    data_dir, log_dir = Path(recipe.data_dir), Path(recipe.log_dir)
    logger.info(f"1/4 drawing {NUM_TRAIN + NUM_VAL + NUM_TEST} scenes into {data_dir}")
    scenes = Scenes(NUM_TRAIN, NUM_VAL, NUM_TEST, seed=recipe.seed, wordings=1)
    transform(scenes, data_dir, workers=workers, seed=recipe.seed)

    logger.info("2/4 training the bridge (the encoder and the language model stay frozen)")
    # A second run trains anew: old curves and checkpoints would only confuse.
    for name in (checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS):
        (Path(recipe.checkpoint_dir) / name).unlink(missing_ok=True)
    (log_dir / "history.jsonl").unlink(missing_ok=True)
    train_seconds = train(recipe, progress=progress).seconds

    logger.info(f"3/4 captioning {NUM_TEST} scenes of color-shape pairs that training never showed")
    captioner = Captioner.from_pretrained(recipe.checkpoint_dir, device=recipe.device)
    images = CaptionFolder.open(data_dir).split("test")
    evaluation = evaluate_captioner(captioner, images, decode=recipe.decode, batch_size=32)

    logger.info(f"4/4 writing {output_dir / 'report.html'}")
    evaluation = replace(evaluation, curves=read_curves(log_dir), recipe_yaml=recipe.to_yaml())
    write_evaluation(evaluation, output_dir, title=TITLE)
    verdicts = [judge_caption(p.caption, p.image.captions[0]) for p in evaluation.predictions]
    metrics = {
        **{name: _share([v[kind] for v in verdicts]) for name, kind in ACCURACIES.items()},
        **{name: evaluation.metrics[name] for name in SCORES},
        "num_images": len(images),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "peak_rss_gib": round(peak_rss_gib(), 2),
    }
    write_json(output_dir / "metrics.json", metrics)
    return metrics, evaluation


def real_photographs() -> list[tuple[str, Image.Image]]:
    """Return free photos of scikit-image as (name, RGB image), where it is installed."""
    try:
        from skimage import data

        names = ("cat", "astronaut", "coffee")
        return [(f"scikit-image {name}", Image.fromarray(getattr(data, name)())) for name in names]
    except Exception:  # not installed, or its data files would have to be fetched
        return []


def _share(answers: list[bool | None]) -> float | None:
    """Return the share of right answers among those that could be right or wrong."""
    judged = [answer for answer in answers if answer is not None]
    return round(sum(judged) / len(judged), 4) if judged else None
