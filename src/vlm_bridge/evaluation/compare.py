"""Scores of several evaluations side by side, each as a share of a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.evaluation import run_folder
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.metrics import SCORES

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
        return (self.content.get("data") or {}).get(key)


@dataclass(frozen=True)
class Comparison:
    """Evaluations on the same data, the reference among them, and notes about them."""

    runs: Sequence[Scores]
    reference: Scores
    notes: Sequence[str]

    @property
    def metrics(self) -> list[str]:
        """The metrics that at least one run has, in their usual order."""
        names = (*SCORES, *PER_TOKEN)
        return [name for name in names if any(run.value(name) is not None for run in self.runs)]

    def share(self, run: Scores, metric: str) -> float | None:
        """Return a metric as a fraction of the reference's; None where that means nothing."""
        own, others = run.value(metric), self.reference.value(metric)
        if metric in PER_TOKEN or own is None or others is None or others < SHOWN_AS_ZERO:
            return None
        return own / others

    def to_json(self) -> dict[str, Any]:
        runs = [
            {
                "name": run.name,
                "path": str(run.path),
                "scores": {name: run.value(name) for name in self.metrics},
                "share_of_reference": {name: self.share(run, name) for name in self.metrics},
                "decode": run.content.get("decode"),
                "num_images": run.content["num_images"],
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
    runs = [read_scores(path) for path in paths]
    names = [run.name for run in runs]
    runs = [
        replace(run, name=f"{run.name} ({run.path})") if names.count(run.name) > 1 else run
        for run in runs
    ]
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
    if any(run.content.get("tokenizer") == "regex" for run in runs):
        notes.append("tokenized without Java: do not compare these scores with published ones")
    if any(run.value(metric) is not None for run in runs for metric in PER_TOKEN):
        notes.append(
            "perplexity and visual gain are per token of each model's own vocabulary: compare them "
            "only between models of one tokenizer"
        )
    return Comparison(runs, chosen, notes)


def read_scores(path: Path) -> Scores:
    """Read scores from a JSON file, an evaluation's folder, or the run folder around it.

    Raises:
        DataError: nothing is there, it holds no scores, or a run has several evaluations.
    """
    found = run_folder.evaluations_in(path)
    if not found:
        raise DataError(f"no scores at {path}: {run_folder.HOW}")
    if len(found) > 1:
        folders = ", ".join(str(file.parent) for file in found)
        raise DataError(f"{path} has several evaluations: name one of {folders}")
    content = run_folder.read_metrics(found[0])
    return Scores(run_folder.model_name(content, found[0]), found[0], content)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the report of all runs side by side. Raises OSError as `write_report`."""
    reported = []
    for run in comparison.runs:
        shares = {name: comparison.share(run, name) for name in comparison.metrics}
        known = (
            {}
            if run is comparison.reference
            else {k: v for k, v in shares.items() if v is not None}
        )
        in_folder = run.path.name == run_folder.METRICS_NAME
        content = run_folder.read_run(run.path.parent if in_folder else run.path)
        reported.append(replace(content, name=run.name, shares=known))
    title = f"{' and '.join(run.name for run in reported)} side by side"
    write_report(path, reported, title=title, notes=comparison.notes)


def _obstacles(run: Scores, other: Scores) -> list[str]:
    """Return why the scores of two evaluations do not compare."""
    facts = {"scores by the tokenizer": [s.content.get("tokenizer") for s in (run, other)]}
    if run.data("references") != other.data("references"):
        facts["num_images"] = [s.content["num_images"] for s in (run, other)]
        for what, key in (
            ("the split", "split"),
            ("data", "name"),
            ("images and captions of the hash", "references"),
        ):
            facts[what] = [s.data(key) for s in (run, other)]
    return [
        f"{run.name} has {what} {own}, {other.name} has {others}"
        for what, (own, others) in facts.items()
        if own != others
    ]


def _notes(run: Scores, other: Scores) -> list[str]:
    lines = []
    if failures := run.content.get("num_failures"):
        lines.append(
            f"{failures} image(s) of {run.name} were not captioned and count as empty captions"
        )
    if run.data("fingerprint") != other.data("fingerprint"):
        lines.append(
            f"the caption folders of {run.name} and {other.name} differ: images may have been "
            "prepared differently"
        )
    own, others = run.content.get("decode") or {}, other.content.get("decode") or {}
    differing = [key for key in own if others.get(key, own[key]) != own[key]]
    if settings := ", ".join(f"{key} {own[key]} and {others[key]}" for key in differing):
        lines.append(f"{run.name} and {other.name} were decoded differently: {settings}")
    return lines
