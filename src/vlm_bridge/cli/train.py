"""`vlm-training` and `vlm-bridge train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


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
        False, "--force", help="Continue although recipe or data differ from the checkpoint's."
    ),
) -> None:
    """Train the recipe of `--config`, of the checkpoint to resume, or training-default."""
    from vlm_bridge import runtime
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.configuration import (
        DEFAULT_RECIPE,
        load_recipe,
        override_recipe,
        shipped_recipe,
    )

    echo = typer.echo if runtime.process_rank() == 0 else lambda line: None
    # A mistyped recipe is an error before the seconds that the trainer's imports take.
    if config is None and resume in (None, "auto"):
        config = shipped_recipe(DEFAULT_RECIPE)
        echo(f"recipe: {config} (another one with --config)")
    recipe = load_recipe(config, overrides or ()) if config is not None else None

    from vlm_bridge.training_strategy.trainer import resumed_recipe
    from vlm_bridge.training_strategy.trainer import train as run_training

    quiet_transformers()
    if recipe is None:
        recipe = override_recipe(resumed_recipe(resume, echo), overrides or ())
    with exit_when_interrupted():
        result = run_training(
            recipe,
            resume=resume or recipe.resume_from_checkpoint,
            force=force,
            say=lambda line: print(line, flush=True),
        )
    scores = result.decoded
    captions = (
        f", last captions: BLEU-4 {scores.bleu4:.4f}, CIDEr {scores.cider:.4f}" if scores else ""
    )
    echo(
        f"done: {result.steps} steps in {result.seconds / 60:.1f} min, best validation loss "
        f"{result.best_loss:.4f}{captions}; checkpoints in {result.checkpoint_dir}\n"
        f"next: vlm-bridge caption IMAGE --checkpoint {result.checkpoint_dir}"
    )


@contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """Turn an interruption that was saved into one line and the signal's exit code."""
    from vlm_bridge import runtime
    from vlm_bridge.training_strategy.trainer import Interrupted

    try:
        yield
    except Interrupted as interruption:
        if runtime.process_rank() == 0:
            typer.echo(f"{interruption}; continue with --resume {interruption.saved_to}", err=True)
        raise typer.Exit(interruption.exit_code) from None
