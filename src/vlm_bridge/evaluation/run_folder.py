"""Files of a run and of its evaluation: scores, captions with their scores, training log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.samples import CaptionedImage, TarImage
from vlm_bridge.errors import CheckpointError, DataError
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import SCORES, score_notes

HISTORY_NAME = "history.jsonl"
METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.jsonl"
REPORT_NAME = "report.html"
NOT_CURVES = frozenset(
    {
        "step", "epoch", "num_images", "samples_per_second", "tokens_per_second", "padding_share",
        "perplexity",  # exp of the validation loss
        "mean_length", "token_diversity", "sample_bleu4",  # of a few samples
    }
)  # fmt: skip
RECORDED = ("caption", "log_probability", "error", "scores", "finished")
MEASURED = ("perplexity", "visual_gain")
"""Per token of each model's own vocabulary, so never a share of another model's."""
SHOWN_AS_ZERO = 5e-5
"""Reference scores below it have no shares: pycocoevalcap's BLEU is never exactly 0."""
Curve = list[tuple[int, float]]
"""Points (training step, value)."""
HOW = "`vlm-bridge evaluate ... --output-dir FOLDER` writes them"
NOT_EVALUATED = (
    "Not evaluated yet: `vlm-bridge evaluate --checkpoint RUN --data-dir DATA "
    "--output-dir RUN/val` adds scores and images."
)


@dataclass(frozen=True)
class Prediction:
    """Caption of an image with its scores.

    Attributes:
        caption: empty after an error, and scored as such.
        log_probability: mean per token, in nats.
        finished: the caption ended before the longest length allowed; None where that is unknown.
    """

    image: CaptionedImage
    caption: str
    log_probability: float | None
    error: str | None
    scores: Mapping[str, float]
    finished: bool | None = None

    @property
    def cider(self) -> float:
        return self.scores["CIDEr"]

    def to_record(self) -> dict[str, Any]:
        image = self.image
        record = {"image": str(image.path), "original_id": image.original_id}
        record |= {"references": list(image.captions), **{k: getattr(self, k) for k in RECORDED}}
        if isinstance(tar := image.path, TarImage):
            record["tar"] = {"file": str(tar.file), "offset": tar.offset, "size": tar.size}
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prediction:
        """Read `to_record`; ValueError, KeyError or TypeError where it is damaged."""
        path = Path(record["image"])
        if place := record.get("tar"):
            member = record["image"].removeprefix(f"{place['file']}/")
            offset, size = int(place["offset"]), int(place["size"])
            path = TarImage(Path(place["file"]), offset, size, member)
        image = CaptionedImage(path, tuple(record["references"]), record["original_id"])
        if not image.captions or "CIDEr" not in record["scores"]:
            raise ValueError("no references, or no CIDEr")
        values: dict[str, Any] = {name: record.get(name) for name in RECORDED}
        return cls(image, **values)


@dataclass(frozen=True)
class ReportedRun:
    """Content of a report about one run. Empty parts are left out.

    Attributes:
        name: unique within a report.
        metrics: content of ``metrics.json``; numbers at its top level are scores.
        predictions: in the order of the images.
        curves: ``series/quantity`` (``train/loss``) -> points. Series of one quantity share a
            chart.
        recipe_yaml: the whole recipe.
        missing: one line for each part that was not found.
        path: the file of scores.
    """

    name: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    recipe_yaml: str = ""
    missing: Sequence[str] = ()
    path: Path | None = None

    @property
    def scores(self) -> dict[str, Any]:
        """All numbers of the metrics but the failures, in the usual order."""
        names = dict.fromkeys((*SCORES, *MEASURED, *self.metrics))
        values = ((name, self.metrics.get(name)) for name in names if name != "num_failures")
        return {name: value for name, value in values if type(value) in (int, float)}

    @property
    def data(self) -> Mapping[str, Any]:
        """The ``name``, ``split`` and hashes of the images of the evaluation."""
        return self.metrics.get("data") or {}

    @property
    def notes(self) -> list[str]:
        """One line for everything that a reader must know."""
        skipped, failures = self.metrics.get("skipped") or {}, self.metrics.get("num_failures")
        lines = [*self.missing, *score_notes(skipped, self.metrics.get("tokenizer"))]
        if failures:
            lines.append(f"{failures} image(s) were not captioned and count as empty captions")
        return lines

    def shares_of(self, reference: ReportedRun) -> dict[str, float]:
        """Return scores as fractions of the reference's, where that means something."""
        own, others = self.scores, reference.scores
        known = [name for name in SCORES if name in own and others.get(name, 0) >= SHOWN_AS_ZERO]
        return {name: own[name] / others[name] for name in known}


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write a JSON line per image. Raises OSError."""
    lines = (json.dumps(each.to_record(), ensure_ascii=False) + "\n" for each in predictions)
    write_atomically(path, "".join(lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions; empty where there is no file.

    Raises:
        DataError: a line is damaged.
    """
    predictions = []
    # Captions may hold other ends of lines.
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            predictions += [Prediction.from_record(json.loads(line))] if line else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number} is not a prediction: evaluate again ({error!r})"
            ) from error
    return predictions


def evaluations_in(path: Path) -> list[Path]:
    """Return score files of a JSON file, an evaluation's folder, or a run folder, oldest first."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    if (path / METRICS_NAME).is_file():
        return [path / METRICS_NAME]
    return sorted(path.glob(f"*/{METRICS_NAME}"), key=lambda file: file.stat().st_mtime)


def read_scores(path: Path) -> ReportedRun:
    """Read the scores of a JSON file, an evaluation's folder, or the latest one in a run folder.

    Raises:
        DataError: nothing is there, it cannot be read, or it holds something else.
    """
    files = evaluations_in(path)
    if not files:
        raise DataError(f"no scores at {path}: {HOW}")
    file = files[-1]
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the scores in {file}: {error}") from error
    if not isinstance(metrics, dict) or not {"CIDEr", "num_images"} <= metrics.keys():
        raise DataError(f"{file} does not hold the scores of an evaluation: {HOW}")
    unrecorded = run_of(file).resolve().name if file.name == METRICS_NAME else file.stem
    name = (metrics.get("model") or {}).get("name") or unrecorded
    notes = [f"Scores of {file.parent}, the latest of {len(files)} evaluations."]
    return ReportedRun(str(name), metrics, missing=notes if files[1:] else [], path=file)


def read_run(path: Path) -> ReportedRun:
    """Read the parts of a run for a report.

    Args:
        path: a run folder (``logs``, ``checkpoints``, evaluations in subfolders), an evaluation's
            folder, alone or within a run folder, or a JSON file of scores.

    Raises:
        DataError: there is nothing to report, or a part is damaged.
    """
    if not path.exists():
        raise DataError(f"no run at {path}: give the folder of a training or of an evaluation")
    root = run_of(path)
    run, missing = ReportedRun(root.resolve().name), [NOT_EVALUATED]
    predictions: list[Prediction] = []
    if evaluations_in(path):
        run = read_scores(path)
        # Output of --json may lie beside another evaluation's predictions.
        if run.path and run.path.name == METRICS_NAME:
            predictions = read_predictions(run.path.with_name(PREDICTIONS_NAME))
        no_images = f"No {PREDICTIONS_NAME}: evaluate with --output-dir to see images."
        missing = [*run.missing, *([] if predictions else [no_images])]
    curves, recipe_yaml = read_curves(root / "logs"), ""
    if not curves:
        missing.append(f"No training log at {root / 'logs'}: no curves.")
    try:
        recipe_yaml = read_recipe(root).to_yaml()
    except CheckpointError as error:
        missing.append(f"No recipe: {error}")
    if not (run.metrics or curves or recipe_yaml):
        raise DataError(f"{path} holds neither an evaluation nor a training: give a run folder")
    return replace(
        run, predictions=predictions, curves=curves, recipe_yaml=recipe_yaml, missing=missing
    )


def read_recipe(root: Path) -> Recipe:
    """Return the recipe in a run's checkpoint. Raises CheckpointError where there is none."""
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    where = checkpoints.checkpoint_path(root)
    content = checkpoints.load_checkpoint(where)
    return checkpoints.recipe_of(content, where, is_built=False)


def run_of(path: Path) -> Path:
    """Return the run folder itself, or the one around an evaluation."""

    def is_run(folder: Path) -> bool:
        return (folder / "logs").is_dir() or (folder / "checkpoints").is_dir()

    folder = path if path.is_dir() else path.parent
    parent = folder.resolve().parent
    return parent if is_run(parent) and not is_run(folder) else folder


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
            series, step = event["event"], event["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not an event of a training run") from None
        series = "train" if series == "train" else "validation"
        for quantity, value in event.items():
            if isinstance(value, int | float) and quantity not in NOT_CURVES:
                curve = curves.setdefault(f"{series}/{quantity}", [])
                while curve and curve[-1][0] >= step:
                    curve.pop()
                curve.append((step, value))
    return curves
