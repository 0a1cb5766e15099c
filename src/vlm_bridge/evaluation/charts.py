"""Line charts as inline SVG, colored by the CSS variables --soft, --line and --c0 to --c5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 60, 545, 34, 250
LEGEND_ROW = 18
COLORS = 6
DASHES = ("none", "6 3", "1.5 3", "6 3 1.5 3")
MOST_POINTS = 400
"""More cannot be seen and would bloat the file."""


def line_chart(title: str, lines: Mapping[str, Points], *, x_label: str, legend: bool) -> str:
    """Return an ``<svg>`` that fills its container.

    Args:
        lines: name -> finite points in the order of x, at least one.
        legend: name the lines below the chart.
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
        color, dash = f"var(--c{number % COLORS})", DASHES[number // COLORS % len(DASHES)]
        stroke = f'fill="none" stroke="{color}" stroke-width="1.7" stroke-dasharray="{dash}"'
        parts.append(f'<path d="M{"L".join(f"{x} {y}" for x, y in places)}" {stroke}/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>' for x, y in places]
        if legend:
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
