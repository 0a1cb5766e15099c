"""``vlm-bridge compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vlm_bridge.evaluation.compare import Comparison


def compare(
    scores: list[Path] = typer.Argument(
        ...,
        help="Runs: run folders with an evaluation, or JSON files or output folders of `vlm-bridge evaluate`.",
    ),
    reference: str | None = typer.Option(
        None, help="What the others are a share of: a name or path of these. (default: the first)"
    ),
    force: bool = typer.Option(
        False,
        "--force",
        help="Show side by side what should not be compared; the reasons become notes.",
    ),
    json_output: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    html: Path | None = typer.Option(
        None, help="Also write the report of all of them side by side to this HTML file."
    ),
) -> None:
    """Print scores side by side, and each as a share of a reference; refuse those of other data."""
    import json

    from vlm_bridge.evaluation.compare import compare as compare_scores
    from vlm_bridge.evaluation.compare import write_comparison

    comparison = compare_scores(scores, reference=reference, force=force)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(html, comparison)
    if json_output:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
        return
    for note in comparison.notes:
        typer.echo(f"note: {note}", err=True)
    _print_table(comparison)
    if html:
        print(f"report: {html}", file=sys.stderr)


def _print_table(comparison: Comparison) -> None:
    """A table on a terminal, tab-separated lines on a pipe; behind each score its share of the reference."""
    others = [run for run in comparison.runs if run is not comparison.reference]
    header = ["metric", comparison.reference.name]
    for run in others:
        header += [run.name, f"% of {comparison.reference.name}"]
    rows = []
    for metric in comparison.metrics:
        row = [metric, _number(comparison.reference.value(metric))]
        for run in others:
            share = comparison.share(run, metric)
            row += [_number(run.value(metric)), "-" if share is None else f"{100 * share:.1f}"]
        rows.append(row)
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (header, *rows)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="scores are fractions, not percent")
    for index, title in enumerate(header):
        table.add_column(Text(title), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
