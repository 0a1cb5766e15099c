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

PROBE_BYTES = 1 << 20
"""On a full disk, making an empty file succeeds."""


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
        manifest: of the data that the training reads.
        force: continue although recipe or data have changed.

    Returns:
        The changes, and whether the data are among them.

    Raises:
        CheckpointError: another architecture, weights only, or (without ``force``) changes.
    """
    checkpoints.check_architecture(dict(content), recipe, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        return [], False
    training = content.get("training")
    if training is None:
        raise CheckpointError(
            f"{path} holds weights only; resume from {checkpoints.LATEST} or {checkpoints.BEST}, or "
            f"train on from these weights with start_from={path}"
        )
    before = training.get("dataset", {"fingerprint": training["dataset_fingerprint"]})
    of_data = dataset_changes(before, dataset_facts(manifest))
    of_recipe = recipe.changes_since(checkpoints.recipe_of(dict(content), path, to_build=False))
    changes = of_data + of_recipe
    if changes and not force:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(changes)} (go back to what it "
            "was, or continue all the same with --force)"
        )
    return changes, bool(of_data)


def dataset_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a caption folder that a checkpoint holds, with dotted keys."""
    wanted = ("source", "counts", "split_rule", "seed", "settings", "fingerprint")
    return _flat({key: manifest[key] for key in wanted if key in manifest})


def dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two `dataset_facts`; none where the fingerprints are equal."""
    if before["fingerprint"] == now["fingerprint"]:
        return []
    return [
        f"data {key}={now.get(key, 'nothing')}, was {value}"
        for key, value in before.items()
        if key not in now or now[key] != value
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_positions(recipe: Recipe) -> None:
    """Raise ConfigurationError if captions may exceed the positions of the language model."""
    limit = position_limit(recipe.language_model)
    if limit is not None and recipe.decode.max_new_tokens >= limit:
        raise ConfigurationError(
            f"decode.max_new_tokens={recipe.decode.max_new_tokens} and the start token are more than the "
            f"{limit} positions of {recipe.language_model.name}: ask for fewer"
        )


def check_folders(recipe: Recipe) -> None:
    """Raise ConfigurationError if checkpoints or logs cannot be written. Nothing is left behind."""
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
                f"cannot write into {key}={folder}: {error.strerror or error} (free some space, or "
                f"choose another folder with {key}=...)"
            ) from error
        finally:
            for place in missing:
                with suppress(OSError):
                    place.rmdir()
