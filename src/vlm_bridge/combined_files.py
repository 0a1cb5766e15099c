"""Combined files (PVT, projection and BLIP's text decoder in one): read, write, load, and make one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
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
from vlm_bridge.model_architecture.combined_layouts import (
    Layout,
    in_layout,
    parse,
    part_of,
    unwrapped,
)
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig, image_processor
from vlm_bridge.training_strategy import checkpoint as checkpoints

logger = logging.getLogger(__name__)

DEFAULT_FILE = "checkpoints/blip_pvt_combined.pth"
BLIP = "Salesforce/blip-image-captioning-base"
COMBINE = "scripts/save_combined_checkpoint.py --checkpoint {} --output FILE.pth makes a combined file of it"


def read_combined(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a combined file in any layout (`combined_layouts`), on the CPU and under our names.

    Raises:
        CheckpointError: missing, damaged, of a run, or anything but tensors; code in it is not run.
    """
    path = Path(path)
    content = _read(path, "scripts/save_combined_checkpoint.py makes one")
    if isinstance(content, dict) and content.get("format") == checkpoints.FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of a run, not a combined file: {COMBINE.format(path)}"
        )
    file = parse(content, path)
    logger.info(f"{path}: {file.description}")
    return file.state


def write_combined(
    path: str | Path, state: Mapping[str, torch.Tensor], layout: Layout = "auto"
) -> None:
    """Write a combined file, whole or not at all.

    Args:
        state: under our names.
        layout: `original` is read by the original's loader; `own` is ours; `auto` is the original's if it can be.

    Raises:
        CheckpointError: the file cannot be written, or the original's layout has no place for a part.
    """
    renamed = in_layout(state, layout, path)
    checkpoints.write_file(
        Path(path), {name: tensor.detach().cpu() for name, tensor in renamed.items()}
    )


def load_combined_model(
    checkpoint_path: str | Path,
    device: str = "cpu",
    blip_model_name: str | None = BLIP,
    pvt: str | None = None,
) -> CombinedModel:
    """The modules (pvt, blip, proj) of a combined file, in evaluation mode; proj is None where the file has none.

    Args:
        checkpoint_path: in any layout.
        device: `cpu`, `cuda`, `mps`, or `auto`.
        blip_model_name: name or folder of the BLIP whose decoder the file holds: its configuration, and the tokenizer
            of the prompt, which is loaded when captions are first asked for. None reads sizes from the tensors.
        pvt: name or folder whose configuration the encoder has; None reads sizes from the tensors, which tell those
            of every published PVT.

    Raises:
        CheckpointError: missing, damaged, or its tensors do not fit (each is named with its shape).
        ConfigurationError: there is no such device here.
        ModelError: the configuration of ``pvt`` or ``blip_model_name`` cannot be had.
    """
    target = runtime.resolve_device(device)
    state = read_combined(checkpoint_path)
    model = build_combined(state, checkpoint_path, pvt=pvt, blip=blip_model_name)
    model.blip.to(target)
    return model


def combine_models(
    pvt: str, blip: str, projection: ProjectionKind | None = None, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """What a combined file of pretrained parts and a projection at random holds: the start of a training.

    Args:
        pvt: name, folder, or a .pth file with the weights of the original's PVT.
        blip: name or folder; of a whole BLIP the text decoder is taken.
        projection: None is `linear` for the original's PVT, as there, else `conv3x3`.

    Raises:
        ModelError: a part cannot be loaded.
        CheckpointError: it is no PVT, or no BLIP.
    """
    if pvt.endswith((".pth", ".pt")):
        with TemporaryDirectory() as folder:
            _pvt_of_file(Path(pvt)).save_pretrained(folder)
            image_processor().save_pretrained(folder)
            return combine_models(folder, blip, projection or "linear", seed=seed)
    recipe = recipe_from_dict(
        {
            "vision_encoder": {"name": pvt},
            "language_model": {"name": blip},
            "bridge": {
                "kind": "projection",
                "projection": projection or "conv3x3",
                "standardize_features": False,
            },
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


def _read(path: Path, remedy: str) -> Any:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a combined file; of a run, {COMBINE.format(path)}"
        )
    if not path.is_file():
        raise CheckpointError(f"no file at {path}; {remedy}")
    # The original's training keeps its arguments beside the weights: a class of plain attributes.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return checkpoints.read_file(path)


def _pvt_of_file(path: Path) -> PvtCbam:
    """The original's PVT of a file of its weights: bare, under `model_state`, or as `visual_encoder.*`."""
    content = _read(path, "--pvt takes a hub name, a folder or a .pth file")
    tensors = {
        str(name): x for name, x in unwrapped(content).items() if isinstance(x, torch.Tensor)
    }
    weights = part_of(tensors, "visual_encoder.") or {
        name: x for name, x in tensors.items() if name.startswith(("patch", "stage", "norm."))
    }
    try:
        model = PvtCbam(PvtCbamConfig.of(weights))
        model.load_state_dict(weights)
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold the original's PVT (patch1.*, stage1.*, ...): {message}"
        ) from error
    return model


def _in_full_precision(path: Path) -> Path:
    """Of a run's folder the checkpoint that is not halved to bfloat16: the best, else the latest."""
    names = [
        folder / name
        for folder in (path, path / "checkpoints")
        for name in (checkpoints.BEST, checkpoints.LATEST)
    ]
    return next((name for name in names if name.is_file()), None) or checkpoints.checkpoint_path(
        path
    )
