"""Files of a run for its report: training log, recipe and evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_bridge.errors import CheckpointError, DataError
from vlm_bridge.evaluation.predictions import PREDICTIONS_NAME, Prediction, read_predictions
from vlm_bridge.evaluation.report import ReportedRun

T = TypeVar("T")
HISTORY_NAME = "history.jsonl"
METRICS_NAME = "metrics.json"
NOT_CURVES = frozenset(
    {"step", "epoch", "num_images", "samples_per_second", "tokens_per_second", "padding_share"}
)

SERIES = {"decoded": "validation", "samples": "validation"}
Curve = list[tuple[int, float]]
"""Points (training step, value)."""
HOW = "`vlm-bridge evaluate ... --output-dir FOLDER` (or --json FILE) writes them"


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
    return str(
        recorded or (_run_of(file).resolve().name if file.name == METRICS_NAME else file.stem)
    )


def read_run(path: Path) -> ReportedRun:
    """Read the parts of a run for a report. Missing and damaged ones become notes.

    Args:
        path: a run folder (``logs``, ``checkpoints``, evaluations in subfolders), an evaluation's folder, alone or
            within a run folder, or a JSON file of scores.

    Raises:
        DataError: there is nothing to report.
    """
    if not path.exists():
        raise DataError(f"no run at {path}: give the folder of a training or of an evaluation")
    notes: list[str] = []
    evaluations = evaluations_in(path)
    metrics, predictions = _read_evaluation(evaluations, notes)
    file = evaluations[-1] if evaluations else None
    root = _run_of(path)
    curves = _or_note(read_curves, root / "logs", notes, {})
    if not (root / "logs" / HISTORY_NAME).is_file():
        notes.append(f"No training log at {root / 'logs'}: no curves.")
    recipe = _recipe(root)
    if recipe is None:
        notes.append(f"No checkpoint in {root} that names its recipe.")
    elif isinstance(recipe, str):
        notes.append(recipe)
        recipe = None
    if not (metrics or predictions or curves or recipe):
        nothing = f"{path} holds neither an evaluation nor a training log nor a checkpoint: give a run folder"
        raise DataError(notes[0] if evaluations else nothing)
    dataset = (metrics.get("data") or {}).get("name") or (
        Path(recipe.data_dir).name if recipe else ""
    )
    return ReportedRun(
        model_name(metrics, file) if file else root.resolve().name,
        dataset=str(dataset),
        metrics=metrics,
        predictions=predictions,
        curves=curves,
        recipe_yaml=recipe.to_yaml() if recipe else "",
        notes=notes,
    )


def _read_evaluation(
    evaluations: Sequence[Path], notes: list[str]
) -> tuple[dict[str, Any], list[Prediction]]:
    """Read the scores and predictions of the latest evaluation; add notes about gaps."""
    if not evaluations:
        notes.append(
            "Not evaluated yet: `vlm-bridge evaluate --checkpoint RUN --data-dir DATA --output-dir "
            "RUN/val` adds scores and images."
        )
        return {}, []
    *earlier, file = evaluations
    metrics = _or_note(read_metrics, file, notes, {})
    predictions: list[Prediction] = []
    # A file that --json wrote may lie beside another evaluation's predictions.
    if file.name == METRICS_NAME:
        predictions = _or_note(read_predictions, file.parent / PREDICTIONS_NAME, notes, [])
    if not (file.parent / PREDICTIONS_NAME).is_file() or file.name != METRICS_NAME:
        notes.append(
            f"No {PREDICTIONS_NAME} beside {file.name}: evaluate with --output-dir to see images."
        )
    if gone := [one.image.path for one in predictions if not one.image.path.is_file()]:
        notes.append(
            f"{len(gone):,} of {len(predictions):,} images are not where they were evaluated, such "
            f"as {gone[0]}."
        )
    if earlier:
        others = ", ".join(str(other.parent) for other in earlier)
        notes.append(f"Scores of {file.parent}, the latest evaluation; there are also {others}.")
    return metrics, predictions


def _or_note(read: Callable[[Path], T], path: Path, notes: list[str], otherwise: T) -> T:
    """Read a file, or add a note about its damage and return ``otherwise``."""
    try:
        return read(path)
    except DataError as error:
        notes.append(f"{error}.")
        return otherwise


def _run_of(path: Path) -> Path:
    """Return the run folder itself, or the one around an evaluation."""
    folder = path if path.is_dir() else path.parent
    parent = folder.resolve().parent
    lies_in_run = not _is_run(folder) and _is_run(parent)
    return parent if lies_in_run else folder


def _is_run(folder: Path) -> bool:
    return (folder / "logs").is_dir() or (folder / "checkpoints").is_dir()


def _recipe(root: Path) -> Any:
    """Return the recipe of a run's checkpoint, None without one, or a line about its damage."""
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    if not checkpoints.has_checkpoint(root):
        return None
    where = checkpoints.checkpoint_path(root)
    try:
        return checkpoints.recipe_of(checkpoints.load_checkpoint(where), where, to_build=False)
    except CheckpointError as error:
        return f"No recipe: {error}"


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Read a training log as ``series/quantity`` (``train/loss``) -> points; empty without a log.

    A resumed run has logged some steps twice; the later entry counts.

    Raises:
        DataError: a line is no event. The last one may be half written.
    """
    path = log_dir / HISTORY_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
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
