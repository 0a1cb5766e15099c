"""A training run while it trains, as a page can show it: curves and sample captions from the monitor's log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.charts import Line, line_chart
from vlm_bridge.evaluation.run_folder import HISTORY_NAME, Curve, read_curves

CHARTS = {
    "Loss (nats per token)": ("train/loss", "validation/loss"),
    "Visual gain (nats per token): what the right picture is worth": ("validation/visual_gain",),
    "Learning rate": ("train/learning_rate",),
    "CIDEr while training": ("validation/cider",),
}
"""Title -> the curves that it shows; a chart whose curves have no points is left out."""
EPOCHS_SHOWN = 12


@dataclass(frozen=True)
class SampleCaptions:
    """Captions generated at a step, each with a reference; ``epoch`` counts from 1, None where nobody wrote it."""

    step: int
    epoch: int | None
    captions: list[tuple[str, str]]


@dataclass(frozen=True)
class LiveRun:
    """What a run has logged so far; ``samples`` are in the order of training."""

    curves: dict[str, Curve]
    samples: list[SampleCaptions]

    @property
    def last_step(self) -> int:
        return max(curve[-1][0] for curve in self.curves.values())


def read_live_run(folder: Path) -> LiveRun:
    """Read a run's folder or its ``logs`` folder.

    Raises:
        DataError: there is no log, it is empty yet, or it is damaged.
    """
    log = next(
        (log for log in (folder / HISTORY_NAME, folder / "logs" / HISTORY_NAME) if log.is_file()),
        None,
    )
    if log is None:
        raise DataError(f"{folder} has no logs/{HISTORY_NAME}: give the folder of a training run")
    curves = read_curves(log.parent)
    if not curves:
        raise DataError(f"{log} is empty: the run has logged nothing yet")
    return LiveRun(curves, _samples(log))


def _samples(log: Path) -> list[SampleCaptions]:
    """Sample captions of a log whose lines `read_curves` could read; of a step written twice, the later."""
    epochs: dict[int, int] = {}
    found: dict[int, list[tuple[str, str]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last line, half written
            break
        step = event["step"]
        if event["event"] == "validation":
            epochs[step] = event["epoch"] + 1
        elif event["event"] == "samples":
            for later in [
                other for other in found if other >= step
            ]:  # of before the run was resumed
                del found[later]
            found[step] = [(caption, reference) for caption, reference in event["captions"]]
    return [SampleCaptions(step, epochs.get(step), captions) for step, captions in found.items()]


def to_html(run: LiveRun) -> str:
    """Charts and sample captions, the newest first, as a fragment of a page."""
    charts = []
    for number, (title, names) in enumerate(CHARTS.items()):
        lines = [
            Line(name, run.curves[name], colour)
            for colour, name in enumerate(names)
            if run.curves.get(name)
        ]
        if lines:
            legend = (
                len(names) > 1
            )  # of two curves, the one that is there already must say which it is
            chart = line_chart(
                title, lines, x_label="training step", key=f"live{number}", legend=legend
            )
            charts.append(chart)
    gain = run.curves.get("validation/visual_gain")
    last = f"Step {run.last_step:,}"
    if gain:
        last += f", visual gain {gain[-1][1]:+.3f} nats per token"
    samples = [
        f"<h4>{_when(sample)}</h4><ul>"
        + "".join(
            f"<li>{escape(said)} <small>{escape(reference)}</small></li>"
            for said, reference in sample.captions
        )
        + "</ul>"
        for sample in reversed(run.samples[-EPOCHS_SHOWN:])
    ]
    heading = "<h3>Sample captions, each with one of people's behind it</h3>" if samples else ""
    return (
        f'<p class="vb-status">{last}</p><div class="vb-charts">{"".join(charts)}</div>{heading}'
        f'<div class="vb-samples">{"".join(samples)}</div>'
    )


def _when(sample: SampleCaptions) -> str:
    epoch = f"Epoch {sample.epoch}, step" if sample.epoch is not None else "Step"
    return f"{epoch} {sample.step:,}"
