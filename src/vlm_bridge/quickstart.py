"""Train a bridge on drawn scenes in minutes, and evaluate it on unseen pairs."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources.scenes import Scenes, judge_caption
from vlm_bridge.data_pipeline.transform import transform
from vlm_bridge.device import peak_rss_gib
from vlm_bridge.evaluation.run import Evaluation, evaluate_captioner, write_evaluation, write_json
from vlm_bridge.evaluation.run_folder import read_curves
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train

logger = logging.getLogger(__name__)

NUM_TRAIN, NUM_VAL, NUM_TEST = 2500, 60, 200


@dataclasses.dataclass(frozen=True)
class QuickstartResult:
    """What `runs/quickstart/metrics.json` holds, and the evaluation it comes from."""

    metrics: dict[str, Any]
    evaluation: Evaluation


def run(recipe: Recipe, output_dir: Path, *, workers: int) -> QuickstartResult:
    """Draw, train, evaluate on unseen pairs, and write the results to `output_dir`."""
    started = time.perf_counter()
    data_dir = Path(recipe.data_dir)
    logger.info(f"1/4 drawing {NUM_TRAIN + NUM_VAL + NUM_TEST} scenes into {data_dir}")
    transform(
        Scenes(NUM_TRAIN, NUM_VAL, NUM_TEST, seed=recipe.seed, wordings=1),
        data_dir,
        workers=workers,
        seed=recipe.seed,
    )

    logger.info("2/4 training the bridge (the encoder and the language model stay frozen)")
    # A second run trains anew: old curves and checkpoints would only confuse.
    for name in (checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS):
        (Path(recipe.checkpoint_dir) / name).unlink(missing_ok=True)
    (Path(recipe.log_dir) / "history.jsonl").unlink(missing_ok=True)
    training_started = time.perf_counter()
    train(recipe)
    train_seconds = time.perf_counter() - training_started

    logger.info(
        f"3/4 captioning {NUM_TEST} scenes of colour-shape pairs that training never showed"
    )
    captioner = Captioner.from_pretrained(recipe.checkpoint_dir, device=recipe.device)
    images = CaptionFolder.open(data_dir).split("test")
    evaluation = evaluate_captioner(
        captioner, images, decode=recipe.decode, validate=captioner.validate, batch_size=32
    )
    verdicts = [judge_caption(p.caption, p.image.captions[0]) for p in evaluation.predictions]

    scores = evaluation.metrics
    metrics = {
        "colour_shape_accuracy": _share(verdict["color_shape"] for verdict in verdicts),
        "relation_accuracy": _share(verdict["relation"] for verdict in verdicts),
        "colour_accuracy": _share(verdict["color"] for verdict in verdicts),
        "shape_accuracy": _share(verdict["shape"] for verdict in verdicts),
        "count_accuracy": _share(verdict["count"] for verdict in verdicts),
        "visual_gain": scores["visual_gain"],
        "CIDEr": scores["CIDEr"],
        "BLEU-4": scores["BLEU-4"],
        "perplexity": scores["perplexity"],
        "num_images": len(images),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "peak_rss_gib": round(peak_rss_gib(), 2),
        "versions": scores["versions"],
    }
    logger.info(f"4/4 writing {output_dir / 'report.html'}")
    write_evaluation(
        evaluation,
        output_dir,
        title="vlm-bridge quickstart: scenes of unseen colour-shape pairs",
        recipe_yaml=recipe.to_yaml(),
        curves=read_curves(Path(recipe.log_dir)),
    )
    metrics["total_seconds"] = round(time.perf_counter() - started, 1)
    write_json(output_dir / "metrics.json", metrics)
    return QuickstartResult(metrics, evaluation)


def real_photographs() -> list[tuple[str, Any]]:
    """Return the free photos of scikit-image and scikit-learn as (name, RGB image)."""
    from PIL import Image

    photographs = []
    try:
        from skimage import data

        for name in ("chelsea", "astronaut", "coffee"):
            photographs.append((f"scikit-image {name}", Image.fromarray(getattr(data, name)())))
    except Exception:  # not installed, or its data files would have to be fetched
        pass
    try:
        from sklearn.datasets import load_sample_image

        for name in ("china.jpg", "flower.jpg"):
            title = f"scikit-learn {name.removesuffix('.jpg')}"
            photographs.append((title, Image.fromarray(load_sample_image(name))))
    except Exception:
        pass
    return photographs


def _share(answers: Any) -> float | None:
    """The share of right answers among those that could be right or wrong."""
    judged: Sequence[bool] = [answer for answer in answers if answer is not None]
    return round(sum(judged) / len(judged), 4) if judged else None
