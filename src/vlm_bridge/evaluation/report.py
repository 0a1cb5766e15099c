"""Report of one run, or of several side by side, as one HTML file.

Numbers stand in ``<data value="...">`` with all their digits, so that a program reads from the page what the
JSON holds. The page itself is `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.evaluation.caption_statistics import CaptionStatistics, caption_statistics
from vlm_bridge.evaluation.charts import Line, histogram, line_chart
from vlm_bridge.evaluation.contact_sheet import thumbnail
from vlm_bridge.evaluation.predictions import Prediction, best, drawn, longest, worst
from vlm_bridge.metrics import score_notes

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SUMMARY = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
FIRST_CURVES = ("loss", "visual_gain", "cider", "bleu4", "perplexity")
LAST_CURVES = ("learning_rate", "gradient_norm")
SHOWN = 12
"""Images in each gallery."""
THUMBNAIL = (320, 240)
PEOPLE = "people"
"""Name of the first reference of each image beside the captioners."""


class Share(float):
    """A fraction shown as a percentage."""


@dataclass(frozen=True)
class ReportedRun:
    """Content of a report about one run. Empty parts are left out.

    Attributes:
        name: unique within a report.
        dataset: name of the data, to find published scores.
        metrics: content of ``metrics.json``; numbers at its top level are scores.
        predictions: in the order of the images.
        curves: ``series/quantity`` (``train/loss``) -> points. Series of one quantity share a chart.
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
    def scores(self) -> dict[str, float]:
        """All numbers of the metrics but the failures, in the usual order."""
        order = (*METRICS, "SPICE", "perplexity", "visual_gain", *self.metrics)
        return {
            name: self.metrics[name]
            for name in order
            if type(self.metrics.get(name)) in (int, float) and name != "num_failures"
        }

    def all_notes(self) -> list[str]:
        skipped = self.metrics.get("skipped") or {}
        lines = [*self.notes, *score_notes(skipped, self.metrics.get("tokenizer"))]
        if failures := self.metrics.get("num_failures"):
            lines.append(f"{failures} image(s) were not captioned and count as empty captions")
        return lines


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
    environment.filters |= {
        "exact": repr,
        "shown": _shown,
        "label": _label,
        "score_form": _score_form,
        "quoted_form": _quoted_form,
        "with_rows": lambda columns: {name: rows for name, rows in columns.items() if rows},
        "row_names": lambda columns: list(
            dict.fromkeys(row for r in columns.values() for row in r)
        ),
    }
    measured = [run for run in runs if run.scores]
    scores = runs[0].scores
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        summary={n: scores[n] for n in SUMMARY if n in scores} if len(runs) == 1 else {},
        notes=[*notes, *(_of(run, runs) + line for run in runs for line in run.all_notes())],
        metrics=list(dict.fromkeys(name for run in measured for name in run.scores)),
        curves=_curves(runs),
        galleries=[(heading, figures) for heading, figures in _galleries(runs) if figures],
        people=PEOPLE,
        decoding={run.name: run.metrics.get("decode") or {} for run in runs},
        versions={run.name: run.metrics.get("versions") or {} for run in runs},
        recipes={run.name: run.recipe_yaml for run in runs if run.recipe_yaml},
        differing=_differing(runs),
        **_published(measured),
        **_captions(runs),
    )
    write_atomically(Path(path), page.encode())


def _of(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def published_on(dataset: str) -> list[dict[str, Any]]:
    """Return published systems on a dataset, found by the beginning of its name (Flickr8k-clean)."""
    file = resources.files("vlm_bridge.evaluation") / "published.yaml"
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    published = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [system for key, of in published.items() if name.startswith(key) for system in of]


def _published(measured: Sequence[ReportedRun]) -> dict[str, Any]:
    """Return published systems on the same data, and the note below the table of scores."""
    datasets = dict.fromkeys(run.dataset for run in measured)
    systems = [system for dataset in datasets for system in published_on(dataset)]
    note = "Scores are fractions: papers print CIDEr 1.20 as 120. "
    if any(run.shares for run in measured):
        reference = next((run.name for run in measured if not run.shares), "the reference")
        note += f"Percentages are shares of what {reference} has. "
    if systems:
        note += (
            "Quoted rows were not measured here: images, splits and preprocessing are those of "
            "their papers. "
        )
    if any("visual_gain" in run.scores for run in measured):
        note += (
            "Visual gain is the increase of the loss, in nats per token, when images are shuffled "
            "among the captions. Near 0, the captioner ignores its images."
        )
    return {"published": systems, "score_note": note.strip()}


def _curves(runs: Sequence[ReportedRun]) -> list[str]:
    """Draw a chart per quantity. Of several runs, each keeps its color, and its series differ in style."""
    several = len(runs) > 1
    by_quantity: dict[str, list[Line]] = {}
    for color, run in enumerate(runs):
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            finite = [(float(step), value) for step, value in curve if math.isfinite(value)]
            if not finite:
                continue
            lines = by_quantity.setdefault(quantity, [])
            label = _of(run, runs) + (series or quantity)
            own = sum(line.color == color for line in lines) if several else len(lines)
            lines.append(Line(label, finite, *((color, own) if several else (own,))))
    places = {name: place for place, name in enumerate(FIRST_CURVES)}
    places |= dict.fromkeys(LAST_CURVES, len(FIRST_CURVES) + 1)
    order = sorted(by_quantity, key=lambda name: places.get(name, len(FIRST_CURVES)))
    return [
        line_chart(
            _label(quantity),
            by_quantity[quantity],
            x_label="step",
            key=f"curve{number}",
            legend=several or len(by_quantity[quantity]) > 1,
        )
        for number, quantity in enumerate(order)
    ]


def _captions(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """Return statistics of the captions beside those of one human caption per image."""
    captioned = [run for run in runs if run.predictions]
    if not captioned:
        return {"statistics": {}}
    statistics = {
        run.name: caption_statistics(
            [prediction.caption for prediction in run.predictions],
            [prediction.finished for prediction in run.predictions],
        )
        for run in captioned
    }
    human = [prediction.image.captions[0] for prediction in captioned[0].predictions]
    statistics[PEOPLE] = caption_statistics(human)
    lengths = {
        name: {n: count / len(values.lengths) for n, count in Counter(values.lengths).items()}
        for name, values in statistics.items()
    }
    return {
        "statistics": statistics,
        "statistics_rows": {name: _statistics_rows(values) for name, values in statistics.items()},
        "lengths_svg": histogram(
            "share of captions by length", lengths, x_label="words", key="lengths"
        ),
    }


def _statistics_rows(statistics: CaptionStatistics) -> dict[str, object]:
    return {
        "captions": len(statistics.lengths),
        "mean length, words": statistics.mean_length,
        "longest, words": max(statistics.lengths),
        "vocabulary, words": statistics.vocabulary,
        "distinct": Share(statistics.distinct),
        "with a repeated trigram or word": Share(statistics.repeating),
        "unfinished": None if statistics.unfinished is None else Share(statistics.unfinished),
    }


def _galleries(runs: Sequence[ReportedRun]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Yield images of one run, or images that all runs captioned."""
    captioned = [run for run in runs if run.predictions]
    if len(runs) == 1:
        choices = {
            "Drawn at random": drawn,
            "Best by CIDEr": best,
            "Worst by CIDEr": worst,
            "Longest captions": longest,
        }
        for heading, choose in choices.items():
            chosen = choose(runs[0].predictions, SHOWN)
            yield heading, [_figure([("", prediction)]) for prediction in chosen]
    elif captioned:
        by_image = [{p.image.original_id: p for p in run.predictions} for run in captioned]
        rows = [
            [(run.name, of[key]) for run, of in zip(captioned, by_image, strict=True)]
            for key in by_image[0]
            if all(key in of for of in by_image)
        ]

        def spread(row: Sequence[tuple[str, Prediction]]) -> float:
            ciders = [prediction.cider for _, prediction in row]
            return max(ciders) - min(ciders)

        yield "Drawn at random", [_figure(row) for row in drawn(rows, SHOWN)]
        differing = sorted(rows, key=spread, reverse=True)[:SHOWN]
        yield "Where CIDEr differs most", [_figure(row) for row in differing]


def _figure(captions: Sequence[tuple[str, Prediction]]) -> dict[str, Any]:
    image = captions[0][1].image
    source = None
    if small := thumbnail(image.path, THUMBNAIL):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    reference = image.captions[0]
    return {
        "name": image.path.name, "source": source, "captions": captions, "reference": reference,
    }  # fmt: skip


def _differing(runs: Sequence[ReportedRun]) -> dict[str, dict[str, object]]:
    """Return the dotted recipe keys that differ between runs."""

    def flat(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value

    recipes = {
        r.name: dict(flat(yaml.safe_load(r.recipe_yaml) or {})) for r in runs if r.recipe_yaml
    }
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    differing = [k for k in keys if len({str(recipe.get(k)) for recipe in recipes.values()}) > 1]
    return {name: {key: recipe.get(key) for key in differing} for name, recipe in recipes.items()}


def _label(name: str) -> str:
    for old, new in {"num_": "", "_": " ", "bleu4": "BLEU-4", "cider": "CIDEr"}.items():
        name = name.replace(old, new)
    return name


def _score_form(value: object) -> str:
    """Four decimals, as `vlm-bridge evaluate` prints scores; fewer for large perplexities."""
    return ".4f" if isinstance(value, float) and abs(value) < 10 else ""


def _quoted_form(value: float | None) -> str:
    """As many decimals as the paper printed, and at least three."""
    return ".3f" if value is not None and round(value, 3) == value else ".4f"


def _shown(value: float, form: str = "") -> str:
    if isinstance(value, Share):
        form = form or ".1%"
    return format(
        value, form or (".4g" if isinstance(value, float) and abs(value) < 1000 else ",.0f")
    )
