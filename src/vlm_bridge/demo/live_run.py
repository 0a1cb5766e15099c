"""A training run while it trains: its curves and sample captions as part of a page."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.charts import Line, line_chart
from vlm_bridge.evaluation.run_folder import HISTORY_NAME, read_curves

CHARTS = {
    "Loss (nats per token)": ("train/loss", "validation/loss"),
    "Visual gain (nats per token): the loss without the right image": ("validation/visual_gain",),
    "Learning rate": ("train/learning_rate",),
    "CIDEr while training": ("validation/cider",),
}
SAMPLES_SHOWN = 12


def live_html(folder: Path) -> str:
    """Return charts and sample captions, the newest first.

    Args:
        folder: of a run, or its ``logs``.

    Raises:
        DataError: there is no log, it is empty yet, or it is damaged.
    """
    logs = [log for log in (folder, folder / "logs") if (log / HISTORY_NAME).is_file()]
    if not logs:
        raise DataError(f"{folder} has no logs/{HISTORY_NAME}: give the folder of a training run")
    curves = read_curves(logs[0])
    if not curves:
        raise DataError(f"{logs[0] / HISTORY_NAME} is empty: the run has logged nothing yet")
    charts = ""
    for number, (title, names) in enumerate(CHARTS.items()):
        lines = [Line(name, curves[name], i) for i, name in enumerate(names) if name in curves]
        if lines:
            several = len(names) > 1
            charts += line_chart(
                title, lines, x_label="training step", key=f"live{number}", legend=several
            )
    status = f"Step {max(curve[-1][0] for curve in curves.values()):,}"
    if gain := curves.get("validation/visual_gain"):
        status += f", visual gain {gain[-1][1]:+.3f} nats per token"
    samples = "".join(
        f"<h4>Step {step:,}</h4><ul>"
        + "".join(f"<li>{escape(c)} <small>{escape(r)}</small></li>" for c, r in captions)
        + "</ul>"
        for step, captions in _samples(logs[0] / HISTORY_NAME)
    )
    heading = "<h3>Sample captions, each with a reference</h3>" if samples else ""
    return (
        f'<p class="vb-status">{status}</p><div class="vb-charts">{charts}</div>{heading}'
        f'<div class="vb-samples">{samples}</div>'
    )


def _samples(log: Path) -> list[tuple[int, list[list[str]]]]:
    """Return the newest samples of a log; a resumed run has logged some steps twice."""
    found: dict[int, list[list[str]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last line, half written
            break
        if event["event"] == "samples":
            step = event["step"]
            found = {earlier: found[earlier] for earlier in found if earlier < step}
            found[step] = event["captions"]
    return list(found.items())[: -SAMPLES_SHOWN - 1 : -1]
