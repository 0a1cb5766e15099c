"""Scores of several evaluations side by side, each as a share of a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.evaluation.report import METRICS, ReportedRun, write_report
from vlm_bridge.evaluation.run_folder import (
    HOW,
    METRICS_NAME,
    evaluations_in,
    model_name,
    read_metrics,
    read_run,
)

SHOWN_AS_ZERO = 5e-5
"""Reference scores below it have no shares: pycocoevalcap's BLEU is never exactly 0."""
PER_TOKEN = ("perplexity", "visual_gain")
"""Per token of each model's own vocabulary, so never a share of another model's."""


@dataclass(frozen=True)
class Scores:
    """Scores that `vlm-bridge evaluate` wrote.

    Attributes:
        name: unique within a comparison.
        path: the file of scores.
        content: the whole file.
    """

    name: str
    path: Path
    content: Mapping[str, Any]

    def value(self, metric: str) -> float | None:
        value = self.content.get(metric)
        return float(value) if isinstance(value, int | float) else None

    def data(self, key: str) -> Any:
        """Return a fact about the data; None where an old file has none."""
        return (self.content.get("data") or {}).get(key)


@dataclass(frozen=True)
class Comparison:
    """Evaluations on the same data, the reference among them, and notes about them."""

    runs: tuple[Scores, ...]
    reference: Scores
    notes: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """The metrics that at least one run has, in their usual order."""
        names = (*METRICS, "SPICE", *PER_TOKEN)
        return [name for name in names if any(run.value(name) is not None for run in self.runs)]

    def share(self, run: Scores, metric: str) -> float | None:
        """Return a metric as a fraction of the reference's; None where that means nothing."""
        own, others = run.value(metric), self.reference.value(metric)
        if metric in PER_TOKEN or own is None or others is None or others < SHOWN_AS_ZERO:
            return None
        return own / others

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference.name,
            "notes": list(self.notes),
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "scores": {name: run.value(name) for name in self.metrics},
                    "share_of_reference": {name: self.share(run, name) for name in self.metrics},
                    "decode": run.content.get("decode"),
                    "num_images": run.content["num_images"],
                }
                for run in self.runs
            ],
        }


def compare(
    paths: Sequence[Path], *, reference: str | None = None, force: bool = False
) -> Comparison:
    """Read scores in files or folders.

    Args:
        reference: name or path of one of them; None is the first.
        force: turn reasons against comparing into notes.

    Raises:
        DataError: no scores at a path, or scores of other images, references or tokens.
        UsageError: fewer than two evaluations, or an unknown reference.
    """
    if len(paths) < 2:
        raise UsageError("comparing takes the scores of two evaluations or more")
    runs = [read_scores(path) for path in paths]
    names = [run.name for run in runs]
    runs = [
        replace(run, name=f"{run.name} ({run.path})") if names.count(run.name) > 1 else run
        for run in runs
    ]
    named = [
        run
        for run, path in zip(runs, paths, strict=True)
        if reference is None or reference == run.name or Path(reference) in (path, run.path)
    ]
    if not named:
        options = ", ".join(run.name for run in runs)
        raise UsageError(f"--reference {reference} is none of: {options}")
    obstacles = [line for run in runs for line in _obstacles(run, named[0])]
    if obstacles and not force:
        raise DataError(
            f"these scores cannot be compared: {obstacles[0]} (--force shows them all the same)"
        )
    return Comparison(tuple(runs), named[0], (*obstacles, *_notes(runs, named[0])))


def read_scores(path: Path) -> Scores:
    """Read scores from a JSON file, an evaluation's folder, or the run folder around it.

    Raises:
        DataError: nothing is there, it holds no scores, or a run has several evaluations.
    """
    found = evaluations_in(path)
    if not found:
        raise DataError(f"no scores at {path}: {HOW}")
    if len(found) > 1:
        folders = ", ".join(str(file.parent) for file in found)
        raise DataError(f"{path} has several evaluations: name one of {folders}")
    content = read_metrics(found[0])
    return Scores(model_name(content, found[0]), found[0], content)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the report of all runs side by side. Raises OSError as `write_report`."""
    runs = [_reported(run, comparison) for run in comparison.runs]
    names = " and ".join(run.name for run in runs)
    write_report(path, runs, title=f"{names} side by side", notes=comparison.notes)


def _reported(scores: Scores, comparison: Comparison) -> ReportedRun:
    path = scores.path
    run = read_run(path.parent if path.name == METRICS_NAME else path)
    shares = {name: comparison.share(scores, name) for name in comparison.metrics}
    known = {name: share for name, share in shares.items() if share is not None}
    return replace(run, name=scores.name, shares={} if scores is comparison.reference else known)


def _obstacles(run: Scores, reference: Scores) -> list[str]:
    """Return why the scores of two evaluations do not compare."""
    lines: list[str] = []

    def require_same(what: str, own: object, other: object) -> None:
        if own is not None and other is not None and own != other:
            lines.append(f"{run.name} has {what} {own}, {reference.name} has {other}")

    own, other = run.data("references"), reference.data("references")
    if own is None or own != other:
        require_same("num_images", run.content["num_images"], reference.content["num_images"])
        require_same("the split", run.data("split"), reference.data("split"))
        if not lines and own and other:
            lines.append(
                f"{run.name} was scored on {_data_name(run)}, {reference.name} on "
                f"{_data_name(reference)}, and the images or their reference captions are not the "
                "same"
            )
    tokenizers = run.content.get("tokenizer"), reference.content.get("tokenizer")
    require_same("scores by the tokenizer", *tokenizers)
    return lines


def _notes(runs: Sequence[Scores], reference: Scores) -> list[str]:
    lines = []
    for run in runs:
        if run.data("references") is None:
            lines.append(f"{run.path} does not name its data: evaluate again to be sure")
        if failures := run.content.get("num_failures"):
            lines.append(
                f"{failures} image(s) of {run.name} were not captioned and count as empty captions"
            )
        fingerprints = run.data("fingerprint"), reference.data("fingerprint")
        if all(fingerprints) and len(set(fingerprints)) > 1:
            lines.append(
                f"the caption folders of {run.name} and {reference.name} differ, their captions do "
                "not: images may have been prepared differently"
            )
        own, others = run.content.get("decode") or {}, reference.content.get("decode") or {}
        differing = [key for key in own if others.get(key, own[key]) != own[key]]
        if settings := ", ".join(f"{key} {own[key]} and {others[key]}" for key in differing):
            lines.append(f"{run.name} and {reference.name} were decoded differently: {settings}")
    if any(run.content.get("tokenizer") == "regex" for run in runs):
        lines.append("tokenized without Java: do not compare these scores with published ones")
    if any(run.value(metric) is not None for run in runs for metric in PER_TOKEN):
        lines.append(
            "perplexity and visual gain are per token of each model's own vocabulary: compare them "
            "only between models of one tokenizer"
        )
    return lines


def _data_name(scores: Scores) -> str:
    return f"{scores.data('name') or 'unnamed data'} {scores.data('split') or ''}".strip()
