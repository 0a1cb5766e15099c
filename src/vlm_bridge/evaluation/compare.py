"""Scores of several evaluations side by side, each as a share of a reference, if they may be compared at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.evaluation.report import METRICS, ReportedRun, write_report
from vlm_bridge.evaluation.run import METRICS_NAME
from vlm_bridge.evaluation.run_folder import HOW, evaluations_in, model_name, read_metrics, read_run

SHOWN_AS_ZERO = 5e-5
"""Below it a score reads 0.0000: pycocoevalcap's BLEU is never exactly 0, and a share of it would be astronomical."""
PER_TOKEN = ("perplexity", "visual_gain")
"""Per token of each model's own vocabulary: shown, but never as a share of another model's."""


@dataclass(frozen=True)
class Scores:
    """One evaluation as `vlm-bridge evaluate` wrote it.

    Attributes:
        name: what was evaluated; unique within a comparison.
        path: the file of scores. Predictions and report, where they were written, lie beside it.
        content: the whole file.
    """

    name: str
    path: Path
    content: Mapping[str, Any]

    def value(self, metric: str) -> float | None:
        """A metric, None where it was not measured."""
        value = self.content.get(metric)
        return float(value) if isinstance(value, int | float) else None

    def fact(self, section: str, key: str) -> Any:
        """What the evaluation recorded under ``section.key``; None where it is too old to say."""
        return (self.content.get(section) or {}).get(key)


@dataclass(frozen=True)
class Comparison:
    """Evaluations that share their data, and what must be known of them before they are compared.

    Attributes:
        runs: in the order given.
        reference: the one of ``runs`` that the others are a share of.
        notes: one line each.
    """

    runs: tuple[Scores, ...]
    reference: Scores
    notes: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """The metrics that at least one run has, in their usual order."""
        return [
            metric
            for metric in (*METRICS, "SPICE", *PER_TOKEN)
            if any(run.value(metric) is not None for run in self.runs)
        ]

    def share(self, run: Scores, metric: str) -> float | None:
        """``run``'s metric as a fraction of the reference's; None where that would mean nothing."""
        own, others = run.value(metric), self.reference.value(metric)
        if metric in PER_TOKEN or own is None or others is None or others < SHOWN_AS_ZERO:
            return None
        return own / others

    def to_json(self) -> dict[str, Any]:
        """The table for machines; what is not measured, and a share that means nothing, is null."""
        return {
            "reference": self.reference.name,
            "notes": list(self.notes),
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "scores": {metric: run.value(metric) for metric in self.metrics},
                    "share_of_reference": {
                        metric: self.share(run, metric) for metric in self.metrics
                    },
                    "decode": run.content.get("decode"),
                    "num_images": run.content["num_images"],
                }
                for run in self.runs
            ],
        }


def compare(
    paths: Sequence[Path], *, reference: str | None = None, force: bool = False
) -> Comparison:
    """Read the scores in files or folders and put them side by side.

    Args:
        reference: name or path of one of them; None means the first.
        force: compare what should not be compared; the reasons become notes.

    Raises:
        DataError: no scores at a path, or scores of other images, references or tokens (unless ``force``).
        UsageError: fewer than two evaluations, or a reference that is none of them.
    """
    if len(paths) < 2:
        raise UsageError("comparing takes the scores of two evaluations or more")
    runs = tuple(_with_unique_names([read_scores(path) for path in paths]))
    chosen = runs[0] if reference is None else _named(reference, runs, paths)
    obstacles = [line for run in runs if run is not chosen for line in _obstacles(run, chosen)]
    if obstacles and not force:
        raise DataError(
            f"these scores cannot be compared: {obstacles[0]} (--force shows them all the same)"
        )
    return Comparison(runs, chosen, (*obstacles, *_notes(runs, chosen)))


def read_scores(path: Path) -> Scores:
    """Scores from the JSON file of an evaluation, from its folder, or from the run folder that it lies in.

    Raises:
        DataError: nothing is there, it is not what `vlm-bridge evaluate` writes, or a run has several evaluations.
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
    """The report of `write_report` with all runs of a comparison side by side.

    Raises:
        OSError: the file cannot be written.
    """
    runs = [_reported(run, comparison) for run in comparison.runs]
    names = " and ".join(run.name for run in runs)
    write_report(path, runs, title=f"{names} side by side", notes=comparison.notes)


def _reported(scores: Scores, comparison: Comparison) -> ReportedRun:
    """A run as its own report shows it, under its name here and with its shares of the reference."""
    is_folder_file = scores.path.name == METRICS_NAME
    run = read_run(scores.path.parent if is_folder_file else scores.path)
    shares = {metric: comparison.share(scores, metric) for metric in comparison.metrics}
    known = {metric: share for metric, share in shares.items() if share is not None}
    return replace(run, name=scores.name, shares={} if scores is comparison.reference else known)


def _with_unique_names(runs: Sequence[Scores]) -> list[Scores]:
    """Two checkpoints of one run, or two settings of one model, are told apart by where their scores lie."""
    names = [run.name for run in runs]
    return [
        Scores(f"{run.name} ({run.path})", run.path, run.content)
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def _named(reference: str, runs: Sequence[Scores], paths: Sequence[Path]) -> Scores:
    for run, path in zip(runs, paths, strict=True):
        if reference == run.name or Path(reference) in (path, run.path):
            return run
    raise UsageError(f"--reference {reference} is none of: {', '.join(run.name for run in runs)}")


# --- What may be compared ------------------------------------------------------------------------------------


def _obstacles(run: Scores, reference: Scores) -> list[str]:
    """Why the scores of two evaluations do not mean the same, one line each."""

    def differ(what: str, get: Callable[[Scores], Any]) -> list[str]:
        own, other = get(run), get(reference)
        if own is None or other is None or own == other:
            return []
        return [f"{run.name} has {what} {own}, {reference.name} has {other}"]

    references = [scores.fact("data", "references") for scores in (run, reference)]
    lines = []
    if None in references or references[0] != references[1]:
        lines += differ("num_images", lambda scores: scores.content["num_images"])
        lines += differ("the split", lambda scores: scores.fact("data", "split"))
        if not lines and None not in references:
            lines.append(
                f"{run.name} was scored on {_data_name(run)}, {reference.name} on {_data_name(reference)}, and the "
                "images or their reference captions are not the same"
            )
    return lines + differ("scores by the tokenizer", lambda scores: scores.content.get("tokenizer"))


def _notes(runs: Sequence[Scores], reference: Scores) -> list[str]:
    lines = []
    for run in runs:
        if run.fact("data", "references") is None:
            lines.append(
                f"{run.path} does not say which data it was scored on: evaluate again to be sure"
            )
        if failures := run.content.get("num_failures"):
            lines.append(
                f"{failures} picture(s) of {run.name} could not be captioned and count as empty"
            )
        if run is reference:
            continue
        fingerprints = [scores.fact("data", "fingerprint") for scores in (run, reference)]
        if None not in fingerprints and fingerprints[0] != fingerprints[1]:
            lines.append(
                f"the caption folders of {run.name} and {reference.name} are not the same, their captions are: "
                "pictures may have been prepared differently"
            )
        if settings := _other_settings(run, reference):
            lines.append(f"{run.name} and {reference.name} were decoded differently: {settings}")
    if any(run.content.get("tokenizer") == "regex" for run in runs):
        lines.append("tokenized without Java: do not compare these scores with published ones")
    if any(run.value(metric) is not None for run in runs for metric in PER_TOKEN):
        lines.append(
            "perplexity and visual gain are per token of each model's own vocabulary: compare them only between "
            "models of one tokenizer"
        )
    return lines


def _other_settings(run: Scores, reference: Scores) -> str:
    own, others = run.content.get("decode") or {}, reference.content.get("decode") or {}
    return ", ".join(
        f"{key} {own[key]} and {others[key]}"
        for key in own
        if key in others and own[key] != others[key]
    )


def _data_name(scores: Scores) -> str:
    name, split = scores.fact("data", "name"), scores.fact("data", "split")
    return f"{name or 'unnamed data'} {split or ''}".strip()
