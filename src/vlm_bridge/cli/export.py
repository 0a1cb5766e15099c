"""`vlm-bridge export`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path

import typer


class Layout(StrEnum):
    """What an exported checkpoint is for."""

    huggingface = "huggingface"
    original = "original"


class Dtype(StrEnum):
    """How the trained weights are stored; a captioner computes in its recipe's dtype all the same."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    int8 = "int8"
    int4 = "int4"


def export(
    checkpoint: str = typer.Argument(
        ..., help="A checkpoint, the folder of a run, or a model on the hub."
    ),
    output_dir: Path = typer.Option(..., help="Where to write; made if need be."),
    format: Layout = typer.Option(
        Layout.huggingface,
        help="A Hugging Face folder, or a .pth of the original project's layout.",
    ),
    config: Path = typer.Option(
        None,
        "--config",
        "-c",
        help="Recipe of a checkpoint that names none (the original project's).",
    ),
    dtype: Dtype = typer.Option(
        None, help="How to store the weights. (default: as the checkpoint does)"
    ),
    title: str = typer.Option(None, help="Title of the model card. (default: the folder's name)"),
    license: str = typer.Option(None, help="Licence for the model card, e.g. mit."),
    dataset: str = typer.Option(
        None, help="Training data for the model card, e.g. daniel3303/GroundCap."
    ),
    metrics: Path = typer.Option(
        None, help="Scores for the model card. (default: the last evaluation in the run's folder)"
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
    if original and dtype in (Dtype.int8, Dtype.int4):
        raise UsageError(f"the original project's layout has no {dtype}: use another --dtype")
    if private and not push_to_hub:
        raise UsageError("--private needs --push-to-hub REPO")

    from vlm_bridge import publishing
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.formats.dinov2_gemma import save_original
    from vlm_bridge.model_architecture.tensor_files import WEIGHTS_NAME
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    quiet_transformers()
    target = output_dir / (checkpoints.BEST_WEIGHTS if original else WEIGHTS_NAME)
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target} exists; choose another --output-dir, or replace it with --overwrite"
        )
    where = checkpoints.find_checkpoint(checkpoint)
    content = checkpoints.load_checkpoint(where)
    given = load_recipe(config) if config else None
    recipe = checkpoints.recipe_of(content, where, given, to_build=False)
    if dtype is not None:
        content["weights"] = checkpoints.stored_as(content["weights"], dtype.value)
    facts = publishing.CardFacts(title, license, dataset)
    if original:
        save_original(target, recipe, content, where)
    else:
        facts = dataclasses.replace(facts, metrics=publishing.read_metrics(where, metrics))
        publishing.write_huggingface_folder(content, recipe, output_dir, facts)
    for note in publishing.export_notes(recipe, facts, original=original):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) from {where}")
    if push_to_hub:
        typer.echo(f"pushed to {publishing.push_to_hub(output_dir, push_to_hub, private=private)}")
    else:
        typer.echo(f"next: vlm-bridge caption PICTURE --checkpoint {output_dir}")
