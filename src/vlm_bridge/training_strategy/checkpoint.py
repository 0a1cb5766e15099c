"""Checkpoints: only what was trained, with the recipe and the names of the frozen parts beside it.

Files are read with ``weights_only=True``: a checkpoint can never run code. They are written to a temporary
name, flushed and renamed, so that an interruption leaves the previous one in place.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from vlm_bridge import __version__
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.errors import CheckpointError, ConfigurationError

FORMAT = "vlm-bridge checkpoint"
FORMAT_VERSION = 1
LATEST, BEST, BEST_WEIGHTS = "latest_checkpoint.pth", "best_model.pth", "best_model_weights_only.pth"


def save_checkpoint(
    path: Path, recipe: Recipe, weights: dict[str, torch.Tensor], training: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint atomically; ``training`` (optimiser, position, ...) is left out of weights-only files."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"vlm_bridge": __version__, "torch": str(torch.__version__)},
        "recipe": recipe.to_dict(),
        "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
    }
    if training is not None:
        content["training"] = training
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {reason} (free some space or change the folder)"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint written by `save_checkpoint`.

    Args:
        path: the file, or a folder that holds one (the best weights are taken).

    Raises:
        CheckpointError: missing, damaged, or not one of ours.
    """
    path = checkpoint_path(path)
    try:
        # torch leaves the checksums of its own zip format unread, and would load flipped bits as weights.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a vlm-bridge checkpoint, or holds code; it was not loaded"
        ) from error
    except Exception as error:  # damaged bytes meet the readers with almost any exception
        raise CheckpointError(f"{path} is damaged or is not a checkpoint: it cannot be read") from error
    parts = {"format", "format_version", "recipe", "weights"}
    if not isinstance(content, dict) or not parts <= content.keys() or content["format"] != FORMAT:
        raise CheckpointError(f"{path} is not a vlm-bridge checkpoint")
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a newer vlm-bridge; update this one")
    return content


def checkpoint_path(path: str | Path) -> Path:
    """The checkpoint file meant by a file or a folder (a run folder or its `checkpoints`)."""
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "checkpoints"):
            for name in (BEST_WEIGHTS, BEST, LATEST):
                if (folder / name).is_file():
                    return folder / name
        raise CheckpointError(f"no checkpoint in {path} ({BEST_WEIGHTS}, {BEST} or {LATEST})")
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}; train one with vlm-training, or run vlm-bridge quickstart"
        )
    return path


def has_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint file or a folder that holds one."""
    try:
        checkpoint_path(path)
    except CheckpointError:
        return False
    return True


def recipe_of(content: dict[str, Any], where: str | Path) -> Recipe:
    """The recipe a checkpoint was trained with."""
    try:
        return recipe_from_dict(content["recipe"], where=str(where))
    except (KeyError, ConfigurationError) as error:
        raise CheckpointError(f"{where}: its recipe cannot be understood: {error}") from error


def load_weights(model: Any, weights: dict[str, torch.Tensor], where: str | Path) -> None:
    """Put trained weights into a captioner; every key and shape must fit.

    Raises:
        CheckpointError: it belongs to another architecture; the first keys that do not fit are named.
    """
    wanted = model.trained_state_dict()
    missing, unknown = wanted.keys() - weights.keys(), weights.keys() - wanted.keys()
    other_shape = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    problems = (
        sorted(other_shape)
        + [f"{k} is missing" for k in sorted(missing)]
        + [f"{k} is unknown" for k in sorted(unknown)]
    )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{where} belongs to another architecture: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights, strict=False)
