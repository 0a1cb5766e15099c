"""Files of tensors: ``torch.save``'s without code, and Hugging Face folders, also in 8 and 4 bits.

The modules of this package hold the layouts of the two published systems.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vlm_bridge.data_pipeline.features import to_int8
from vlm_bridge.errors import CheckpointError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import parse_json

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
MAX_CONFIG_BYTES = 1_000_000  # a recipe has about 4,000
MAX_PICKLE_BYTES = 4_000_000  # a training state of 1,000 tensors has about 300,000
MAX_VALUES = 300_000  # a training state has about 5 a tensor, and 2,000 beside
MAX_DEPTH = 50
GROUP = 64  # numbers of a row that share a scale in 4 bits
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (str, int, float, bytes, type(None), torch.dtype, torch.device, argparse.Namespace)


class DamagedCheckpointError(CheckpointError):
    """A file that cannot be used at all."""


# Files of torch.save


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by ``torch.save`` of a dict, or leave it as it was. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(dict(content), file))
    except (OSError, RuntimeError) as error:  # torch turns some errors of a file into RuntimeError
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {reason} (free some space or change the folder)"
        ) from error


def read_file(path: Path) -> Any:
    """Read a file of ``torch.save`` on the CPU without running code.

    Raises:
        DamagedCheckpointError: it is damaged, or holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path.stat().st_size)
        # pvt-blip's own code saves its command line, a Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_content(content, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(
            f"{path} is not a vlm-bridge checkpoint, or holds code; it was not loaded"
        ) from error
    except Exception as error:  # damaged bytes raise almost any exception in the readers
        problem = shorten(str(error), 200) or type(error).__name__
        raise DamagedCheckpointError(
            f"{path} is damaged or is not a checkpoint: {problem}"
        ) from error
    return content


def _check_archive(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Compare checksums, which torch does not, and refuse parts larger than the file."""
    parts = archive.infolist()
    pickle_bytes = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if sum(part.file_size for part in parts) > file_bytes or pickle_bytes > MAX_PICKLE_BYTES:
        raise ValueError("its parts are too large")
    # torch skips what is marked as a folder.
    if any(part.external_attr & 0x10 for part in parts) or archive.testzip() is not None:
        raise ValueError("its checksums are wrong")


def check_content(content: Any, file_bytes: int) -> None:
    """Refuse content that needs more memory or time than its file is large. Raises ValueError.

    A pickle without code can name a billion values by aliases of aliases, or make gigabytes of
    one number by a stride of 0.
    """
    waiting, num_values, tensor_bytes = [(content, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        num_values += 1
        if depth > MAX_DEPTH or num_values + len(waiting) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_DEPTH} levels or {MAX_VALUES:,} values")
        if isinstance(value, Mapping):
            waiting += [(child, depth + 1) for pair in value.items() for child in pair]
        elif isinstance(value, list | tuple):
            waiting += [(child, depth + 1) for child in value]
        elif isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError("it holds a tensor that is not dense and on the CPU")
            tensor_bytes += value.nbytes  # tied weights are stored once and named several times
            stored = value.untyped_storage().nbytes()
            if not value.nbytes <= stored <= file_bytes or tensor_bytes > 4 * file_bytes:
                shape = list(value.shape)
                raise ValueError(f"it holds a tensor {shape} that is larger than what is stored")
        elif not isinstance(value, _PLAIN):
            raise ValueError(f"it holds a {type(value).__name__}")


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are no finite floating-point numbers. Raises ValueError."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"its weight {name} is of type {tensor.dtype}, not a floating one")
        if not tensor.float().isfinite().all():
            raise ValueError(f"its weight {name} is not finite")


# Hugging Face folders


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``. Raises OSError."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, text.encode())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read configuration and weights of `write_folder`. Raises CheckpointError."""
    try:
        if (folder / CONFIG_NAME).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{CONFIG_NAME} has more than {MAX_CONFIG_BYTES:,} bytes")
        config = parse_json((folder / CONFIG_NAME).read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_NAME} must hold an object")
        return config, dequantized(load_file(folder / WEIGHTS_NAME))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged or is not an exported captioner: {error}"
        ) from error


# Numbers in 8 and 4 bits


def to_int4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each `GROUP` of a row to 16 levels, as llama.cpp's Q4_0: the largest is level -8.

    Values are [..., D] and finite, D a multiple of `GROUP`.

    Returns:
        Two levels a byte [..., D / 2] in uint8, and signed scales [..., D / `GROUP`] in bfloat16.
    """
    groups = values.float().unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).bfloat16()
    levels = (groups / scales.float()).nan_to_num().round().clamp(-8, 7)
    nibbles = (levels + 8).to(torch.uint8).flatten(-2)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales.squeeze(-1)


def from_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return values [..., D] of `to_int4`. Raises RuntimeError if shapes do not agree."""
    levels = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float() - 8
    return (levels.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


_UNPACK = {"int8_scale_of.": torch.mul, "int4_scale_of.": from_int4}


def quantized(matrices: Mapping[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Return matrices in 8 or 4 bits with their scales; `read_folder` makes float32 of them.

    Rows that are no whole number of `GROUP` stay in 8 bits.
    """
    stored = {}
    for name, tensor in matrices.items():
        if bits == 4 and tensor.shape[-1] % GROUP == 0:
            stored[name], stored[f"int4_scale_of.{name}"] = to_int4(tensor.detach())
        else:
            stored[name], stored[f"int8_scale_of.{name}"] = to_int8(tensor.detach())
    return stored


def dequantized(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a file, in float32 where `quantized` wrote them. Raises ValueError."""
    weights = dict(stored)
    for prefix, unpack in _UNPACK.items():
        for scale_name in [name for name in stored if name.startswith(prefix)]:
            name, scale = scale_name.removeprefix(prefix), weights.pop(scale_name)
            # Broadcasting a row and a column could make gigabytes.
            if name not in stored or stored[name].shape[:-1] != scale.shape[:-1]:
                raise ValueError(f"the scales {scale_name} do not fit their levels")
            weights[name] = unpack(stored[name], scale)
    return weights


# Differences of state dicts


def misfits(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    same: Callable[[torch.Size, torch.Size], bool] = torch.Size.__eq__,
) -> list[str]:
    """Return the differences in names and shapes, a phrase each."""
    shared = sorted(found.keys() & wanted.keys())
    shapes = [(name, found[name].shape, wanted[name].shape) for name in shared]
    wrong = [f"{name} is {tuple(a)}, not {tuple(b)}" for name, a, b in shapes if not same(a, b)]
    return wrong + wrong_names(found, wanted)


def wrong_names(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the missing and the unknown names, a phrase each."""
    found, wanted = set(found), set(wanted)
    missing = [f"{name} is missing" for name in sorted(wanted - found)]
    return missing + [f"{name} is unknown" for name in sorted(found - wanted)]


def shortened(items: list[str], count: int = 3) -> str:
    """Join the first items in one line, with the number of the others."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more
