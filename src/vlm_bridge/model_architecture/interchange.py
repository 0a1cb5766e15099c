"""Layouts in which trained weights travel: the original project's checkpoints, and Hugging Face folders.

The original project, "Vision-Language Bridge for Image Captioning", saves a dict whose `model_state_dict` holds
the single-block bridge as `bridge_module.*`. Its block is our `cross_attention` bridge part by part (norms before
attention and feed-forward, biases everywhere), so that translating is renaming and every bit survives both ways.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_bridge.durable_files import made_folder, write_bytes_durably
from vlm_bridge.errors import CheckpointError
from vlm_bridge.parsing import parse_json
from vlm_bridge.quantization import GROUP, from_int4, to_int4, to_int8

_ORIGINAL_PREFIX = "bridge_module."
_ORIGINAL_MODULES = {
    "vision_projection": "vision_projection",
    "attention_norm": "ln1",
    "feed_forward_norm": "ln2",
    "query": "cross_attention.w_q",
    "key": "cross_attention.w_k",
    "value": "cross_attention.w_v",
    "attention_output": "cross_attention.w_o",
    "feed_forward_in": "ffn.0",
    "feed_forward_out": "ffn.3",
}
ORIGINAL_NAMES = {
    f"bridge.{ours}.{kind}": f"{_ORIGINAL_PREFIX}{theirs}.{kind}"
    for ours, theirs in _ORIGINAL_MODULES.items()
    for kind in ("weight", "bias")
}
"""Our names of the cross-attention bridge's 18 tensors -> the original project's, in its order of parameters."""
_BRIDGE_LITE = f"{_ORIGINAL_PREFIX}bridge_blocks."

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
MAX_CONFIG_BYTES = 1_000_000
"""A recipe with the versions of what wrote it has about 4,000."""
_INT8_SCALE, _INT4_SCALE = "int8_scale_of.", "int4_scale_of."
"""Prefixes of the scales of a matrix that `quantized` stores in fewer bits."""


def is_original(content: Any) -> bool:
    """Whether an opened checkpoint is laid out as the original project's."""
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and any(
        str(name).startswith(_ORIGINAL_PREFIX) for name in state
    )


def from_original(state: Mapping[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """Rename the tensors of a `model_state_dict` to ours; no value changes.

    Raises:
        CheckpointError: tensors are missing or unknown, or it is the later Bridge-Lite.
    """
    if any(name.startswith(_BRIDGE_LITE) for name in state):
        raise CheckpointError(
            f"{where} holds Bridge-Lite, which the original project builds since its commit 2dd2199: its "
            "self-attention reads the caption tokens behind the one to be predicted, so what it learned in training is "
            "not there when captioning; train bridge.kind=cross_attention (config/training-default.yaml) instead"
        )
    if wrong := wrong_names(state, ORIGINAL_NAMES.values()):
        raise CheckpointError(
            f"{where} is not the original single-block bridge: {shortened(wrong)}"
        )
    return {ours: state[theirs] for ours, theirs in ORIGINAL_NAMES.items()}


def to_original(weights: Mapping[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """Rename our tensors to those of a `model_state_dict`; no value changes.

    Raises:
        CheckpointError: the original layout has no place for what was trained (another bridge, feature statistics).
    """
    if wrong := wrong_names(weights, ORIGINAL_NAMES):
        raise CheckpointError(
            f"{where} cannot be written in the original layout, which holds bridge.kind=cross_attention with "
            f"bridge.standardize_features=false: {shortened(wrong)}"
        )
    return {theirs: weights[ours] for ours, theirs in ORIGINAL_NAMES.items()}


def original_architecture(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Recipe keys that the shapes of a translated original checkpoint decide (the number of heads is not in them)."""
    text_dim = weights["bridge.vision_projection.weight"].shape[0]
    return {
        "bridge.kind": "cross_attention",
        "bridge.enter_at_layer": 0,
        "bridge.standardize_features": False,
        "bridge.feed_forward_multiplier": weights["bridge.feed_forward_in.weight"].shape[0]
        // text_dim,
    }


def original_sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Widths of the frozen parts that a translated original checkpoint was trained between."""
    text_dim, vision_dim = weights["bridge.vision_projection.weight"].shape
    return {"vision_encoder.embed_dim": vision_dim, "language_model.embed_dim": text_dim}


def wrong_names(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """What two sets of tensor names disagree in, a phrase each."""
    found, wanted = set(found), set(wanted)
    missing = [f"{name} is missing" for name in sorted(wanted - found)]
    return missing + [f"{name} is unknown" for name in sorted(found - wanted)]


def shortened(items: list[str], count: int = 3) -> str:
    """The first items on one line, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more


def quantized(matrices: Mapping[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Matrices in 8 or 4 bits, and their scales. `read_folder` makes float32 of them again.

    Rows that are no whole number of `GROUP` stay in 8 bits.
    """
    stored = {}
    for name, tensor in matrices.items():
        if bits == 4 and tensor.shape[-1] % GROUP == 0:
            stored[name], stored[_INT4_SCALE + name] = to_int4(tensor.detach())
        else:
            stored[name], stored[_INT8_SCALE + name] = to_int8(tensor.detach())
    return stored


def dequantized(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file, float32 for what `quantized` wrote. Raises ValueError where levels or scales are missing."""
    weights = {
        name: x for name, x in stored.items() if not name.startswith((_INT8_SCALE, _INT4_SCALE))
    }
    for prefix, dtype in ((_INT8_SCALE, torch.int8), (_INT4_SCALE, torch.uint8)):
        scales = {
            name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)
        }
        if unpaired := scales.keys() ^ {name for name, x in weights.items() if x.dtype is dtype}:
            raise ValueError(
                f"quantised weights and their scales do not go together: {shortened(sorted(unpaired))}"
            )
        for name, scale in scales.items():
            per_row = 1 if dtype is torch.int8 else weights[name].shape[-1] * 2 // GROUP
            if scale.shape != (
                *weights[name].shape[:-1],
                per_row,
            ):  # else one number could become gigabytes
                raise ValueError(f"the scales of {name} are of another shape")
            weights[name] = (
                weights[name] * scale if dtype is torch.int8 else from_int4(weights[name], scale)
            )
    return weights


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the weights last and whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    temporary, had_config = folder / f".{WEIGHTS_NAME}.tmp", (folder / CONFIG_NAME).exists()
    with made_folder(folder):
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
            write_bytes_durably(folder / CONFIG_NAME, text.encode())
            shutil.copymode(
                folder / CONFIG_NAME, temporary
            )  # safetensors lets nobody but the owner read it
            temporary.replace(folder / WEIGHTS_NAME)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                if not had_config:
                    (folder / CONFIG_NAME).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error  # safetensors' way of saying that the disk is full


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the configuration and weights that `write_folder` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        with (folder / CONFIG_NAME).open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError(f"{CONFIG_NAME} has more than {MAX_CONFIG_BYTES:,} bytes")
        config = parse_json(text)
        weights = dequantized(load_file(folder / WEIGHTS_NAME))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not whole: {error.filename or error} is missing"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged or is not an exported captioner: {error}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME} must hold an object")
    return config, weights
