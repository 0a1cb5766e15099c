"""Report of one run, or of several side by side, as one HTML file.

Numbers stand in ``<data value="...">`` with all their digits, so that a program reads from the
page what the JSON holds. The page itself is `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from vlm_bridge.captioning.contact_sheet import thumbnail
from vlm_bridge.evaluation.charts import Points, line_chart
from vlm_bridge.evaluation.predictions import Prediction
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import score_notes, simple_tokenize

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SUMMARY = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
FIRST_CURVES = ("loss", "visual_gain", "cider", "bleu4", "perplexity")
SHOWN = 12
"""Images in each gallery."""
THUMBNAIL = (320, 240)
PEOPLE = "people"
"""Name of the first reference of each image beside the captioners."""
LABELS = {"num_": "", "_": " ", "bleu4": "BLEU-4", "cider": "CIDEr"}


@dataclass(frozen=True)
class ReportedRun:
    """Content of a report about one run. Empty parts are left out.

    Attributes:
        name: unique within a report.
        dataset: name of the data, to find published scores.
        metrics: content of ``metrics.json``; numbers at its top level are scores.
        predictions: in the order of the images.
        curves: ``series/quantity`` (``train/loss``) -> points. Series of one quantity share a
            chart.
        recipe_yaml: the whole recipe.
        shares: metric -> fraction of the reference run's score.
        notes: one line each.
    """

    name: str
    dataset: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    recipe_yaml: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def scores(self) -> dict[str, Any]:
        """All numbers of the metrics but the failures, in the usual order."""
        names = dict.fromkeys((*METRICS, "SPICE", "perplexity", "visual_gain", *self.metrics))
        values = ((name, self.metrics.get(name)) for name in names if name != "num_failures")
        return {name: value for name, value in values if type(value) in (int, float)}

    def all_notes(self, prefix: str) -> list[str]:
        skipped = self.metrics.get("skipped") or {}
        lines = [*self.notes, *score_notes(skipped, self.metrics.get("tokenizer"))]
        if failures := self.metrics.get("num_failures"):
            lines.append(f"{failures} image(s) were not captioned and count as empty captions")
        return [prefix + line for line in lines]


def write_report(
    path: Path, runs: Sequence[ReportedRun], *, title: str, notes: Sequence[str] = ()
) -> None:
    """Write the report of a run, or of several side by side.

    Args:
        path: the HTML file, replaced when the new one is complete.
        title: heading and window title.
        notes: lines about all runs.

    Raises:
        OSError: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("vlm_bridge.evaluation", ""), autoescape=True)
    environment.filters |= {"exact": repr, "shown": _shown, "label": _label}
    prefixes = [f"{run.name}: " if len(runs) > 1 else "" for run in runs]
    measured = [run for run in runs if run.scores]
    own_notes = map(ReportedRun.all_notes, runs, prefixes)
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        summary={n: runs[0].scores[n] for n in SUMMARY if n in runs[0].scores},
        notes=chain(notes, *own_notes),
        metrics=list(dict.fromkeys(name for run in measured for name in run.scores)),
        published=[s for name in {run.dataset for run in measured} for s in published_on(name)],
        reference=next((run.name for run in measured if not run.shares), ""),
        curves=_curves(runs, prefixes),
        galleries=[(heading, list(map(_figure, rows))) for heading, rows in _galleries(runs)],
        statistics=_statistics(runs),
        people=PEOPLE,
        decoding={run.name: run.metrics.get("decode") or {} for run in runs},
        versions={run.name: run.metrics.get("versions") or {} for run in runs},
        differing=_differing(runs),
    )
    write_atomically(Path(path), page.encode())


def published_on(dataset: str) -> list[dict[str, Any]]:
    """Return published systems on a dataset whose name begins like `dataset` (Flickr8k-clean)."""
    file = resources.files("vlm_bridge.evaluation") / "published.yaml"
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    published = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [system for key, of in published.items() if name.startswith(key) for system in of]


def _curves(runs: Sequence[ReportedRun], prefixes: Sequence[str]) -> list[str]:
    """Draw a chart per quantity."""
    charts: dict[str, dict[str, Points]] = {name: {} for name in FIRST_CURVES}
    for run, prefix in zip(runs, prefixes, strict=True):
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            if points := [(step, value) for step, value in curve if math.isfinite(value)]:
                charts.setdefault(quantity, {})[prefix + (series or quantity)] = points
    return [
        line_chart(_label(name), lines, x_label="step", legend=len(lines) > 1 or len(runs) > 1)
        for name, lines in charts.items()
        if lines
    ]


def _statistics(runs: Sequence[ReportedRun]) -> dict[str, dict[str, float]]:
    """Count words in the captions of each run, and in one human caption per image."""
    predictions = {run.name: run.predictions for run in runs if run.predictions}
    captions = {name: [p.caption for p in of_run] for name, of_run in predictions.items()}
    for of_run in list(predictions.values())[:1]:
        captions[PEOPLE] = [prediction.image.captions[0] for prediction in of_run]
    columns: dict[str, dict[str, float]] = {}
    for name, texts in captions.items():
        sentences = [tuple(sentence.split()) for sentence in simple_tokenize(texts)]
        columns[name] = {
            "captions": len(texts),
            "mean length, words": sum(map(len, sentences)) / len(texts),
            "longest, words": max(map(len, sentences)),
            "vocabulary, words": len(set().union(*sentences)),
            "distinct, share": len(set(sentences)) / len(texts),
        }
        ends = [p.finished for p in predictions.get(name, ()) if p.finished is not None]
        if ends:
            columns[name]["unfinished, share"] = ends.count(False) / len(ends)
    return columns


Row = Sequence[tuple[str, Prediction]]
"""An image's captions, each with the name of its run; empty where there is only one."""


def _galleries(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield images of one run, or images that all runs captioned."""
    captioned = [run for run in runs if run.predictions]
    by_image = [
        {p.image.original_id if len(runs) > 1 else p.image: p for p in run.predictions}
        for run in captioned
    ]
    names = [run.name if len(runs) > 1 else "" for run in captioned]
    rows: list[Row] = [
        [(name, of[key]) for name, of in zip(names, by_image, strict=True)]
        for key in (by_image[0] if by_image else ())
        if all(key in of for of in by_image)
    ]
    yield "Drawn at random", random.Random(0).sample(rows, min(SHOWN, len(rows)))
    if len(runs) > 1:
        yield "Where CIDEr differs most", sorted(rows, key=_spread)[::-1][:SHOWN]
        return
    ranked = sorted(rows, key=lambda row: row[0][1].cider)
    yield "Best by CIDEr", ranked[::-1][:SHOWN]
    yield "Worst by CIDEr", ranked[:SHOWN]
    yield "Longest captions", sorted(rows, key=lambda row: len(row[0][1].caption))[::-1][:SHOWN]


def _spread(row: Row) -> float:
    scores = [prediction.cider for _, prediction in row]
    return max(scores) - min(scores)


def _figure(row: Row) -> dict[str, Any]:
    image, source = row[0][1].image, None
    if small := thumbnail(image.path, THUMBNAIL):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    name, reference = image.path.name, image.captions[0]
    return {"name": name, "source": source, "captions": row, "reference": reference}


def _differing(runs: Sequence[ReportedRun]) -> dict[str, dict[str, object]]:
    """Return the dotted recipe keys that differ between runs."""

    def flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner

    given = [run for run in runs if run.recipe_yaml]
    recipes = {run.name: dict(flat(yaml.safe_load(run.recipe_yaml))) for run in given}
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    differing = [k for k in keys if len({str(recipe.get(k)) for recipe in recipes.values()}) > 1]
    return {name: {key: recipe.get(key) for key in differing} for name, recipe in recipes.items()}


def _label(name: str) -> str:
    for old, new in LABELS.items():
        name = name.replace(old, new)
    return name


def _shown(value: float) -> str:
    """Return a number with up to four decimals; large ones have thousands separators."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 4):.6g}"
