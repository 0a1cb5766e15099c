"""Scores of several evaluations side by side, each as a share of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.evaluation.run_folder import MEASURED, ReportedRun, read_run, read_scores
from vlm_bridge.metrics import SCORES


@dataclass(frozen=True)
class Comparison:
    """Evaluations on the same data, the reference among them, and notes about them."""

    runs: Sequence[ReportedRun]
    reference: ReportedRun
    notes: Sequence[str]

    @property
    def metrics(self) -> list[str]:
        """The metrics that at least one run has, in their usual order."""
        return [name for name in (*SCORES, *MEASURED) if any(name in r.scores for r in self.runs)]

    def share(self, run: ReportedRun, metric: str) -> float | None:
        """Return a metric as a fraction of the reference's; None where that means nothing."""
        return run.shares_of(self.reference).get(metric)

    def to_json(self) -> dict[str, Any]:
        runs = [
            {
                "name": run.name,
                "path": str(run.path),
                "scores": {name: run.scores.get(name) for name in self.metrics},
                "share_of_reference": {name: self.share(run, name) for name in self.metrics},
                "decode": run.metrics.get("decode"),
                "num_images": run.metrics["num_images"],
            }
            for run in self.runs
        ]
        return {"reference": self.reference.name, "notes": list(self.notes), "runs": runs}


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
    runs = _named_apart([read_scores(path) for path in paths])
    pairs = zip(runs, paths, strict=True)
    known = {key: run for run, path in pairs for key in (run.name, str(run.path), str(path))}
    chosen = known.get(reference) if reference else runs[0]
    if chosen is None:
        options = ", ".join(run.name for run in runs)
        raise UsageError(f"--reference {reference} is none of: {options}")
    obstacles = [line for run in runs for line in _obstacles(run, chosen)]
    if obstacles and not force:
        raise DataError(
            f"these scores cannot be compared: {obstacles[0]} (--force shows them all the same)"
        )
    notes = obstacles + [line for run in runs for line in _notes(run, chosen)]
    if any(metric in run.scores for run in runs for metric in MEASURED):
        notes.append(
            "perplexity and visual gain are per token of each model's own vocabulary: compare them "
            "only between models of one tokenizer"
        )
    return Comparison(runs, chosen, notes)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the report of all runs side by side. Raises OSError as `write_report`."""
    runs = [replace(read_run(run.path), name=run.name) for run in comparison.runs if run.path]
    missing = [f"{run.name}: {line}" for run in runs for line in run.missing]
    title = f"{' and '.join(run.name for run in runs)} side by side"
    name = comparison.reference.name
    write_report(path, runs, title=title, notes=[*comparison.notes, *missing], reference=name)


def _named_apart(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """Add to a name that several runs have the folders that not all of their paths contain."""
    parts = [run.path.resolve().parts if run.path else () for run in runs]
    named = []
    for number, (run, own) in enumerate(zip(runs, parts, strict=True), 1):
        alike = [of for other, of in zip(runs, parts, strict=True) if other.name == run.name]
        apart = "/".join(part for part in own if not all(part in of for of in alike))
        suffix = f" ({apart or number})" if len(alike) > 1 else ""
        named.append(replace(run, name=f"{run.name}{suffix}"))
    return named


def _obstacles(run: ReportedRun, other: ReportedRun) -> list[str]:
    """Return why the scores of two evaluations do not compare."""

    def images(run: ReportedRun) -> str:
        name, split, references = (run.data.get(k) for k in ("name", "split", "references"))
        return f"{run.metrics['num_images']} images of {name} {split} ({references})"

    reasons = []
    if run.data.get("references") != other.data.get("references"):
        reasons.append(f"{run.name} was scored on {images(run)}, {other.name} on {images(other)}")
    tokens, others = run.metrics.get("tokenizer"), other.metrics.get("tokenizer")
    if tokens != others:
        reasons.append(f"{run.name} has scores by the tokenizer {tokens}, {other.name} by {others}")
    return reasons


def _notes(run: ReportedRun, other: ReportedRun) -> list[str]:
    lines = [f"{run.name}: {line}" for line in run.notes]
    if run.data.get("fingerprint") != other.data.get("fingerprint"):
        lines.append(
            f"the caption folders of {run.name} and {other.name} differ: images may have been "
            "prepared differently"
        )
    own, others = run.metrics.get("decode") or {}, other.metrics.get("decode") or {}
    differing = [key for key in own if others.get(key, own[key]) != own[key]]
    if settings := ", ".join(f"{key} {own[key]} and {others[key]}" for key in differing):
        lines.append(f"{run.name} and {other.name} were decoded differently: {settings}")
    return lines
