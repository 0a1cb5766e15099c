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
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_bridge.captioning.explain import thumbnail
from vlm_bridge.configuration import flat
from vlm_bridge.evaluation.run_folder import Prediction, ReportedRun
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import simple_tokenize

SUMMARY = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
FIRST_CURVES = ("loss", "visual_gain", "cider", "bleu4", "perplexity")
SHOWN = 12  # images in each gallery
THUMBNAIL = (320, 240)
PEOPLE = "people"  # name of the first reference of each image beside the captioners

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 420, 64, 400, 34, 210  # of a chart
LEGEND_ROW, NUM_TICKS, COLORS = 18, 5, 6
MOST_POINTS = 400  # more cannot be seen and would bloat the file

Points = Sequence[tuple[float, float]]
Row = Sequence[tuple[str, Prediction]]
"""An image's captions, each with the name of its run; empty where there is only one."""


def write_report(
    path: Path,
    runs: Sequence[ReportedRun],
    *,
    title: str,
    notes: Sequence[str] | None = None,
    reference: str | None = None,
) -> None:
    """Write the report of a run, or of several side by side.

    Args:
        path: the HTML file, replaced when the new one is complete.
        title: heading and window title.
        notes: lines below the title; None is the notes of the runs.
        reference: name of the run whose scores the others are shown as shares of.

    Raises:
        OSError: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("vlm_bridge.evaluation", ""), autoescape=True)
    environment.filters |= {"shown": _shown, "label": _label}
    measured = [run for run in runs if run.scores]
    datasets = sorted({run.data.get("name") or "" for run in measured})
    whole = next((run for run in measured if run.name == reference), None)
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        summary={n: runs[0].scores[n] for n in SUMMARY if n in runs[0].scores},
        notes=[line for run in runs for line in run.notes] if notes is None else notes,
        metrics=list(dict.fromkeys(name for run in measured for name in run.scores)),
        shares={r.name: r.shares_of(whole) for r in measured if r is not whole} if whole else {},
        published=[system for name in datasets for system in published_on(name)],
        reference=reference,
        curves=draw_curves(runs),
        galleries=[(heading, list(map(_figure, rows))) for heading, rows in _galleries(runs)],
        statistics=_statistics(runs),
        people=PEOPLE,
        decoding={run.name: run.metrics.get("decode") or {} for run in runs},
        versions={run.name: run.metrics.get("versions") or {} for run in runs},
        differing=_differing(runs),
    )
    write_atomically(path, page.encode())


def published_on(dataset: str) -> list[dict[str, Any]]:
    """Return published systems on a dataset whose name begins like `dataset` (Flickr8k-clean)."""
    file = resources.files("vlm_bridge.evaluation") / "published.yaml"
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    published = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [system for key, of in published.items() if name.startswith(key) for system in of]


def _statistics(runs: Sequence[ReportedRun]) -> dict[str, dict[str, float]]:
    """Count words in the captions of each run, and in one human caption per image."""
    captioned = [run for run in runs if run.predictions]
    captions = {run.name: [p.caption for p in run.predictions] for run in captioned}
    for run in captioned[:1]:
        captions[PEOPLE] = [p.image.captions[0] for p in run.predictions]
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
    for run in captioned:
        if ends := [p.finished for p in run.predictions if p.finished is not None]:
            columns[run.name]["unfinished, share"] = ends.count(False) / len(ends)
    return columns


def _galleries(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield headings with images of one run, or with images that all runs captioned."""
    rows: list[Row] = [[("", prediction)] for prediction in runs[0].predictions]
    if len(runs) > 1:
        captioned = [run for run in runs if run.predictions]
        by_id = {run.name: {p.image.original_id: p for p in run.predictions} for run in captioned}
        ids = next(iter(by_id.values()), {})
        common = [key for key in ids if all(key in of for of in by_id.values())]
        rows = [[(name, of[key]) for name, of in by_id.items()] for key in common]
    yield "Drawn at random", random.Random(0).sample(rows, min(SHOWN, len(rows)))
    if len(runs) > 1:
        spread = [np.ptp([prediction.cider for _, prediction in row]) for row in rows]
        yield "Where CIDEr differs most", [rows[i] for i in np.argsort(spread)[::-1][:SHOWN]]
        return
    ranked = sorted(rows, key=lambda row: row[0][1].cider)
    yield "Best by CIDEr", ranked[::-1][:SHOWN]
    yield "Worst by CIDEr", ranked[:SHOWN]
    yield "Longest captions", sorted(rows, key=lambda row: len(row[0][1].caption))[::-1][:SHOWN]


def _figure(row: Row) -> dict[str, Any]:
    image, source = row[0][1].image, None
    if small := thumbnail(image.path, THUMBNAIL):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    return {"image": image, "source": source, "captions": row}


def _differing(runs: Sequence[ReportedRun]) -> dict[str, dict[str, object]]:
    """Return the dotted recipe keys that differ between runs."""
    recipes = {r.name: flat(yaml.safe_load(r.recipe_yaml)) for r in runs if r.recipe_yaml}
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    differing = [k for k in keys if len({str(recipe.get(k)) for recipe in recipes.values()}) > 1]
    return {name: {key: recipe.get(key) for key in differing} for name, recipe in recipes.items()}


def _label(name: str) -> str:
    known = {"bleu4": "BLEU-4", "cider": "CIDEr"}
    return known.get(name) or name.removeprefix("num_").replace("_", " ")


def _shown(value: float) -> str:
    """Return a number with up to four decimals; large ones have thousands separators."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 4):.6g}"


def draw_curves(runs: Sequence[ReportedRun]) -> list[str]:
    """Draw a chart per quantity."""
    charts: dict[str, dict[str, Points]] = {name: {} for name in FIRST_CURVES}
    for run in runs:
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            label = f"{run.name}: {series}" if len(runs) > 1 else series
            if points := [(step, value) for step, value in curve if math.isfinite(value)]:
                charts.setdefault(quantity, {})[label] = points
    return [line_chart(_label(name), lines) for name, lines in charts.items() if lines]


def line_chart(title: str, lines: Mapping[str, Points]) -> str:
    """Return an ``<svg>`` that fills its container; several lines are named below it.

    It is colored by the CSS variables --soft, --line and --c0 to --c5.

    Args:
        lines: name -> finite points (training step, value), at least one.
    """
    plots = [_thinned(points) for points in lines.values()]
    low, high = np.concatenate(plots).min(0), np.concatenate(plots).max(0)
    margin = (high - low <= 1e-9 * np.abs(low)) * (np.abs(low) + 1) / 2  # of a constant
    low, high = low - margin, high + margin
    corner, size = np.array([LEFT, BOTTOM]), np.array([RIGHT - LEFT, TOP - BOTTOM])
    middle = (LEFT + RIGHT) / 2
    parts = [_text(LEFT, 18, title, "start"), _text(middle, BOTTOM + 36, "training step")]
    for share in np.linspace(0, 1, NUM_TICKS):
        (x, y), (step, value) = corner + share * size, low + share * (high - low)
        parts.append(f'<path d="M{LEFT} {y:g}H{RIGHT}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
        parts.append(_text(x, BOTTOM + 18, f"{step:.0f}"))
    row = BOTTOM + 40
    for number, (name, points) in enumerate(zip(lines, plots, strict=True)):
        places = corner + (points - low) / (high - low) * size
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        width = 2 if len(points) > 1 else 6
        stroke = f'fill="none" stroke="var(--c{number % COLORS})" stroke-width="{width}"'
        # Round ends, and a last line of no length, make a single point a dot.
        parts.append(f'<path d="M{corners}h0" {stroke} stroke-linecap="round"/>')
        if len(lines) > 1:
            row += LEGEND_ROW
            parts.append(f'<path d="M{LEFT} {row - 4}h28" {stroke}/>')
            parts.append(_text(LEFT + 36, row, name, "start"))
    box = f'viewBox="0 0 {WIDTH} {row + 8}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="12"'
    return f'<text {place} fill="var(--soft)">{escape(text)}</text>'


def _thinned(points: Points) -> np.ndarray:
    """Return means of neighbors [P, 2], at most `MOST_POINTS` of them."""
    groups = np.array_split(np.array(points, float), min(len(points), MOST_POINTS))
    return np.array([group.mean(0) for group in groups])
