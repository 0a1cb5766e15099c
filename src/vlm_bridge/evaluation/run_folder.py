"""Files of a run for its report: training log, recipe and evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_bridge.errors import CheckpointError, DataError
from vlm_bridge.evaluation.predictions import PREDICTIONS_NAME, read_predictions
from vlm_bridge.evaluation.report import ReportedRun

HISTORY_NAME = "history.jsonl"
METRICS_NAME = "metrics.json"
REPORT_NAME = "report.html"
NOT_CURVES = frozenset(
    {"step", "epoch", "num_images", "samples_per_second", "tokens_per_second", "padding_share"}
)
SERIES = {"decoded": "validation", "samples": "validation"}
Curve = list[tuple[int, float]]
"""Points (training step, value)."""
HOW = "`vlm-bridge evaluate ... --output-dir FOLDER` (or --json FILE) writes them"
NOT_EVALUATED = (
    "Not evaluated yet: `vlm-bridge evaluate --checkpoint RUN --data-dir DATA "
    "--output-dir RUN/val` adds scores and images."
)


def evaluations_in(path: Path) -> list[Path]:
    """Return score files of a JSON file, an evaluation's folder, or a run folder, oldest first."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    if (path / METRICS_NAME).is_file():
        return [path / METRICS_NAME]
    return sorted(path.glob(f"*/{METRICS_NAME}"), key=lambda file: file.stat().st_mtime)


def read_metrics(file: Path) -> dict[str, Any]:
    """Read the scores of an evaluation.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the scores in {file}: {error}") from error
    if not isinstance(content, dict) or not {"CIDEr", "num_images"} <= content.keys():
        raise DataError(f"{file} does not hold the scores of an evaluation: {HOW}")
    return content


def model_name(metrics: Mapping[str, Any], file: Path) -> str:
    """Return the recorded name, or else the name of the run or file."""
    recorded = (metrics.get("model") or {}).get("name")
    unrecorded = _run_of(file).resolve().name if file.name == METRICS_NAME else file.stem
    return str(recorded or unrecorded)


def read_run(path: Path) -> ReportedRun:
    """Read the parts of a run for a report. Missing ones become notes.

    Args:
        path: a run folder (``logs``, ``checkpoints``, evaluations in subfolders), an evaluation's
            folder, alone or within a run folder, or a JSON file of scores.

    Raises:
        DataError: there is nothing to report, or a part is damaged.
    """
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    if not path.exists():
        raise DataError(f"no run at {path}: give the folder of a training or of an evaluation")
    notes: list[str] = []
    root, evaluations = _run_of(path), evaluations_in(path)
    metrics, predictions = {}, []
    name = root.resolve().name
    if evaluations:
        *earlier, file = evaluations
        metrics = read_metrics(file)
        name = model_name(metrics, file)
        # A file that --json wrote may lie beside another evaluation's predictions.
        if file.name == METRICS_NAME:
            predictions = read_predictions(file.parent / PREDICTIONS_NAME)
        if not predictions:
            notes.append(f"No {PREDICTIONS_NAME}: evaluate with --output-dir to see images.")
        if earlier:
            notes.append(f"Scores of {file.parent}, the latest of {len(evaluations)} evaluations.")
    else:
        notes.append(NOT_EVALUATED)
    curves, recipe = read_curves(root / "logs"), None
    if not curves:
        notes.append(f"No training log at {root / 'logs'}: no curves.")
    if checkpoints.has_checkpoint(root):
        where = checkpoints.checkpoint_path(root)
        try:
            content = checkpoints.load_checkpoint(where)
            recipe = checkpoints.recipe_of(content, where, to_build=False)
        except CheckpointError as error:
            notes.append(f"No recipe: {error}")
    else:
        notes.append(f"No checkpoint in {root}: no recipe.")
    if not (metrics or curves or recipe):
        raise DataError(
            f"{path} holds neither an evaluation nor a training log nor a checkpoint: give a run "
            "folder"
        )
    trained_on = Path(recipe.data_dir).name if recipe else ""
    dataset = (metrics.get("data") or {}).get("name") or trained_on
    recipe_yaml = recipe.to_yaml() if recipe else ""
    return ReportedRun(name, dataset, metrics, predictions, curves, recipe_yaml, notes=notes)


def _run_of(path: Path) -> Path:
    """Return the run folder itself, or the one around an evaluation."""
    folder = path if path.is_dir() else path.parent
    parent = folder.resolve().parent
    return parent if _is_run(parent) and not _is_run(folder) else folder


def _is_run(folder: Path) -> bool:
    return (folder / "logs").is_dir() or (folder / "checkpoints").is_dir()


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Read a training log as ``series/quantity`` (``train/loss``) -> points; empty without a log.

    A resumed run has logged some steps twice; the later entry counts.

    Raises:
        DataError: a line is no event. The last one may be half written.
    """
    path = log_dir / HISTORY_NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            series, step = SERIES.get(event["event"], event["event"]), event["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not an event of a training run") from None
        for quantity, value in event.items():
            if isinstance(value, int | float) and quantity not in NOT_CURVES:
                curve = curves.setdefault(f"{series}/{quantity}", [])
                while curve and curve[-1][0] >= step:
                    curve.pop()
                curve.append((step, value))
    return curves
