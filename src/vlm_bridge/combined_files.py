"""Combined files (PVT, projection and BLIP's text decoder in one): read, write, load, and make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm_bridge import runtime
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.combined import (
    CombinedModel,
    ProjectionKind,
    build_combined,
    to_combined,
)
from vlm_bridge.training_strategy import checkpoint as checkpoints


def read_combined(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a combined file, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or anything but a dict of tensors; code in it is not run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"no combined file at {path}; make one with scripts/save_combined_checkpoint.py"
        )
    content = checkpoints.read_file(path)
    if isinstance(content, dict) and content.get("format") == checkpoints.FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint, not a combined file: scripts/save_combined_checkpoint.py --checkpoint {path} "
            "--output F makes one of it"
        )
    if not isinstance(content, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise CheckpointError(f"{path} is not a combined file, which is a dict of tensors alone")
    return {str(name): tensor for name, tensor in content.items()}


def write_combined(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Write a combined file, whole or not at all. Raises CheckpointError."""
    checkpoints.write_file(Path(path), {name: tensor.detach().cpu() for name, tensor in state.items()})


def load_combined_model(
    path: str | Path, pvt: str | None = None, blip: str | None = None, device: str = "cpu"
) -> CombinedModel:
    """The modules (pvt, blip, proj) of a combined file, in evaluation mode.

    Args:
        pvt: name or folder whose configuration the encoder has; None reads sizes from the tensors, which tell those
            of every published PVT.
        blip: the same for the decoder.
        device: `cpu`, `cuda`, `mps`, or `auto`.

    Raises:
        CheckpointError: missing, damaged, or its tensors do not fit (each is named with its shape).
        ModelError: the configuration of ``pvt`` or ``blip`` cannot be had.
    """
    target = runtime.resolve_device(device)
    model = build_combined(read_combined(path), path, pvt=pvt, blip=blip)
    for part in model:
        part.to(target)
    return model


def combine_models(
    pvt: str, blip: str, projection: ProjectionKind = "linear", *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """What a combined file of pretrained parts and a projection at random holds: the start of a training.

    Args:
        pvt: name or folder.
        blip: name or folder; of a whole BLIP the text decoder is taken.

    Raises:
        ModelError: a part cannot be loaded.
        CheckpointError: it is no PVT, or no BLIP.
    """
    recipe = recipe_from_dict(
        {
            "vision_encoder": {"name": pvt},
            "language_model": {"name": blip},
            "bridge": {"kind": "projection", "projection": projection, "standardize_features": False},
            "trainable": {"bridge.*": None},
            "seed": seed,
        }
    )
    return to_combined(build_captioner(recipe), f"{pvt} + {blip}")


def combine_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """What a combined file of a trained captioner holds; the frozen parts come from where its recipe says.

    Args:
        path: a checkpoint or the folder of a run, whose best one in full precision is taken.

    Raises:
        CheckpointError: no checkpoint, or one of a captioner that is no PVT + projection + BLIP.
        ModelError: a part cannot be loaded.
    """
    where = _in_full_precision(Path(path))
    content: dict[str, Any] = checkpoints.load_checkpoint(where)
    captioner = build_captioner(checkpoints.recipe_of(content, where))
    checkpoints.restore(captioner, content, where)
    return to_combined(captioner, where)


def _in_full_precision(path: Path) -> Path:
    """Of a run's folder the checkpoint that is not halved to bfloat16: the best, else the latest."""
    names = [
        folder / name
        for folder in (path, path / "checkpoints")
        for name in (checkpoints.BEST, checkpoints.LATEST)
    ]
    return next((name for name in names if name.is_file()), None) or checkpoints.checkpoint_path(path)
