"""A report as one HTML file: opens from disk, needs no network, and can be mailed as it is."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.evaluation.contact_sheet import SheetItem, thumbnail

Curve = Sequence[tuple[int, float]]
"""Points (training step, value)."""

THUMBNAIL = (320, 240)
"""Pixels; about 15 kB each as JPEG, so that a report with dozens of pictures can still be mailed."""


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, float | int | str],
    sections: Mapping[str, Sequence[SheetItem]],
    curves: Mapping[str, Curve] | None = None,
    recipe_yaml: str = "",
    decode: Mapping[str, object] | None = None,
    environment: Mapping[str, object] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the report; what is empty is left out.

    Args:
        path: the HTML file; replaced at once when the new one is complete.
        title: heading and window title.
        summary: the numbers that matter, name -> value, shown large and in this order.
        sections: heading -> pictures with captions (for example best, worst, random).
        curves: name -> points. Names ``series/quantity`` (``train/loss``, ``val/loss``) share the chart of
            their quantity; values that are not finite are left out.
        recipe_yaml: the whole recipe, so that the run can be repeated from its report.
        decode: generation settings.
        environment: versions and machine.
        notes: what a reader must know about the numbers, one line each.

    Raises:
        OSError: the file cannot be written.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(summary),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        _charts(curves or {}),
        *(_gallery(heading, items) for heading, items in sections.items() if items),
        _table("Decoding", decode or {}),
        f"<h2>Recipe</h2><pre>{escape(recipe_yaml)}</pre>" if recipe_yaml else "",
        _table("Environment", environment or {}),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, body)))
    write_atomically(Path(path), page.encode())


def _summary(summary: Mapping[str, float | int | str]) -> str:
    cards = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(_number(value))}</dd></div>"
        for name, value in summary.items()
    )
    return f'<dl class="summary">{"".join(cards)}</dl>' if summary else ""


def _gallery(heading: str, items: Sequence[SheetItem]) -> str:
    figures = "".join(_figure(item) for item in items)
    return f'<h2>{escape(heading)}</h2>\n<div class="gallery">{figures}</div>'


def _figure(item: SheetItem) -> str:
    picture = thumbnail(item.image, THUMBNAIL)
    if picture:
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
        shown = f'<img alt="{escape(item.image.name)}" src="{source}">'
    else:
        shown = '<div class="broken">cannot be read</div>'
    texts = f"<p>{escape(item.caption or '(no caption)')}</p>"
    if item.reference:
        texts += f'<p class="reference">{escape(item.reference)}</p>'
    if item.score is not None:
        texts += f'<p class="score">{item.score:.3f}</p>'
    return f"<figure>{shown}<figcaption>{texts}</figcaption></figure>\n"


def _table(heading: str, rows: Mapping[str, object]) -> str:
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_number(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<h2>{escape(heading)}</h2>\n<table>{cells}</table>" if rows else ""


def _number(value: object) -> str:
    """Four significant digits for measurements, everything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- Charts ------------------------------------------------------------------------------------------


def _charts(curves: Mapping[str, Curve]) -> str:
    by_quantity: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        series, _, quantity = name.rpartition("/")
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        if finite:
            by_quantity.setdefault(quantity, {})[series or quantity] = finite
    figures = "".join(_chart(quantity, series) for quantity, series in by_quantity.items())
    return f'<h2>Training</h2>\n<div class="charts">{figures}</div>' if figures else ""


def _chart(title: str, series: Mapping[str, Curve], width: int = 460, height: int = 220) -> str:
    """Lines over training steps as inline SVG; the style sheet colours them, so they follow dark mode."""
    left, right, top, bottom = 52, 20, 10, 26
    points = [point for curve in series.values() for point in curve]
    last_step = max(1, max(step for step, _ in points))
    y_ticks = _ticks(min(value for _, value in points), max(value for _, value in points))
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return left + (width - left - right) * step / last_step

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, last_step):
        if tick <= last_step:
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for number, curve in enumerate(series.values()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in _thin(curve))
        parts.append(f'<polyline class="series{number % 4}" points="{path}"/>')
        if len(curve) <= 30:
            dots = (
                f'<circle class="series{number % 4}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5"/>'
                for s, v in curve
            )
            parts.extend(dots)
    legend = "".join(
        f'<span class="series{number % 4}">{escape(name)}</span>' for number, name in enumerate(series)
    )
    legend = f'<span class="legend">{legend}</span>' if len(series) > 1 else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} over training steps">'
        f"{''.join(parts)}</svg></figure>\n"
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) whose ends enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{index * step:.6g}") for index in range(first, max(last, first + 1) + 1)]


def _thin(curve: Curve, most: int = 400) -> Iterable[tuple[int, float]]:
    """At most ``most`` points, each the mean of neighbours: more cannot be seen and would bloat the file."""
    size = -(-len(curve) // most)
    for start in range(0, len(curve), size):
        group = curve[start : start + size]
        yield group[-1][0], sum(value for _, value in group) / len(group)


# --- Page --------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --page: #fff; --ink: #1f2328; --soft: #66707b; --line: #dde1e6; --card: #f6f8fa;
  --c0: #1c6dd0; --c1: #d9480f; --c2: #2b8a3e; --c3: #862e9c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1216; --ink: #e3e7ec; --soft: #98a2ad; --line: #2b323a; --card: #181d23;
    --c0: #6cb0ff; --c1: #ff9a62; --c2: #6fd08c; --c3: #d69cf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 1rem; padding-bottom: .4rem;
  border-bottom: 1px solid var(--line); }
.note { color: var(--soft); margin: .5rem 0; }
.summary { display: grid; gap: .75rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.summary div { background: var(--card); border-radius: 10px; padding: .75rem 1rem; }
.summary dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.summary dd { margin: 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.charts { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.gallery { display: grid; gap: 1.5rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); }
figure { margin: 0; min-width: 0; }
.gallery img, .broken { display: block; width: 100%; aspect-ratio: 4 / 3; border-radius: 8px;
  object-fit: contain; background: var(--card); }
.broken { display: grid; place-items: center; color: var(--soft); }
.gallery p { margin: .45rem 0 0; line-height: 1.35; overflow-wrap: anywhere; }
.reference { color: var(--soft); font-size: .875rem; }
.score { color: var(--c0); font-size: .875rem; font-variant-numeric: tabular-nums; }
.charts figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.legend { display: flex; gap: 1rem; color: var(--soft); font-size: .875rem; }
.legend span::before { content: ""; display: inline-block; width: .8rem; height: 3px; margin-right: .4rem;
  vertical-align: middle; background: currentColor; }
.legend .series0 { color: var(--c0); } .legend .series1 { color: var(--c1); }
.legend .series2 { color: var(--c2); } .legend .series3 { color: var(--c3); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.series0 { stroke: var(--c0); } polyline.series1 { stroke: var(--c1); }
polyline.series2 { stroke: var(--c2); } polyline.series3 { stroke: var(--c3); }
circle.series0 { fill: var(--c0); } circle.series1 { fill: var(--c1); }
circle.series2 { fill: var(--c2); } circle.series3 { fill: var(--c3); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { width: 14rem; max-width: 40%; font-weight: 500; color: var(--soft); }
td { overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: 10px; padding: 1rem; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; }
"""
