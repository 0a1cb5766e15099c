"""`vlm-bridge export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Layout(StrEnum):
    """What an exported checkpoint is for."""

    huggingface = "huggingface"
    original = "original"


def export(
    checkpoint: str = typer.Argument(..., help="A checkpoint, the folder of a run, or a model on the hub."),
    output_dir: Path = typer.Option(..., help="Where to write; made if need be."),
    format: Layout = typer.Option(
        Layout.huggingface,
        help="A Hugging Face folder, or a .pth of the original project's layout.",
    ),
    config: Path = typer.Option(
        None, "--config", "-c", help="Recipe of a checkpoint that names none (the original project's)."
    ),
    license: str = typer.Option(None, help="Licence for the model card, e.g. mit."),
    dataset: str = typer.Option(None, help="Training data for the model card, e.g. daniel3303/GroundCap."),
    metrics: Path = typer.Option(
        None, help="Scores for the model card. (default: a metrics.json beside the checkpoint)"
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier export."),
    push_to_hub: str = typer.Option(
        None, metavar="REPO", help="Also upload, as owner/model; the token is HF_TOKEN."
    ),
    private: bool = typer.Option(False, "--private", help="Make the hub's repository private."),
) -> None:
    """Write a trained captioner for others: a Hugging Face folder, or the original project's layout."""
    from vlm_bridge.errors import UsageError

    original = format is Layout.original
    if push_to_hub and original:
        raise UsageError("--push-to-hub uploads a Hugging Face folder: leave --format out")
    if private and not push_to_hub:
        raise UsageError("--private says how to push: it needs --push-to-hub REPO")

    from vlm_bridge import publishing
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.model_architecture.interchange import WEIGHTS_NAME
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    quiet_transformers()
    target = output_dir / (checkpoints.BEST_WEIGHTS if original else WEIGHTS_NAME)
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another --output-dir, or replace it with --overwrite")
    where = checkpoints.find_checkpoint(checkpoint)
    content = checkpoints.load_checkpoint(where)
    recipe = checkpoints.recipe_of(content, where, load_recipe(config) if config else None)
    if original:
        checkpoints.save_original(target, recipe, content["weights"], where)
    else:
        facts = publishing.CardFacts(license, dataset, publishing.read_metrics(where, metrics))
        publishing.write_huggingface_folder(content, recipe, output_dir, facts)
    for note in publishing.export_notes(recipe, original=original, licensed=license is not None):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) from {where}")
    if push_to_hub:
        typer.echo(f"pushed to {publishing.push_to_hub(output_dir, push_to_hub, private=private)}")
    else:
        typer.echo(f"next: vlm-bridge caption PICTURE --checkpoint {output_dir}")
