"""Recipes of earlier versions, and of the published DINOv2 + Gemma-2 system, in today's layout."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

RENAMED = {
    "vision_model_name": "vision_encoder.name",
    "language_model_name": "language_model.name",
    "bridge_num_heads": "bridge.num_heads",
    "bridge_dropout": "bridge.dropout",
    "max_length": "max_caption_tokens",
}
REMOVED: dict[str, object] = {"pin_memory": None}
"""Keys without meaning today, and the value that meant today's behavior."""


def upgrade(data: dict[str, Any], where: str = "recipe") -> dict[str, Any]:
    """Return a recipe's dict with today's keys; log what is ignored."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    ignored = []
    for key, neutral in REMOVED.items():
        if key in data and data.pop(key) != neutral:
            ignored.append(key)
    for old, new in RENAMED.items():
        if old in data:
            section, _, name = new.rpartition(".")
            (data.setdefault(section, {}) if section else data)[name] = data.pop(old)
    if ignored:
        logger.warning("%s: without meaning in this version: %s", where, ", ".join(ignored))
    return data
