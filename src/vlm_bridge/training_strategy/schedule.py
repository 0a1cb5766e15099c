"""Learning-rate schedules: linear warm-up from zero, then cosine, linear or constant."""

from __future__ import annotations

import math


def warmup_within(warmup_steps: int, total_steps: int) -> int:
    """Steps of warm-up in a training: as asked, but at most a tenth of it, or a short one would end in its warm-up."""
    return min(warmup_steps, total_steps // 10)


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_lr: float,
    kind: str,
) -> float:
    """Learning rate of optimiser step ``step`` (0-based): ``learning_rate`` after the warm-up, ``min_lr`` at the end.

    Cosine as in Loshchilov & Hutter 2017 without restarts.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if kind == "constant":
        return learning_rate
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_lr + (learning_rate - min_lr) * remaining
