"""A report as one HTML file: opens from disk, needs no network, and can be mailed as it is.

One run, or several side by side: `write_report` is the same for both. Numbers stand in ``<data value="...">`` with all
their digits, so that a program reads from the page what the JSON says.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.caption_folder import write_atomically
from vlm_bridge.evaluation.caption_statistics import CaptionStatistics, caption_statistics
from vlm_bridge.evaluation.charts import Line, histogram, line_chart
from vlm_bridge.evaluation.contact_sheet import thumbnail
from vlm_bridge.evaluation.predictions import Prediction, best, drawn, longest, worst
from vlm_bridge.evaluation.published import published_on
from vlm_bridge.metrics import score_notes

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
CURVES = ("loss", "visual_gain", "cider", "bleu4", "perplexity")
"""The quantities whose charts come first; those of the optimiser come last."""
OPTIMIZER = ("learning_rate", "gradient_norm")
SHOWN = 12
"""Pictures in each section of a contact sheet or report."""
THUMBNAIL = (320, 240)
"""Pixels; about 15 kB each as JPEG, so that a report with dozens of pictures can still be mailed."""
PEOPLE = "people"
"""How the first reference of each image is called beside what captioners said."""


class Share(float):
    """A fraction that is shown as a percentage."""


@dataclass(frozen=True)
class ReportedRun:
    """What a report shows of one run; what is empty is left out.

    Attributes:
        name: unique within a report.
        dataset: what it was evaluated on, to find published scores of it.
        metrics: an evaluation's ``metrics.json``. Numbers at its top are scores, also those that we do not know.
        predictions: in the order of the images.
        curves: ``series/quantity`` (``train/loss``, ``validation/loss``) -> points; those of one quantity share a
            chart, and values that are not finite are left out.
        recipe_yaml: the whole recipe, so that the run can be repeated from its report.
        shares: metric -> fraction of the score that the run is compared with.
        notes: what a reader must know about it, one line each.
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
        """Every number of the metrics but the failures, which are a note; the field's metrics first, as usual."""
        order = (*METRICS, "SPICE", "perplexity", "visual_gain")
        numbers = {
            name: value
            for name, value in self.metrics.items()
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and name != "num_failures"
        }
        return {name: numbers[name] for name in (*order, *numbers) if name in numbers}


def write_report(
    path: Path, runs: Sequence[ReportedRun], *, title: str, notes: Sequence[str] = ()
) -> None:
    """Write the report of a run, or of several side by side.

    Args:
        path: the HTML file; replaced at once when the new one is complete.
        title: heading and window title.
        notes: what a reader must know about all of it, one line each.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [*notes, *(_of(run, runs) + note for run in runs for note in _notes(run))]
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(runs[0]) if len(runs) == 1 else "",
        *(f'<p class="note">{escape(line)}</p>' for line in lines),
        _scores(runs),
        _curves(runs),
        *_galleries(runs),
        _captions(runs),
        _table("Decoding", {run.name: run.metrics.get("decode") or {} for run in runs}),
        _recipes(runs),
        _table("Environment", {run.name: run.metrics.get("versions") or {} for run in runs}),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, body)))
    write_atomically(Path(path), page.encode())


def _of(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _notes(run: ReportedRun) -> list[str]:
    lines = [
        *run.notes,
        *score_notes(run.metrics.get("skipped") or {}, run.metrics.get("tokenizer")),
    ]
    if failures := run.metrics.get("num_failures"):
        lines.append(f"{failures} picture(s) could not be captioned and count as empty captions")
    return lines


# --- Scores -------------------------------------------------------------------------------------------


def _summary(run: ReportedRun) -> str:
    """The numbers that matter most, large."""
    first = ("CIDEr", "BLEU-4", "METEOR", "visual_gain", "perplexity", "num_images")
    cards = "".join(
        f"<div><dt>{escape(_label(name))}</dt><dd>{_score(run.scores[name])}</dd></div>"
        for name in first
        if name in run.scores
    )
    return f'<dl class="summary">{cards}</dl>' if cards else ""


def _scores(runs: Sequence[ReportedRun]) -> str:
    """A row a system, as papers print them; published ones below, marked as quoted and with their source."""
    measured = [run for run in runs if run.scores]
    if not measured:
        return ""
    metrics = list(dict.fromkeys(name for run in measured for name in run.scores))
    rows = "".join(_score_row(run, metrics) for run in measured)
    systems = [
        system
        for dataset in dict.fromkeys(run.dataset for run in measured)
        for system in published_on(dataset)
    ]
    for system in systems:
        cells = "".join(f"<td>{_quoted(system.scores.get(metric))}</td>" for metric in metrics)
        rows += (
            f'<tr class="quoted"><th>{escape(system.system)} <small class="tag">quoted</small>'
            f"<small>{escape(system.source)}</small></th>{cells}</tr>"
        )
    notes = "Scores are fractions: papers print CIDEr 1.20 as 120. "
    if any(run.shares for run in measured):
        reference = next((run.name for run in runs if not run.shares), "the reference")
        notes += f"Percentages are shares of what {reference} has. "
    if systems:
        notes += "Quoted rows were not measured here: pictures, splits and preprocessing are those of their papers. "
    if any("visual_gain" in run.scores for run in measured):
        notes += (
            "Visual gain is by how many nats per token the loss grows when the pictures are shuffled among the "
            "captions: near 0, the captioner does not look."
        )
    head = "".join(f"<th>{escape(_label(metric))}</th>" for metric in metrics)
    return (
        f'<h2>Scores</h2>\n<div class="wide"><table class="scores"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(notes.strip())}</p>'
    )


def _score_row(run: ReportedRun, metrics: Sequence[str]) -> str:
    cells = ""
    for metric in metrics:
        share = f"<small>{run.shares[metric]:.1%}</small>" if metric in run.shares else ""
        cells += f"<td>{_score(run.scores.get(metric))}{share}</td>"
    return f"<tr><th>{escape(run.name)}</th>{cells}</tr>"


def _score(value: float | None) -> str:
    """Four decimals, as `vlm-bridge evaluate` prints them; counts and large perplexities in fewer."""
    return _number(value, ".4f" if isinstance(value, float) and abs(value) < 10 else "")


def _quoted(value: float | None) -> str:
    """No more decimals than the paper printed, three at least."""
    return _number(value, ".3f" if value is not None and round(value, 3) == value else ".4f")


# --- Training ------------------------------------------------------------------------------------------


def _curves(runs: Sequence[ReportedRun]) -> str:
    """A chart a quantity. A colour is one run in all charts, and its series differ in style; alone, in colour."""
    several = len(runs) > 1
    by_quantity: dict[str, list[Line]] = {}
    for colour, run in enumerate(runs):
        for name, curve in run.curves.items():
            series, _, quantity = name.rpartition("/")
            finite = [(float(step), value) for step, value in curve if math.isfinite(value)]
            if finite:
                lines = by_quantity.setdefault(quantity, [])
                own = sum(line.colour == colour for line in lines) if several else len(lines)
                label = _of(run, runs) + (series or quantity)
                lines.append(
                    Line(label, finite, colour, own) if several else Line(label, finite, own)
                )
    charts = ""
    places = {name: place for place, name in enumerate(CURVES)} | dict.fromkeys(
        OPTIMIZER, len(CURVES) + 1
    )
    for number, quantity in enumerate(
        sorted(by_quantity, key=lambda name: places.get(name, len(CURVES)))
    ):
        lines = by_quantity[quantity]
        legend = several or len(lines) > 1
        svg = line_chart(
            _label(quantity), lines, x_label="step", key=f"curve{number}", legend=legend
        )
        charts += f"<figure>{svg}</figure>\n"
    return f'<h2>Training</h2>\n<div class="charts">{charts}</div>' if charts else ""


# --- Captions ------------------------------------------------------------------------------------------


def _captions(runs: Sequence[ReportedRun]) -> str:
    """Statistics of what was said, beside those of one human caption of each image."""
    speaking = [run for run in runs if run.predictions]
    if not speaking:
        return ""
    statistics = {
        run.name: caption_statistics(
            [prediction.caption for prediction in run.predictions],
            [prediction.finished for prediction in run.predictions],
        )
        for run in speaking
    }
    people = caption_statistics(
        [prediction.image.captions[0] for prediction in speaking[0].predictions]
    )
    statistics[PEOPLE] = people
    table = _table(
        "Captions", {name: _statistics_rows(values) for name, values in statistics.items()}
    )
    lengths = {
        name: {
            length: count / len(values.lengths) for length, count in Counter(values.lengths).items()
        }
        for name, values in statistics.items()
    }
    chart = histogram("share of captions by length", lengths, x_label="words", key="lengths")
    phrases = "".join(_phrases(name, values) for name, values in statistics.items())
    about = (
        f"{PEOPLE}: the first reference of each picture. Words are lower case, without punctuation."
    )
    return (
        f'{table}<p class="note">{about}</p><div class="charts"><figure>{chart}</figure></div>'
        f'<h2>Most frequent phrases of four words</h2><div class="phrases">{phrases}</div>'
    )


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


def _phrases(name: str, statistics: CaptionStatistics) -> str:
    rows = "".join(
        f"<tr><th>{escape(phrase)}</th><td>{share:.1%}</td></tr>"
        for phrase, share in statistics.phrases
    )
    return f"<figure><figcaption><b>{escape(name)}</b></figcaption><table>{rows}</table></figure>"


# --- Pictures ------------------------------------------------------------------------------------------


def _galleries(runs: Sequence[ReportedRun]) -> Iterable[str]:
    """Pictures of one run, or those that all runs captioned with what each said."""
    speaking = [run for run in runs if run.predictions]
    if len(runs) == 1:
        for heading, choose in (
            ("Drawn at random", drawn),
            ("Best by CIDEr", best),
            ("Worst by CIDEr", worst),
            ("Longest captions", longest),
        ):
            chosen = choose(runs[0].predictions, SHOWN)
            yield _gallery(heading, [[("", prediction)] for prediction in chosen])
    elif speaking:
        by_image = [
            {prediction.image.original_id: prediction for prediction in run.predictions}
            for run in speaking
        ]
        shared = [
            prediction
            for prediction in speaking[0].predictions
            if all(prediction.image.original_id in predictions for predictions in by_image)
        ]

        def said(prediction: Prediction) -> list[tuple[str, Prediction]]:
            key = prediction.image.original_id
            return [
                (run.name, predictions[key])
                for run, predictions in zip(speaking, by_image, strict=True)
            ]

        def spread(prediction: Prediction) -> float:
            ciders = [other.cider for _, other in said(prediction)]
            return max(ciders) - min(ciders)

        yield _gallery("Drawn at random", [said(prediction) for prediction in drawn(shared, SHOWN)])
        differing = sorted(shared, key=spread, reverse=True)[:SHOWN]
        yield _gallery("Where CIDEr differs most", [said(prediction) for prediction in differing])


def _gallery(heading: str, pictures: Sequence[Sequence[tuple[str, Prediction]]]) -> str:
    figures = "".join(_figure(captions) for captions in pictures)
    return f'<h2>{escape(heading)}</h2>\n<div class="gallery">{figures}</div>' if figures else ""


def _figure(captions: Sequence[tuple[str, Prediction]]) -> str:
    """A picture, what each run (its name, its prediction) said about it, and what a person did."""
    image = captions[0][1].image
    picture = thumbnail(image.path, THUMBNAIL)
    if picture:
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80, optimize=True)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
        shown = f'<img alt="{escape(image.path.name)}" src="{source}">'
    else:
        shown = '<div class="broken">cannot be read</div>'
    texts = ""
    for name, prediction in captions:
        label = f"<small>{escape(name)}</small>" if name else ""
        score = f'<span class="score">CIDEr {_number(prediction.cider, ".2f")}</span>'
        texts += f"<p>{label}{escape(prediction.caption or '(no caption)')} {score}</p>"
    texts += f'<p class="reference">{escape(image.captions[0])}</p>'
    return f"<figure>{shown}<figcaption>{texts}</figcaption></figure>\n"


# --- Settings ------------------------------------------------------------------------------------------


def _recipes(runs: Sequence[ReportedRun]) -> str:
    known = [run for run in runs if run.recipe_yaml]
    if not known:
        return ""
    if len(runs) == 1:
        return f"<h2>Recipe</h2><pre>{escape(known[0].recipe_yaml)}</pre>"
    whole = "".join(
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.recipe_yaml)}</pre></details>"
        for run in known
    )
    flat = {run.name: _flat(run.recipe_yaml) for run in known}
    keys = list(dict.fromkeys(key for recipe in flat.values() for key in recipe))
    differing = [key for key in keys if len({str(recipe.get(key)) for recipe in flat.values()}) > 1]
    table = _table(
        "Recipes: where they differ",
        {name: {key: recipe.get(key) for key in differing} for name, recipe in flat.items()},
    )
    return (table or "<h2>Recipes</h2>") + whole


def _flat(recipe_yaml: str) -> dict[str, object]:
    """Dotted keys of a recipe."""
    import yaml

    def walk(value: object, prefix: str) -> Iterable[tuple[str, object]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value

    return dict(walk(yaml.safe_load(recipe_yaml) or {}, ""))


def _table(heading: str, columns: Mapping[str, Mapping[str, object]]) -> str:
    """A column a run; the names of the rows are those of all columns together."""
    columns = {name: rows for name, rows in columns.items() if rows}
    names = list(dict.fromkeys(row for rows in columns.values() for row in rows))
    if not names:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(columns) > 1 else ""
    body = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(f'<td>{_number(rows.get(row))}</td>' for rows in columns.values())}</tr>"
        for row in names
    )
    return f'<h2>{escape(heading)}</h2>\n<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _label(name: str) -> str:
    return (
        name.replace("num_", "")
        .replace("_", " ")
        .replace("bleu4", "BLEU-4")
        .replace("cider", "CIDEr")
    )


def _number(value: object, form: str = "") -> str:
    """A number by a format, else in four significant digits, with all of them for programs; the rest as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(str(value))
    if isinstance(value, Share):
        form = form or ".1%"
    form = form or (".4g" if isinstance(value, float) and abs(value) < 1000 else ",.0f")
    return f'<data value="{value!r}">{value:{form}}</data>'


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
/* Series colours: Okabe and Ito 2008, told apart by colour-blind readers too. */
:root { --page: #fff; --ink: #1f2328; --soft: #66707b; --line: #dde1e6; --card: #f6f8fa;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1216; --ink: #e3e7ec; --soft: #98a2ad; --line: #2b323a; --card: #181d23;
    --c0: #56b4e9; --c1: #e69f00; --c2: #009e73; --c3: #cc79a7; --c4: #d55e00; --c5: #f0e442; } }
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
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.phrases { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.gallery { display: grid; gap: 1.5rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); }
figure { margin: 0; min-width: 0; }
.gallery img, .broken { display: block; width: 100%; aspect-ratio: 4 / 3; border-radius: 8px;
  object-fit: contain; background: var(--card); }
.broken { display: grid; place-items: center; color: var(--soft); }
.gallery p { margin: .45rem 0 0; line-height: 1.35; overflow-wrap: anywhere; }
.reference { color: var(--soft); font-size: .875rem; }
.score { color: var(--c0); font-size: .875rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { width: 14rem; max-width: 40%; font-weight: 500; color: var(--soft); }
td { overflow-wrap: anywhere; }
thead th { color: var(--ink); width: auto; }
.scores th, .scores td { white-space: nowrap; }
.scores tbody th { white-space: normal; min-width: 15rem; }
.scores td { font-variant-numeric: tabular-nums; }
.quoted { color: var(--soft); }
small { display: block; color: var(--soft); font-weight: 400; }
.tag { display: inline; border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border-radius: 10px; padding: 1rem; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; }
"""
