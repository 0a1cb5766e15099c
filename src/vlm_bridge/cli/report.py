"""``vlm-bridge report``."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    run: Path = typer.Argument(
        ..., help="Run folder, an evaluation's folder, or a JSON file of scores."
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="HTML file to write. (default: report.html in the run's folder)",
    ),
) -> None:
    """Write one HTML file about a run: recipe, curves, scores, pictures, statistics of its captions, environment."""
    from vlm_bridge.errors import DataError
    from vlm_bridge.evaluation.report import write_report
    from vlm_bridge.evaluation.run import REPORT_NAME
    from vlm_bridge.evaluation.run_folder import read_run
    from vlm_bridge.files import made_folder

    reported = read_run(run)
    path = output or (run if run.is_dir() else run.parent) / REPORT_NAME
    on = f" on {reported.dataset}" if reported.dataset else ""
    try:
        with made_folder(path.parent):
            write_report(path, [reported], title=f"{reported.name}{on}")
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error} (free some space, or choose another file with --output)"
        ) from error
    for note in reported.notes:
        typer.echo(f"note: {note}", err=True)
    print(f"report: {path}")
