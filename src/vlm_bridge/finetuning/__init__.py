"""Fine-tune a captioner on your own images, and compare its captions before and after."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import (
    is_caption_folder,
    open_data_folder,
    readable_split,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage, DataFolder
from vlm_bridge.data_pipeline.sources import open_source
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.data_pipeline.transform import Progress, transform
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.evaluation.run import evaluate_captioner, write_evaluation
from vlm_bridge.evaluation.run_folder import METRICS_NAME, REPORT_NAME, ReportedRun, read_run
from vlm_bridge.files import write_atomically
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.monitor import BLIND_BELOW
from vlm_bridge.training_strategy.resume import AUTO
from vlm_bridge.training_strategy.trainer import train

logger = logging.getLogger(__name__)

FEWEST_IMAGES, USUAL_IMAGES = 5, 20
MOST_HELD_OUT = 200  # images of a held-out split: enough for CIDEr, and quick to caption
# From here on, one held-out split decides when training stops, and another is reported.
ENOUGH_TO_STOP_EARLY = 200
ENOUGH_FOR_CIDER = 50  # images; on fewer of them it is chance
SHOWN = 6
TRAINING = "steps"  # what progress of training counts
# Keys of the start's recipe that its weights or its speed depend on; the others are chosen anew.
KEPT = (
    "vision_encoder", "language_model", "bridge", "decode", "trainable", "max_caption_tokens",
    "amp_dtype", "gradient_checkpointing",
)  # fmt: skip
LONGEST_CAPTION = 160  # tokens

ProgressBars = Callable[[str], AbstractContextManager[Progress]]


class Schedule(NamedTuple):
    """Settings for a number of training images.

    `benchmarks.finetune` measured those for 32 and 240 images; the others follow their trend.

    Attributes:
        captions_seen: by the optimizer in all, repetitions included.
        batch_size: captions of a step.
        views: random crops of each image.
    """

    most_images: float
    captions_seen: int
    batch_size: int
    learning_rate: float
    views: int


SCHEDULES = (
    Schedule(60, 1_000, 16, 3e-4, 8),
    Schedule(200, 2_400, 20, 3e-4, 8),
    Schedule(1_000, 6_400, 40, 3e-4, 4),
    Schedule(5_000, 20_000, 40, 3e-4, 1),
    Schedule(float("inf"), 60_000, 40, 3e-4, 0),
)


@dataclass(frozen=True)
class Example:
    """Captions of a held-out image before and after fine-tuning, and one of its own."""

    image: str
    before: str
    after: str
    reference: str


@dataclass(frozen=True)
class FineTuned:
    """Result of `finetune`.

    Attributes:
        checkpoint: folder of the run, for `Captioner.from_pretrained` and ``--checkpoint``.
        before: scores of the held-out images by the captioner that training started from.
        after: scores of the same images by the fine-tuned one.
        examples: captions of some held-out images before and after.
        verdict: what the scores say, in a few sentences.
        report: HTML page with held-out images side by side.
        seconds: of the whole call.
    """

    checkpoint: Path
    before: dict[str, float]
    after: dict[str, float]
    examples: list[Example]
    verdict: str
    report: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        paths = {"checkpoint": str(self.checkpoint), "report": str(self.report)}
        return {**asdict(self), **paths}


@contextmanager
def no_progress(what: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda done, total: None


def finetune(
    images: str | Path,
    output_dir: str | Path,
    *,
    start: str | Path = checkpoints.BUNDLED,
    captions_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: ProgressBars = no_progress,
) -> FineTuned:
    """Fine-tune a captioner on a folder of captioned images, in the style of their captions.

    Some images are held out and captioned before and after. Called again after an interruption, it
    continues.

    Args:
        images: folder of images with captions in any form that `transform` reads, or a caption
            folder.
        output_dir: where the caption folder, the recipe, the checkpoints and the report go.
        start: captioner to start from: `bundled`, a checkpoint, a run, or a model on the hub.
        captions_file: the caption file, where it is not found by its name.
        overrides: ``KEY=VALUE`` changes of the recipe that is chosen by the number of images.
        progress: name of what is counted -> a context with a function of (done, total).

    Raises:
        DataError: no captions are found, or there are fewer than 5 images.
        CheckpointError: there is no captioner to start from.
        Interrupted: a signal came during training; the state was saved first.
    """
    started, output_dir = time.perf_counter(), Path(output_dir)
    checkpoints.find_checkpoint(start)  # mistakes are found before images are prepared
    override_recipe(Recipe(), overrides)
    folder = caption_folder(Path(images), output_dir / "data", captions_file, progress)
    captioner = Captioner.from_pretrained(start, device)
    recipe = choose_recipe(captioner, folder, start, output_dir, device)
    recipe = override_recipe(recipe, overrides)
    write_atomically(output_dir / "recipe.yaml", recipe.to_yaml().encode())
    name, earlier = Path(images).resolve().name, output_dir / "before"
    if (earlier / METRICS_NAME).is_file():  # of an interrupted call
        before = read_run(earlier)
    else:
        before = evaluate(captioner, folder, recipe, earlier, name, progress)
    del captioner  # its memory is needed for training
    resume = AUTO if Path(recipe.checkpoint_dir).is_dir() else None
    with progress(TRAINING) as report:
        train(recipe, resume=resume, progress=report)
    captioner = Captioner.from_pretrained(recipe.checkpoint_dir, device)
    after = evaluate(captioner, folder, recipe, output_dir / "val", name, progress)
    sentence, page = verdict(before, after), output_dir / REPORT_NAME
    runs = [before, replace(after, name="after", curves=read_run(output_dir).curves)]
    write_report(page, runs, title=f"{output_dir.name}: before and after", lead=sentence)
    seconds, examples = time.perf_counter() - started, side_by_side(before, after)
    return FineTuned(output_dir, before.scores, after.scores, examples, sentence, page, seconds)


def evaluate(
    captioner: Captioner,
    folder: DataFolder,
    recipe: Recipe,
    output_dir: Path,
    name: str,
    progress: ProgressBars,
) -> ReportedRun:
    """Evaluate a captioner on the held-out images, and write the files of an evaluation.

    Args:
        name: of the images.
    """
    split: SplitName = "test" if "test" in folder.splits else "val"
    held_out, _ = readable_split(folder, split)
    data = {"name": name, "split": split, "fingerprint": folder.fingerprint}
    with progress("captioned") as report:
        run = evaluate_captioner(
            captioner, held_out, decode=recipe.decode, data=data,
            progress=lambda done: report(done, len(held_out)), model={"name": output_dir.name},
        )  # fmt: skip
    run = replace(run, recipe_yaml=recipe.to_yaml())
    write_evaluation(run, output_dir, title=f"{output_dir.name} on {name}")
    return run


def caption_folder(
    images: Path, made: Path, captions_file: str | Path | None, progress: ProgressBars
) -> DataFolder:
    """Return the images as a caption folder with held-out images: itself, or one that is made."""
    if images.is_dir() and is_caption_folder(images):
        folder = open_data_folder(images)
    else:
        source = open_source(images, captions_file=captions_file)
        undecided = sum(item.split is None for item in source.items())
        planning: dict[str, Any] = held_out_shares(undecided) if undecided else {}
        with progress("images") as report:
            workers = min(8, max(2, os.cpu_count() or 1))
            transform(
                source, made, workers=workers, progress=report, caption_style="raw", **planning
            )
        folder = open_data_folder(made)
    splits = set(folder.splits)
    if not {"train", "val"} <= splits:
        raise DataError(
            f"{images} has images for {' and '.join(sorted(splits))} alone: fine-tuning needs "
            "some for train and some for val; leave out the column `split` to have them drawn"
        )
    num_images = sum(len(folder.split(split)) for split in SPLITS if split in splits)
    if num_images < FEWEST_IMAGES:
        raise DataError(
            f"{images} has {num_images} captioned images: at least {FEWEST_IMAGES} are needed"
        )
    if num_images < USUAL_IMAGES:
        logger.warning(
            f"{num_images} images are few: a style can be learned from {USUAL_IMAGES} or more"
        )
    return folder


def held_out_shares(num_images: int) -> dict[str, Any]:
    """Return the split options for a number of images."""
    if num_images < ENOUGH_TO_STOP_EARLY:
        return {"split_by": "image", "val_fraction": 0.2, "test_fraction": 0.0}
    share = min(0.1, MOST_HELD_OUT / num_images)
    return {"split_by": "image", "val_fraction": share, "test_fraction": share}


def choose_recipe(
    captioner: Captioner, folder: DataFolder, start: str | Path, output_dir: Path, device: str
) -> Recipe:
    """Choose steps, learning rate and early stopping by the number of training images."""
    images, _ = readable_split(folder, "train")
    schedule = next(rule for rule in SCHEDULES if len(images) <= rule.most_images)
    steps = round(schedule.captions_seen / schedule.batch_size)
    captions_per_image = np.mean([len(image.captions) for image in images])
    first, longest = captioner.recipe, longest_caption(captioner, images)
    kept = {key: value for key, value in first.to_dict().items() if key in KEPT}
    longest_allowed = min(max(first.decode.max_new_tokens, longest), LONGEST_CAPTION)
    # Weights for images with a word in the prompt do not learn the style: after 40 images, 61% of
    # captions were in the style with such words, and 93% are without.
    decode = first.decode.replace(max_new_tokens=longest_allowed, object_threshold=0)
    is_bridge_alone = set(first.trainable) == {"bridge.*"}
    rate = schedule.learning_rate if is_bridge_alone else first.learning_rate
    stops_early = "test" in folder.splits
    return Recipe.build(
        {
            **kept,
            "decode": decode.to_dict(),
            "max_caption_tokens": max(first.max_caption_tokens, longest),
            "start_from": str(
                start if str(start) == checkpoints.BUNDLED else checkpoints.find_checkpoint(start)
            ),
            "data_dir": str(folder.root),
            "checkpoint_dir": str(output_dir / "checkpoints"),
            "log_dir": str(output_dir / "logs"),
            "device": device,
            "feature_cache_dtype": "int8",
            "feature_cache_views": schedule.views,
            "captions_per_image": max(n for n in (1, 2, 4, 5) if n == 1 or n <= captions_per_image),
            "batch_size": schedule.batch_size,
            "max_steps": steps,
            "num_epochs": -(-steps * schedule.batch_size // len(images)),  # max_steps decides
            "warmup_steps": 10,
            "learning_rate": rate,
            "min_lr": rate / 10,
            "gradient_clip_val": 1.0,
            "max_validation_images": MOST_HELD_OUT if stops_early else None,
            # On few images a style is still being learned when the loss of others already rises.
            "validate_every": f"{-(-steps // 6)} steps" if stops_early else f"{steps} steps",
            "early_stopping_patience": 2 if stops_early else None,
            "save_every": "1 minute",
        }
    )


def longest_caption(captioner: Captioner, images: Sequence[CaptionedImage]) -> int:
    """Return the tokens that nearly all captions fit into, EOS included."""
    captions = [caption for image in images for caption in image.captions]
    lengths = [len(ids) + 1 for ids in captioner.model.language_model.encode_all(captions)]
    return min(int(np.quantile(lengths, 0.99)), LONGEST_CAPTION)


def side_by_side(before: ReportedRun, after: ReportedRun) -> list[Example]:
    """Return the captions of some images before and after."""
    pairs = list(zip(before.predictions, after.predictions, strict=True))[:SHOWN]
    return [
        Example(str(old.image.path), old.caption, new.caption, new.image.captions[0])
        for old, new in pairs
    ]


def verdict(before: ReportedRun, after: ReportedRun) -> str:
    """Return what the scores of held-out images say, in a few sentences.

    Perplexity of people's captions is steady on a few images; CIDEr is not.
    """
    old, new = before.scores, after.scores
    cider, perplexity = (
        f"{name} {old[name]:.{digits}f} before, {new[name]:.{digits}f} after"
        for name, digits in (("CIDEr", 3), ("perplexity", 1))
    )
    change = f"On {new['num_images']} held-out images: {cider}; {perplexity}."
    is_likelier = new["perplexity"] < old["perplexity"]
    if new["visual_gain"] < BLIND_BELOW:
        return f"It ignores the images. {change} Check that captions and images belong together."
    if new["CIDEr"] > old["CIDEr"]:
        if is_likelier:
            return f"It learned your captions. {change}"
        return f"It learned your captions, but overfits. {change} Add images if you can."
    if is_likelier and new["num_images"] < ENOUGH_FOR_CIDER:
        return f"It learned how captions are worded. {change} CIDEr of so few images is chance."
    if is_likelier:
        return f"It learned how captions are worded, and describes no better. {change} Add images."
    return f"Fine-tuning did not help. {change} Add images, or check their captions."
