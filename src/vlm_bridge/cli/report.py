"""``vlm-bridge report``."""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_bridge.cli.progress import note


def report(
    run: Path = typer.Argument(
        ..., help="Run folder, an evaluation's folder, or a JSON file of scores."
    ),
    output: Path = typer.Option(
        None, "-o", "--output", help="HTML file. (default: report.html in the run's folder)"
    ),
) -> None:
    """Write one HTML file about a run: curves, scores, images, captions, recipe, environment."""
    from vlm_bridge.evaluation.report import write_report
    from vlm_bridge.evaluation.run_folder import REPORT_NAME, read_run

    reported = read_run(run)
    path = output or (run if run.is_dir() else run.parent) / REPORT_NAME
    on = f" on {reported.dataset}" if reported.dataset else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, [reported], title=f"{reported.name}{on}")
    for line in reported.notes:
        note(f"note: {line}")
    print(f"report: {path}")
