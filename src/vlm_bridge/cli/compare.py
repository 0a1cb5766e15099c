"""``vlm-bridge compare``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from vlm_bridge.cli.progress import note


def compare(
    scores: list[Path] = typer.Argument(
        ..., help="Run folders with an evaluation, or files or folders that `evaluate` wrote."
    ),
    reference: str = typer.Option(
        None, help="What the others are a share of: a name or path of these. (default: the first)"
    ),
    force: bool = typer.Option(False, "--force", help="Compare different data all the same."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    html: Path = typer.Option(None, help="Also write a report of all of them to this HTML file."),
) -> None:
    """Print scores side by side, and each as a share of a reference; refuse those of other data."""
    from vlm_bridge.evaluation.compare import compare as compare_scores
    from vlm_bridge.evaluation.compare import write_comparison

    comparison = compare_scores(scores, reference=reference, force=force)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(html, comparison)
    if json_output:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
        return
    for line in comparison.notes:
        note(f"note: {line}")
    name = comparison.reference.name
    others = [run for run in comparison.runs if run is not comparison.reference]
    header = ["metric", name]
    for run in others:
        header += [run.name, f"% of {name}"]
    rows = []
    for metric in comparison.metrics:
        row = [metric, _number(comparison.reference.value(metric))]
        for run in others:
            share = comparison.share(run, metric)
            row += [_number(run.value(metric)), "-" if share is None else f"{100 * share:.1f}"]
        rows.append(row)
    print_rows(rows, header)
    if html:
        note(f"report: {html}")


def print_rows(rows: Sequence[Sequence[str]], header: Sequence[str] = (), note: str = "") -> None:
    """Print a table of scores on a terminal, tab-separated lines on a pipe."""
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (header, *rows) if row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=bool(header), caption=f"{note}scores are fractions, not percent")
    for index, title in enumerate(header or rows[0]):
        table.add_column(Text(title), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
