"""`vlm-training`, `vlm-bridge train` and `vlm-bridge quickstart`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option

if TYPE_CHECKING:
    from vlm_bridge.evaluation.run_folder import ReportedRun

logger = logging.getLogger(__name__)

NEXT = """
What to type next:
  vlm-bridge caption {folder}/data/test/images --checkpoint {folder}
  vlm-data transform --source flickr8k --input-dir DIR --output-dir data/flickr8k
  vlm-training --config config/lite-flickr8k.yaml
  vlm-bridge caption PHOTO.jpg --checkpoint runs/lite-flickr8k"""


def train(
    overrides: options.Overrides = None,
    config: options.RecipeFile = None,
    resume: Annotated[str | None, Option(metavar="CKPT|FOLDER|auto")] = None,
    force: Annotated[bool, Option("--force", help="Resume with other data or recipe.")] = False,
) -> None:
    """Train the bridge of a recipe; with `--resume` alone, of the checkpoint's own recipe.

    `--resume` takes a checkpoint, or a folder whose newest sound one it continues; auto is the
    recipe's checkpoint_dir, and begins a new run where nothing is there.
    """
    from vlm_bridge import configuration

    # A mistyped recipe is refused before the seconds that the trainer's imports take.
    if config is None and resume in (None, "auto"):
        config = configuration.shipped_recipe(configuration.DEFAULT_RECIPE)
        logger.info(f"recipe: {config} (another one with --config)")
    given = configuration.load_recipe(config, overrides or ()) if config is not None else None

    from vlm_bridge.training_strategy.resume import resumed_recipe
    from vlm_bridge.training_strategy.trainer import train as run_training

    options.quiet_transformers()
    recipe = given or configuration.override_recipe(resumed_recipe(str(resume)), overrides or ())
    resume = resume or recipe.resume_from_checkpoint
    with exit_when_interrupted(), options.show_progress("steps", plain_lines=False) as progress:
        result = run_training(recipe, resume=resume, force=force, progress=progress)
    scores = ""
    if decoded := result.decoded:
        scores = f", last captions: BLEU-4 {decoded['bleu4']:.4f}, CIDEr {decoded['cider']:.4f}"
    logger.info(
        f"done: {result.steps} steps in {result.seconds / 60:.1f} min, best validation loss "
        f"{result.best_loss:.4f}{scores}; checkpoints in {result.checkpoint_dir}"
    )
    logger.info(f"next: vlm-bridge caption IMAGE --checkpoint {result.checkpoint_dir}")


@contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """Turn an interruption that was saved into one line and the signal's exit code."""
    from vlm_bridge import device
    from vlm_bridge.training_strategy.resume import Interrupted

    try:
        yield
    except Interrupted as interruption:
        if device.process_rank() == 0:
            resume = f"continue with --resume {interruption.saved_to}"
            options.note(f"{interruption}; {resume}", always=True)
        raise typer.Exit(interruption.exit_code) from None


def quickstart(
    overrides: options.Overrides = None,
    output_dir: Path = Path("runs/quickstart"),
    photo_checkpoint: Path = Path("runs/lite-flickr8k"),
) -> None:
    """Draw scenes, train a bridge on this machine's CPU, and caption images it never saw.

    It captions photos too where there is a `--photo-checkpoint`, a bridge trained on photos.
    """
    from vlm_bridge import configuration
    from vlm_bridge import quickstart as first_minutes
    from vlm_bridge.captioning.pipeline import Captioner

    options.quiet_transformers()
    located = [f"output_dir={output_dir}", f"data_dir={output_dir / 'data'}"]
    recipe = configuration.load_recipe(
        configuration.shipped_recipe("quickstart"), [*located, *(overrides or ())]
    )
    workers = os.cpu_count() or 1
    with exit_when_interrupted(), options.show_progress("steps", plain_lines=False) as progress:
        metrics, evaluation = first_minutes.run(
            recipe, output_dir, workers=workers, progress=progress
        )
    _print_scores(metrics, evaluation)
    print(f"Open {output_dir / 'report.html'} and {output_dir / 'contact_sheet.png'}.")

    if photo_checkpoint.exists() and (photos := first_minutes.real_photographs()):
        captioner = Captioner.from_pretrained(photo_checkpoint)
        print(f"\nReal photos, with the bridge in {photo_checkpoint}:")
        captions = captioner.caption([photo for _, photo in photos])
        for (name, _), caption in zip(photos, captions, strict=True):
            print(f"  {name}: {caption.caption}")
    print(NEXT.format(folder=output_dir))


def _print_scores(metrics: dict[str, Any], evaluation: ReportedRun) -> None:
    print()
    for prediction in evaluation.predictions[:8]:
        image = prediction.image
        print(f"  {image.path.name}: {prediction.caption}   (a reference: {image.captions[0]})")
    print(
        "\nOn {num_images} scenes made of color-shape pairs that training never showed:\n"
        "  color and shape right    {colour_shape_accuracy:.1%}\n"
        "  relation right           {relation_accuracy:.1%}\n"
        "  visual gain              {visual_gain:.2f} nats per token\n"
        "  CIDEr {CIDEr:.2f}, BLEU-4 {BLEU-4:.2f}, perplexity {perplexity:.2f}\n"
        "  {total_seconds:.0f} s in all, {train_seconds:.0f} s of it training, "
        "peak memory {peak_rss_gib:.1f} GiB".format(**metrics)
    )
