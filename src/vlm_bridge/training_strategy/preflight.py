"""Refuse a training that would stop later, before models are loaded or an image is encoded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError
from vlm_bridge.model_architecture.weights import position_limit
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.changes import dataset_changes, dataset_facts, recipe_changes

PROBE_BYTES = 1 << 20
"""Written into a folder and deleted: on a full disk, making an empty file succeeds."""


def check_resume(
    content: Mapping[str, Any],
    path: Path,
    recipe: Recipe,
    manifest: Mapping[str, Any],
    *,
    force: bool,
) -> tuple[list[str], bool]:
    """Compare a checkpoint with the training that would continue it.

    Args:
        content: of the checkpoint at ``path``.
        manifest: of the data that the training reads.
        force: continue although recipe or data have changed.

    Returns:
        What has changed, a phrase each; and whether the data have.

    Raises:
        CheckpointError: the checkpoint is of another architecture, holds weights only, or (without ``force``) is of
            another recipe or other data.
    """
    checkpoints.check_architecture(dict(content), recipe, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        return [], False
    training = content.get("training")
    if training is None:
        raise CheckpointError(
            f"{path} holds weights only; resume from {checkpoints.LATEST} or {checkpoints.BEST}, or train on from "
            f"these weights with start_from={path}"
        )
    before = training.get("dataset", {"fingerprint": training["dataset_fingerprint"]})
    other_data = dataset_changes(before, dataset_facts(manifest))
    changes = other_data + recipe_changes(
        checkpoints.recipe_of(dict(content), path, to_build=False), recipe
    )
    if changes and not force:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(changes)} (go back to what it was, or "
            "continue all the same with --force)"
        )
    return changes, bool(other_data)


def check_positions(recipe: Recipe) -> None:
    """Raise ConfigurationError if captions may become longer than the language model can count."""
    limit = position_limit(recipe.language_model)
    if limit is not None and recipe.decode.max_new_tokens >= limit:
        raise ConfigurationError(
            f"decode.max_new_tokens={recipe.decode.max_new_tokens} and the start token are more than the {limit} "
            f"positions of {recipe.language_model.name}: ask for fewer"
        )


def check_folders(recipe: Recipe) -> None:
    """Raise ConfigurationError if checkpoints or logs could not be written: by writing there. Nothing is left."""
    for key in ("checkpoint_dir", "log_dir"):
        folder = Path(getattr(recipe, key))
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {key}={folder}: {error.strerror or error} (free some space, or choose another "
                f"folder with {key}=...)"
            ) from error
        finally:
            for place in missing:
                with suppress(OSError):
                    place.rmdir()
