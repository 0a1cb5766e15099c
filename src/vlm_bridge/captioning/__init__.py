"""Captions from images. The bundled captioner is a folder that `save_pretrained` wrote."""

from pathlib import Path

from vlm_bridge.errors import CheckpointError

BUNDLED = Path(__file__).parents[1] / "bundled"


def bundled_captioner() -> Path:
    """Return the folder of the bundled captioner.

    Raises:
        CheckpointError: this build has none.
    """
    if not (BUNDLED / "config.json").is_file():
        raise CheckpointError("no captioner is bundled with this build: give --checkpoint")
    return BUNDLED
