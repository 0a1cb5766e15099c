"""Charts as inline SVG, drawn by matplotlib and colored by the style sheet of the page they stand in.

The page must define the CSS variables of `COLORS`, for light and for dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[float, float]]

SERIES = 6
"""Series that a chart tells apart by color; after them colors come again with the next line style."""
LINE_STYLES = ("-", "--", ":", "-.")

# Written into the SVG by matplotlib, which knows no variables, and replaced: no other element has these colors.
_INK, _GRID = "#c010aa", "#c010bb"
_SERIES = [f"#c0105{number}" for number in range(SERIES)]
COLORS = {
    _INK: "var(--soft)",
    _GRID: "var(--line)",
    **{mark: f"var(--c{number})" for number, mark in enumerate(_SERIES)},
}


@dataclass(frozen=True)
class Line:
    """Points in the order of x, finite, at least one; color and style are counted from 0."""

    name: str
    points: Points
    color: int = 0
    style: int = 0


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, key: str, legend: bool) -> str:
    """Lines as an ``<svg>`` that fills its container.

    Args:
        legend: name the lines.
        key: makes the ids in this SVG unique within its page.
    """
    figure, axes = _axes(title, x_label)
    for line in lines:
        thinned = list(_thin(line.points))
        axes.plot(
            [x for x, _ in thinned],
            [y for _, y in thinned],
            label=line.name.replace("$", r"\$"),  # or matplotlib reads mathematics
            color=_SERIES[line.color % SERIES],
            linestyle=LINE_STYLES[(line.style + line.color // SERIES) % len(LINE_STYLES)],
            linewidth=1.6,
            marker="o" if len(line.points) <= 30 else None,
            markersize=3.5,
        )
    return _svg(figure, axes, legend, title, key)


def histogram(
    title: str, counts: Mapping[str, Mapping[int, float]], *, x_label: str, key: str
) -> str:
    """Shares of whole numbers as steps, one outline a series, so that they can be seen behind each other."""
    figure, axes = _axes(title, x_label)
    for number, (name, by_value) in enumerate(counts.items()):
        first, last = min(by_value), max(by_value)
        edges = [value - 0.5 for value in range(first, last + 2)]
        heights = [by_value.get(value, 0) for value in range(first, last + 1)]
        color = _SERIES[number % SERIES]
        label = name.replace("$", r"\$")
        axes.stairs(
            heights, edges, label=label, edgecolor=color, facecolor=color, alpha=0.18, fill=True
        )
        axes.stairs(heights, edges, edgecolor=color, linewidth=1.6)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, len(counts) > 1, title, key)


def _axes(title: str, x_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any, legend: bool, title: str, key: str) -> str:
    import matplotlib

    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text, to be read aloud and found; ids depend on content alone, so that a report can be compared.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": key, "axes.unicode_minus": False}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for mark, variable in COLORS.items():
        svg = svg.replace(mark, variable)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg {view_box[0]} role="img" aria-label="{label}">{rest.strip()}'


def _thin(points: Points, most: int = 400) -> Iterable[tuple[float, float]]:
    """At most ``most`` points, each the mean of neighbours: more cannot be seen and would bloat the file."""
    size = -(-len(points) // most) or 1
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield group[-1][0], sum(value for _, value in group) / len(group)
