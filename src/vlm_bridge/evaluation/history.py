"""The curves of a training run, from the ``history.jsonl`` that the monitor appends to."""

from __future__ import annotations

import json
from pathlib import Path

from vlm_bridge.errors import DataError

HISTORY_NAME = "history.jsonl"
NOT_CURVES = frozenset(
    {"step", "epoch", "num_images", "samples_per_second", "tokens_per_second", "padding_share"}
)
"""Numbers of an event that say where or how fast it was, not how well."""

Curve = list[tuple[int, float]]
"""Points (training step, value)."""


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Every quantity of a run as ``series/quantity`` (``train/loss``) -> points; empty where there is no log.

    A run that was continued from a checkpoint has steps twice: the later writing holds.

    Raises:
        DataError: a line is no event (the last one excepted, which may be half written).
    """
    path = log_dir / HISTORY_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            series, step = _series(event["event"]), event["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not an event of a training run") from None
        for quantity, value in event.items():
            if isinstance(value, int | float) and quantity not in NOT_CURVES:
                curve = curves.setdefault(f"{series}/{quantity}", [])
                while curve and curve[-1][0] >= step:
                    curve.pop()
                curve.append((step, value))
    return curves


def _series(event: str) -> str:
    """Captions decoded while training are validation, as in TensorBoard."""
    return "validation" if event in ("decoded", "samples") else event
