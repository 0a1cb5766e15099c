"""`vlm-training` and `vlm-bridge train`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

logger = logging.getLogger(__name__)


def train(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Recipe overrides, e.g. bridge.depth=4."
    ),
    config: Path = typer.Option(
        None, "--config", "-c", help="Recipe (YAML); recipes that ship are in config/."
    ),
    resume: str = typer.Option(
        None,
        "--resume",
        metavar="CKPT|FOLDER|auto",
        help="Continue this checkpoint, or a folder's newest sound one; auto: that of the recipe's "
        "checkpoint_dir, and a new run where there is none.",
    ),
    force: bool = typer.Option(
        False, "--force", help="Continue although recipe or data are others than the checkpoint's."
    ),
) -> None:
    """Train the bridge of a recipe.

    The recipe is `--config`'s; with `--resume` alone the checkpoint's own; else training-default.
    """
    from vlm_bridge import configuration
    from vlm_bridge.cli.quiet import quiet_transformers

    # A mistyped recipe is refused before the seconds that the trainer's imports take.
    if config is None and resume in (None, "auto"):
        config = configuration.shipped_recipe(configuration.DEFAULT_RECIPE)
        logger.info(f"recipe: {config} (another one with --config)")
    recipe = configuration.load_recipe(config, overrides or ()) if config is not None else None

    from vlm_bridge.training_strategy.resume import resumed_recipe
    from vlm_bridge.training_strategy.trainer import train as run_training

    quiet_transformers()
    if recipe is None:
        recipe = configuration.override_recipe(resumed_recipe(resume), overrides or ())
    with exit_when_interrupted():
        result = run_training(recipe, resume=resume or recipe.resume_from_checkpoint, force=force)
    scores = ""
    if decoded := result.decoded:
        scores = f", last captions: BLEU-4 {decoded.bleu4:.4f}, CIDEr {decoded.cider:.4f}"
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
            line = f"{interruption}; continue with --resume {interruption.saved_to}"
            typer.echo(line, err=True)
        raise typer.Exit(interruption.exit_code) from None
