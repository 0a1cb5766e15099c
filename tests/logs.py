"""What a training leaves, as a test reads it: messages, events and checkpoints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def log_lines() -> list[str]:
    """Return a list that grows with every message."""
    lines: list[str] = []
    logger = logging.getLogger("vlm_bridge")
    logger.addHandler(_Lines(lines))
    logger.setLevel(logging.INFO)
    return lines


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind in a run's history."""
    lines = Path(recipe.log_dir, "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def saved(recipe: Recipe, name: str = checkpoints.LATEST) -> dict[str, Any]:
    """Return the content of a run's checkpoint."""
    return checkpoints.load_checkpoint(Path(recipe.checkpoint_dir, name))
