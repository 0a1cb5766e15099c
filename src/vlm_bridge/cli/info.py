"""`vlm-bridge info`."""

from __future__ import annotations

from pathlib import Path

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
    from vlm_bridge.model_architecture.budget import budget_of

    quiet_transformers()
    budget = budget_of(load_recipe(config or shipped_recipe(DEFAULT_RECIPE), overrides or ()))
    if json_output:
        typer.echo(json.dumps(budget.to_dict(), indent=2))
        return
    table = Table("component", "role", "pretrained", "trainable", "parameters")
    for part in budget.components:
        trained = "all" if part.trainable == part.parameters else f"{part.trainable:,}"
        pretrained = "yes" if part.pretrained else "no"
        count = f"{part.parameters:,}"
        table.add_row(part.name, part.role, pretrained, trained if part.trainable else "no", count)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    tokens, width = budget.features_shape
    console.print(f"trainable share   {budget.trainable_share:.2%}")
    console.print(
        f"features          [B, {tokens}, {width}]: {tokens} tokens x {width}, "
        f"{budget.soft_tokens} soft tokens before the text",
        markup=False,
    )
