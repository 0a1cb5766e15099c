"""Scores of several evaluations side by side, each as a share of a reference."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import DataError, UsageError, VLMBridgeError
from vlm_bridge.evaluation.report import write_report
from vlm_bridge.evaluation.run_folder import (
    MEASURED,
    METRICS_NAME,
    ReportedRun,
    read_recipe,
    read_run,
    read_scores,
    run_of,
)
from vlm_bridge.metrics import SCORES

Layout = Literal["md", "latex", "csv"]


@dataclass(frozen=True)
class Averaged(ReportedRun):
    """A run, or the mean of runs whose recipes differ in their seed alone."""

    of: Sequence[ReportedRun] = ()

    @classmethod
    def over(cls, runs: Sequence[ReportedRun]) -> Averaged:
        name, metrics = runs[0].name, dict(runs[0].metrics)
        if len(runs) > 1:
            name = re.sub(r"[-_.](seed|s)?[-_]?\d+$", "", name) + f" (n={len(runs)})"
            shared = set.intersection(*(set(run.scores) for run in runs))
            metrics = {key: value for key, value in metrics.items() if key not in runs[0].scores}
            metrics |= {key: fmean(run.scores[key] for run in runs) for key in shared}
        return cls(name, metrics, of=runs)

    def spread(self, metric: str) -> float | None:
        """Return the sample standard deviation over seeds; None for a single run."""
        if len(self.of) < 2 or metric not in self.scores:
            return None
        return stdev(run.scores[metric] for run in self.of)

    def cell(self, metric: str) -> str:
        """Return "0.4123", or "0.412 ± 0.006" over several seeds."""
        mean, spread = self.scores.get(metric), self.spread(metric)
        if mean is None:
            return "-"
        return f"{mean:.4f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


@dataclass(frozen=True)
class Comparison:
    """Evaluations on the same data, the reference among them, and notes about them."""

    runs: Sequence[ReportedRun]
    reference: ReportedRun
    notes: Sequence[str]
    averaged: Sequence[Averaged] = ()

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
        averages = [
            {
                "name": mean.name,
                "runs": [run.name for run in mean.of],
                "mean": {name: mean.scores.get(name) for name in self.metrics},
                "standard_deviation": {name: mean.spread(name) for name in self.metrics},
            }
            for mean in self.averaged
            if len(mean.of) > 1
        ]
        content = {"reference": self.reference.name, "notes": list(self.notes), "runs": runs}
        return content | ({"averages": averages} if averages else {})

    def shares_table(self) -> list[list[str]]:
        """Return a row for each metric; of all runs but the reference with shares in percent."""
        first = next(run for run in self.averaged if self.reference in run.of)
        others = [run for run in self.averaged if run is not first]
        header = [title for run in others for title in (run.name, f"% of {first.name}")]
        rows = [["metric", first.name, *header]]
        for metric in self.metrics:
            row = [metric, first.cell(metric)]
            for run in others:
                share = run.shares_of(first).get(metric)
                row += [run.cell(metric), "-" if share is None else f"{100 * share:.1f}"]
            rows.append(row)
        return rows

    def table(self, layout: Layout) -> str:
        """Return a row for each run, averaged over seeds, and a column for each metric."""
        if layout == "csv":  # numbers of full precision, with spreads in columns of their own
            file = io.StringIO()
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["run", "n", *(c for m in self.metrics for c in (m, f"{m} std"))])
            for run in self.averaged:
                numbers = (n for m in self.metrics for n in (run.scores.get(m), run.spread(m)))
                writer.writerow([run.name, len(run.of), *numbers])
            return file.getvalue().strip()
        header = ["run", *self.metrics]
        rows = [[run.name, *map(run.cell, self.metrics)] for run in self.averaged]
        if layout == "md":
            rule = ["---", *["---:"] * len(self.metrics)]
            return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
        head, *body = (" & ".join(map(_latex, row)) + r" \\" for row in (header, *rows))
        begin = rf"\begin{{tabular}}{{l{'r' * len(self.metrics)}}}"
        end = (r"\bottomrule", r"\end{tabular}")
        return "\n".join((begin, r"\toprule", head, r"\midrule", *body, *end))


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text).replace("±", r"$\pm$")


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
    return Comparison(runs, chosen, notes, average_seeds(runs))


def average_seeds(runs: Sequence[ReportedRun]) -> list[Averaged]:
    """Join runs whose recipes differ in ``seed`` and folders alone, and that decoded alike."""

    def are_seeds(one: tuple[Recipe | None, ReportedRun], two: tuple[Recipe | None, ReportedRun]):
        (recipe, run), (other, other_run) = one, two
        if recipe is None or other is None:
            return False
        changes = [change.partition("=")[0] for change in recipe.changes_since(other)]
        return changes == ["seed"] and run.metrics.get("decode") == other_run.metrics.get("decode")

    groups: list[list[tuple[Recipe | None, ReportedRun]]] = []
    for run in runs:
        one = _recipe(run), run
        found = (group for group in groups if all(are_seeds(one, two) for two in group))
        if (group := next(found, None)) is None:
            groups.append(group := [])
        group.append(one)
    return [Averaged.over([run for _, run in group]) for group in groups]


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


def _recipe(run: ReportedRun) -> Recipe | None:
    """Return the recipe of an evaluated run; None for other captioners and lone scores."""
    if run.path is None or run.path.name != METRICS_NAME:
        return None
    root = run_of(run.path)
    if (run.metrics.get("model") or {}).get("name") != root.resolve().name:
        return None  # a published captioner's evaluation within a run folder
    try:
        return read_recipe(root)
    except VLMBridgeError:
        return None


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
