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
from html import escape
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from vlm_bridge.captioning.contact_sheet import thumbnail
from vlm_bridge.evaluation.run_folder import Prediction, ReportedRun
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import simple_tokenize

SUMMARY = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
FIRST_CURVES = ("loss", "visual_gain", "cider", "bleu4", "perplexity")
SHOWN = 12  # images in each gallery
THUMBNAIL = (320, 240)
PEOPLE = "people"  # name of the first reference of each image beside the captioners
LABELS = {"num_": "", "_": " ", "bleu4": "BLEU-4", "cider": "CIDEr"}

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 60, 545, 34, 250  # of a chart
LEGEND_ROW = 18
COLORS = 6
MOST_POINTS = 400  # more cannot be seen and would bloat the file

Points = Sequence[tuple[float, float]]
Row = Sequence[tuple[str, Prediction]]
"""An image's captions, each with the name of its run; empty where there is only one."""


def write_report(
    path: Path, runs: Sequence[ReportedRun], *, title: str, notes: Iterable[str] = ()
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
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        summary={n: runs[0].scores[n] for n in SUMMARY if n in runs[0].scores},
        notes=chain(notes, *map(ReportedRun.all_notes, runs, prefixes)),
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
    write_atomically(path, page.encode())


def published_on(dataset: str) -> list[dict[str, Any]]:
    """Return published systems on a dataset whose name begins like `dataset` (Flickr8k-clean)."""
    file = resources.files("vlm_bridge.evaluation") / "published.yaml"
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    published = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [system for key, of in published.items() if name.startswith(key) for system in of]


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


def _galleries(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield images of one run, or images that all runs captioned."""
    several = len(runs) > 1
    captioned = {run.name if several else "": run.predictions for run in runs if run.predictions}
    by_image = {
        name: {p.image.original_id if several else p.image: p for p in predictions}
        for name, predictions in captioned.items()
    }
    rows: list[Row] = [
        [(name, of[key]) for name, of in by_image.items()]
        for key in next(iter(by_image.values()), ())
        if all(key in of for of in by_image.values())
    ]
    yield "Drawn at random", random.Random(0).sample(rows, min(SHOWN, len(rows)))
    if several:
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

    def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner

    given = [run for run in runs if run.recipe_yaml]
    recipes = {run.name: dict(flat(yaml.safe_load(run.recipe_yaml))) for run in given}
    keys = dict.fromkeys(chain.from_iterable(recipes.values()))
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


def _curves(runs: Sequence[ReportedRun], prefixes: Sequence[str]) -> list[str]:
    """Draw a chart per quantity."""
    charts: dict[str, dict[str, Points]] = {name: {} for name in FIRST_CURVES}
    for run, prefix in zip(runs, prefixes, strict=True):
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            if points := [(step, value) for step, value in curve if math.isfinite(value)]:
                charts.setdefault(quantity, {})[prefix + (series or quantity)] = points
    return [line_chart(_label(name), lines, "step") for name, lines in charts.items() if lines]


def line_chart(title: str, lines: Mapping[str, Points], x_label: str) -> str:
    """Return an ``<svg>`` that fills its container; several lines are named below it.

    It is colored by the CSS variables --soft, --line and --c0 to --c5.

    Args:
        lines: name -> finite points in the order of x, at least one.
    """
    plots = [_thinned(points) for points in lines.values()]
    x_ticks = _ticks([x for points in plots for x, _ in points])
    y_ticks = _ticks([y for points in plots for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    parts = [_text(LEFT, 18, title, "start", 14), _text((LEFT + RIGHT) / 2, BOTTOM + 36, x_label)]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    parts += [_text(place(tick, y_ticks[0])[0], BOTTOM + 18, f"{tick:g}") for tick in x_ticks]
    row = BOTTOM + 40
    for number, (name, points) in enumerate(zip(lines, plots, strict=True)):
        places = [place(x, y) for x, y in points]
        color = f"var(--c{number % COLORS})"
        stroke = f'fill="none" stroke="{color}" stroke-width="1.7"'
        parts.append(f'<path d="M{"L".join(f"{x} {y}" for x, y in places)}" {stroke}/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>' for x, y in places]
        if len(lines) > 1:
            row += LEGEND_ROW
            parts.append(f'<path d="M{LEFT} {row - 4}h28" {stroke}/>')
            parts.append(_text(LEFT + 36, row, name, "start"))
    box = f'viewBox="0 0 {WIDTH} {row + 8}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="var(--soft)">{escape(text)}</text>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Return 3 to 7 round numbers, evenly spaced, that enclose the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(s for s in (1, 2, 5, 10) if (high - low) / (s * magnitude) <= 5) * magnitude
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    """Return means of neighbors, at most `MOST_POINTS` of them."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
