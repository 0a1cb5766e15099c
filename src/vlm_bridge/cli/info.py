"""`vlm-bridge info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def info(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Recipe overrides."),
    config: Path = typer.Option(
        None, "--config", "-c", help="Recipe (YAML); training-default without it."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print JSON for machines."),
) -> None:
    """Count the parameters of a recipe's parts and show the feature shape. Reads no weights."""
    import json

    from rich.console import Console
    from rich.table import Table

    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.configuration import DEFAULT_RECIPE, load_recipe, shipped_recipe

    quiet_transformers()
    found = parts_of(load_recipe(config or shipped_recipe(DEFAULT_RECIPE), overrides or ()))
    if json_output:
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
    console.print(
        f"features          [B, {tokens}, {width}]: {tokens} tokens x {width}, "
        f"{found['soft_tokens']} soft tokens before the text",
        markup=False,
    )


def parts_of(recipe: Any) -> dict[str, Any]:
    """Count the parameters of a recipe's parts, from shapes alone (on the meta device)."""
    from vlm_bridge.model_architecture.captioner import build_captioner

    model = build_captioner(recipe, meta=True)
    components = []
    for name, role in (
        (recipe.vision_encoder.name, "vision_encoder"),
        (recipe.bridge.kind, "bridge"),
        (recipe.language_model.name, "language_model"),
    ):
        sizes = [(p.numel(), p.requires_grad) for p in getattr(model, role).parameters()]
        component = {"name": name, "role": role, "parameters": sum(n for n, _ in sizes)}
        component["trainable"] = sum(n for n, is_trained in sizes if is_trained)
        component["pretrained"] = role != "bridge"
        components.append(component)
    share = sum(c["trainable"] for c in components) / sum(c["parameters"] for c in components)
    return {
        "components": components,
        "features_shape": [model.vision_encoder.num_tokens, model.vision_encoder.embed_dim],
        "soft_tokens": model.bridge.num_soft_tokens,
        "trainable_share": share,
    }
