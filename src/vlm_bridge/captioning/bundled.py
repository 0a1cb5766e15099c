"""The captioner that comes with the package: a folder as `Captioner.save_pretrained` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from vlm_bridge.errors import CheckpointError

FOLDER = Path(__file__).parents[1] / "bundled"
CONFIG = "config.json"


def bundled_captioner() -> Path:
    """The folder of the bundled captioner.

    Raises:
        CheckpointError: this build has none.
    """
    if not (FOLDER / CONFIG).is_file():
        raise CheckpointError("no captioner is bundled with this build: give --checkpoint")
    return FOLDER


def bundled_models() -> list[str]:
    """Return the names of the bundled captioner's frozen parts; none without one."""
    if not (FOLDER / CONFIG).is_file():
        return []
    recipe = json.loads((FOLDER / CONFIG).read_text(encoding="utf-8"))["recipe"]
    return [*recipe["vision_encoder"]["name"].split(" + "), recipe["language_model"]["name"]]
