"""`vlm-bridge export`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.cli import options
from vlm_bridge.cli.options import Option
from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge.captioning.publish import CardFacts
    from vlm_bridge.configuration import Recipe

ORIGINAL_HEADS = 8  # of the original project's bridge; its checkpoints do not name them
Layout = StrEnum("Layout", ["huggingface", "original"])
Dtype = StrEnum("Dtype", ["float16", "bfloat16", "float32", "int8", "int4"])


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, run folder, or hub model.")],
    output_dir: Annotated[Path, Option(help="Where to write; made if need be.")],
    format: Annotated[Layout, Option(help="original is one .pth file.")] = Layout.huggingface,
    config: options.Config = None,
    dtype: Annotated[Dtype | None, Option(help="Of the weights. (default: as stored)")] = None,
    title: Annotated[str | None, Option(help="Title of the model card.")] = None,
    license: Annotated[str | None, Option(help="License for the model card, e.g. mit.")] = None,
    dataset: Annotated[str | None, Option(help="The training data on the model card.")] = None,
    metrics: Annotated[Path | None, Option(help="Scores. (default: the run's last)")] = None,
    overwrite: options.Overwrite = False,
    push_to_hub: Annotated[str | None, Option(metavar="REPO", help="Also upload it.")] = None,
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Write a trained captioner as a Hugging Face folder, or in the original project's layout."""
    original = format == Layout.original
    if original and (push_to_hub or dtype in ("int8", "int4")):
        raise UsageError("--push-to-hub, int8 and int4 are for Hugging Face folders: no --format")
    if private and not push_to_hub:
        raise UsageError("--private needs --push-to-hub REPO")

    from vlm_bridge.captioning import publish
    from vlm_bridge.configuration import load_recipe
    from vlm_bridge.formats.dinov2_gemma import save_original
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    options.quiet_transformers()
    target = output_dir / (checkpoints.BEST_WEIGHTS if original else checkpoints.WEIGHTS_NAME)
    options.refuse_existing(target, overwrite)
    where = checkpoints.find_checkpoint(checkpoint)
    content = checkpoints.load_checkpoint(where)
    given = load_recipe(config) if config else None
    recipe = checkpoints.recipe_of(content, where, given)
    if dtype is not None:
        content["weights"] = checkpoints.stored_as(content["weights"], dtype.name)
    facts = publish.CardFacts(title, license, dataset, _scores(where, metrics))
    if original:
        save_original(target, recipe, content, where)
    else:
        publish.write_huggingface_folder(content, recipe, output_dir, facts)
    for line in _open_points(recipe, facts, original):
        options.note(f"note: {line}")
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) from {where}")
    if push_to_hub:
        print(f"pushed to {publish.push_to_hub(output_dir, push_to_hub, private=private)}")
    else:
        print(f"next: vlm-bridge caption IMAGE --checkpoint {output_dir}")


def _scores(checkpoint: Path, given: Path | None) -> dict[str, Any] | None:
    """Return given scores, or those of the last evaluation beside a checkpoint or in its run."""
    from vlm_bridge.evaluation import run_folder

    if given is None:
        folder = checkpoint.parent
        places = (folder, folder.parent) if folder.name == "checkpoints" else (folder,)
        written = [file for place in places for file in run_folder.evaluations_in(place)]
        given = written[-1] if written else None
    return dict(run_folder.read_scores(given).metrics) if given else None


def _open_points(recipe: Recipe, facts: CardFacts, original: bool) -> Iterator[str]:
    """Yield what is left open, or needs care on other machines."""
    from vlm_bridge.captioning.publish import is_local

    for name in filter(is_local, [*recipe.vision_encoder.names, recipe.language_model.name]):
        yield f"{name} is a folder of this machine: others must have it in the same place"
    if original and (heads := recipe.bridge.num_heads) != ORIGINAL_HEADS:
        yield f"in the original project, construct its FullModel with bridge_num_heads={heads}"
    if not original and not facts.license:
        yield "the model card names no license: give --license, or edit README.md"
    if not original and not facts.metrics:
        yield "the model card has no scores: evaluate with --output-dir RUN/val before exporting"
