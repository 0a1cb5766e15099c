"""Compare what two trainings saved, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm_bridge.training_strategy.checkpoint import load_checkpoint


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit-equality of nested containers of tensors and plain values."""
    assert type(one) is type(other), f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, f"{where}: {one} and {other}"


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """Weights and training state are equal."""
    first, second = load_checkpoint(one), load_checkpoint(other)
    for part in ("weights", "training"):
        assert_same(first.get(part), second.get(part), f"{one.name}: {part}")
