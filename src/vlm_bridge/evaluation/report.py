"""Report of one run, or of several side by side, as one HTML file.

Numbers stand in ``<data value="...">`` with all their digits, so that a program reads from the
page what the JSON holds. The page itself is `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_bridge.captioning.explain import thumbnail
from vlm_bridge.configuration import flat
from vlm_bridge.evaluation.run_folder import Prediction, ReportedRun
from vlm_bridge.evaluation.verdict import published_on, ranking, verdict
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import simple_tokenize

SUMMARY = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
FIRST_CURVES = ("loss", "visual_gain", "cider", "bleu4")
SHOWN = 12  # images in each gallery
THUMBNAIL = (320, 240)
PEOPLE = "people"  # name of the first reference of each image beside the captioners

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 60, 348, 34, 200  # of a chart
LEGEND_ROW, MOST_TICKS, COLORS = 18, 6, 6
MOST_POINTS = 400  # more cannot be seen and would bloat the file

Points = Sequence[tuple[float, float]]
Row = Sequence[tuple[str, Prediction]]
"""An image's captions, each with the name of its run; empty where there is only one."""


def write_report(
    path: Path,
    runs: Sequence[ReportedRun],
    *,
    title: str,
    lead: str | None = None,
    notes: Sequence[str] | None = None,
    reference: str | None = None,
) -> None:
    """Write the report of a run, or of several side by side.

    Two runs of one captioner, as before and after fine-tuning, get a `lead`: their scores stand
    on top, and below them the verdict on the second.

    Args:
        path: the HTML file, replaced when the new one is complete.
        title: heading and window title.
        lead: first sentence; None is the verdict on a run, or names the best of several.
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
    findings = verdict(runs[-1]) if lead or len(runs) == 1 else [ranking(runs)]
    whole = next((run for run in measured if run.name == reference), None)
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        findings=[line for line in (lead, *findings) if line],
        summary=_summary(runs) if lead or len(runs) == 1 else {},
        notes=[line for run in runs for line in run.notes] if notes is None else notes,
        metrics=list(dict.fromkeys(name for run in measured for name in run.scores)),
        shares={r.name: r.shares_of(whole) for r in measured if r is not whole} if whole else {},
        published=[system for name in datasets for system in published_on(name)],
        reference=reference,
        is_pair=len(runs) > 1 and lead is not None,
        curves=draw_curves(runs),
        galleries=[(name, list(map(_figure, rows))) for name, rows in _galleries(runs).items()],
        statistics=_statistics(runs),
        people=PEOPLE,
        decoding=_recorded(runs, "decode"),
        versions=_recorded(runs, "versions"),
        differing=_differing(runs),
    )
    write_atomically(path, page.encode())


def _summary(runs: Sequence[ReportedRun]) -> dict[str, list[float]]:
    """Return the scores that all runs have."""
    names = [name for name in SUMMARY if all(name in run.scores for run in runs)]
    return {name: [run.scores[name] for run in runs] for name in names}


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


def _rows(runs: Sequence[ReportedRun]) -> list[Row]:
    """Return the images of one run, or those that all runs captioned."""
    if len(runs) == 1:
        return [[("", prediction)] for prediction in runs[0].predictions]
    by_id = {r.name: {p.image.original_id: p for p in r.predictions} for r in runs if r.predictions}
    ids = next(iter(by_id.values()), {})
    common = [key for key in ids if all(key in of for of in by_id.values())]
    return [[(name, of[key]) for name, of in by_id.items()] for key in common]


def _galleries(runs: Sequence[ReportedRun]) -> dict[str, list[Row]]:
    """Choose rows for each heading; none stands below two of them."""

    def gain(row: Row) -> float:
        return row[-1][1].cider - row[0][1].cider

    def spread(row: Row) -> float:
        return float(np.ptp([prediction.cider for _, prediction in row]))

    orders: dict[str, Callable[[Row], float]] = {"Where CIDEr differs most": spread}
    if len(runs) == 1:
        orders = {
            "Best by CIDEr": lambda row: row[0][1].cider,
            "Worst by CIDEr": lambda row: -row[0][1].cider,
            "Longest captions": lambda row: len(row[0][1].caption),
        }
    elif len(runs) == 2:
        orders = {"Largest gain in CIDEr": gain, "Smallest gain in CIDEr": lambda row: -gain(row)}
    rows = _rows(runs)
    if len(rows) <= SHOWN:
        return {"Images": sorted(rows, key=next(iter(orders.values())), reverse=True)}
    shown = min(SHOWN, len(rows) // (len(orders) + 1))
    left = random.Random(0).sample(rows, len(rows))
    galleries, left = {"Drawn at random": left[:shown]}, left[shown:]
    for heading, order in orders.items():
        left.sort(key=order, reverse=True)
        galleries[heading], left = left[:shown], left[shown:]
    return galleries


def _figure(row: Row) -> dict[str, Any]:
    image, source = row[0][1].image, None
    if small := thumbnail(image.path, THUMBNAIL):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    return {"image": image, "source": source, "captions": row}


def _recorded(runs: Sequence[ReportedRun], key: str) -> dict[str, dict[str, Any]]:
    """Return a part of each run's metrics; of the first run alone where they are equal."""
    columns = {run.name: run.metrics.get(key) or {} for run in runs}
    first = next(iter(columns.items()))
    return dict([first]) if all(column == first[1] for column in columns.values()) else columns


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
    """Return a number in up to four digits; large ones have thousands separators."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 4):.4g}"


def draw_curves(runs: Sequence[ReportedRun]) -> list[str]:
    """Draw a chart per quantity."""
    charts: dict[str, dict[str, Points]] = {name: {} for name in FIRST_CURVES}
    logged = [run for run in runs if run.curves]
    for run in logged:
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            label = f"{run.name}: {series}" if len(logged) > 1 else series
            if points := [(step, value) for step, value in curve if math.isfinite(value)]:
                charts.setdefault(quantity, {})[label] = points
    labels = dict.fromkeys(label for lines in charts.values() for label in lines)
    colors = {label: f"var(--c{number % COLORS})" for number, label in enumerate(labels)}
    return [line_chart(_label(name), lines, colors) for name, lines in charts.items() if lines]


def line_chart(title: str, lines: Mapping[str, Points], colors: Mapping[str, str]) -> str:
    """Return an ``<svg>`` that fills its container; several lines are named below it.

    Text and grid have the colors of the CSS variables --soft and --line.

    Args:
        lines: name -> finite points (training step, value), at least one.
        colors: name -> CSS color of its line.
    """
    plots = [_thinned(points) for points in lines.values()]
    low, high = np.concatenate(plots).min(0), np.concatenate(plots).max(0)
    margin = (high - low <= 1e-9 * np.abs(low)) * (np.abs(low) + 1) / 2  # of a constant
    low, high = low - margin, high + margin
    corner, size = np.array([LEFT, BOTTOM]), np.array([RIGHT - LEFT, TOP - BOTTOM])

    def placed(points: np.ndarray) -> np.ndarray:
        return corner + (points - low) / (high - low) * size

    middle = (LEFT + RIGHT) / 2
    parts = [_text(LEFT, 18, title, "start"), _text(middle, BOTTOM + 36, "training step")]
    for value in _ticks(low[1], high[1]):
        y = placed(np.array([low[0], value]))[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:.6g}", "end"))
    for step in _ticks(low[0], high[0]):
        parts.append(_text(placed(np.array([step, low[1]]))[0], BOTTOM + 18, f"{step:g}"))
    row = BOTTOM + 40
    for name, points in zip(lines, plots, strict=True):
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed(points))
        width = 2 if len(points) > 1 else 6
        stroke = f'fill="none" stroke="{colors[name]}" stroke-linecap="round"'
        # Round ends, and a last line of no length, make a single point a dot.
        parts.append(f'<path d="M{corners}h0" {stroke} stroke-width="{width}"/>')
        if len(lines) > 1:
            row += LEGEND_ROW
            parts.append(f'<path d="M{LEFT} {row - 4}h28" {stroke} stroke-width="2"/>')
            parts.append(_text(LEFT + 36, row, name, "start"))
    box = f'viewBox="0 0 {WIDTH} {row + 8}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> np.ndarray:
    """Return the multiples of 1, 2 or 5 times a power of ten between two numbers."""
    least = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="12"'
    return f'<text {place} fill="var(--soft)">{escape(text)}</text>'


def _thinned(points: Points) -> np.ndarray:
    """Return means of neighbors [P, 2], at most `MOST_POINTS` of them."""
    groups = np.array_split(np.array(points, float), min(len(points), MOST_POINTS))
    return np.array([group.mean(0) for group in groups])
