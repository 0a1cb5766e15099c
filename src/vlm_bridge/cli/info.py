"""`vlm-bridge info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_bridge.cli import options

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe


def info(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Recipe overrides."),
    config: Path = typer.Option(
        None, "--config", "-c", help="Recipe (YAML); training-default without it."
    ),
    as_json: options.AsJson = False,
) -> None:
    """Count the parameters of a recipe's parts and show the feature shape. Reads no weights."""
    from rich.console import Console
    from rich.table import Table

    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.configuration import DEFAULT_RECIPE, load_recipe, shipped_recipe

    quiet_transformers()
    found = parts_of(load_recipe(config or shipped_recipe(DEFAULT_RECIPE), overrides or ()))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("component", "role", "pretrained", "trainable", "parameters")
    for part in found["components"]:
        total, trainable = part["parameters"], part["trainable"]
        trained = "no" if not trainable else "all" if trainable == total else f"{trainable:,}"
        pretrained = "yes" if part["pretrained"] else "no"
        table.add_row(part["name"], part["role"], pretrained, trained, f"{total:,}")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    tokens, width = found["features_shape"]
    console.print(f"trainable share   {found['trainable_share']:.2%}")
    shape = f"[B, {tokens}, {width}]: {tokens} tokens x {width}"
    soft = f"{found['soft_tokens']} soft tokens before the text"
    console.print(f"features          {shape}, {soft}", markup=False)


def parts_of(recipe: Recipe) -> dict[str, Any]:
    """Count the parameters of a recipe's parts, from shapes alone (on the meta device)."""
    from vlm_bridge.model_architecture.captioner import build_captioner

    model = build_captioner(recipe, meta=True)
    names = {
        "vision_encoder": recipe.vision_encoder.name,
        "bridge": recipe.bridge.kind,
        "language_model": recipe.language_model.name,
    }
    components: list[dict[str, Any]] = []
    for role, name in names.items():
        sizes = [(p.numel(), p.requires_grad) for p in getattr(model, role).parameters()]
        counts = {
            "parameters": sum(count for count, _ in sizes),
            "trainable": sum(count for count, is_trained in sizes if is_trained),
        }
        components.append({"name": name, "role": role, **counts, "pretrained": role != "bridge"})
    share = sum(c["trainable"] for c in components) / sum(c["parameters"] for c in components)
    return {
        "components": components,
        "features_shape": [model.vision_encoder.num_tokens, model.vision_encoder.embed_dim],
        "soft_tokens": model.bridge.num_soft_tokens,
        "trainable_share": share,
    }
