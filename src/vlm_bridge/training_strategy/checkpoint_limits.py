"""Limits on what a checkpoint may hold, checked before any of it is hashed, copied or built.

A pickle without code can still be hostile: aliases of aliases that name a billion values in a few bytes, one number
that a stride of 0 makes a tensor of gigabytes, tensors without storage. Nothing here recurses.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

MAX_PICKLE_BYTES = 4_000_000
"""Of the part that names tensors and holds all else; a training state of 1,000 tensors has about 0.3 MB."""
MAX_VALUES = 300_000
"""With aliases written out. A training state has about 5 a tensor, and 2,000 beside."""
MAX_DEPTH = 50
MAX_TIMES_REFERRED = 4
"""Tied weights stand in a file once and are named several times."""
WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_DTYPES = WEIGHT_DTYPES | {
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
_PLAIN = (str, int, float, bytes, type(None))
_DESCRIPTIVE = (torch.dtype, torch.device, argparse.Namespace)
"""Nothing looks into the last, which the original pvt-blip project keeps beside its weights."""


def check_content(content: Any, file_bytes: int) -> None:
    """Refuse content that costs more than its file is large.

    Args:
        content: what a file of ``file_bytes`` bytes was read as.

    Raises:
        ValueError: too many values or levels, an object of another kind, a number beyond 64 bits, or a tensor that
            is not strided, not on the CPU, of an unusual dtype, or larger than its storage or its file.
    """
    tensor_bytes = 0
    for value in _values(content, MAX_VALUES, MAX_DEPTH):
        if isinstance(value, torch.Tensor):
            _check_tensor(value, file_bytes)
            tensor_bytes += value.numel() * value.element_size()
            if tensor_bytes > MAX_TIMES_REFERRED * file_bytes:
                raise ValueError(
                    f"its tensors are more than {MAX_TIMES_REFERRED} times as large as the file"
                )
        elif not isinstance(value, _DESCRIPTIVE):
            _check_plain(value)


def check_plain(content: Any, max_values: int, max_depth: int) -> None:
    """Refuse anything but containers of text and numbers. Raises ValueError."""
    for value in _values(content, max_values, max_depth):
        _check_plain(value)


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are no finite numbers in float32. Raises ValueError, which names the first."""
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"its weight {name} is of type {_name(tensor.dtype)}, not a floating-point one"
            )
        if not tensor.float().isfinite().all():
            raise ValueError(f"its weight {name} is not finite")


def _values(content: Any, max_values: int, max_depth: int) -> Any:
    """Yield every value in nested containers, and every key; aliases as often as they are named."""
    waiting, num_seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        num_seen += 1
        if isinstance(value, Mapping):
            children = chain(value.keys(), value.values())
            num_children = 2 * len(value)
        elif isinstance(value, list | tuple):
            children, num_children = iter(value), len(value)
        else:
            yield value
            continue
        if depth >= max_depth:
            raise ValueError(f"it has more than {max_depth} levels")
        if num_seen + len(waiting) + num_children > max_values:
            raise ValueError(f"it has more than {max_values:,} values, aliases written out")
        waiting += [(child, depth + 1) for child in children]


def _check_plain(value: Any) -> None:
    if not isinstance(value, _PLAIN):
        raise ValueError(f"it holds a {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("it holds an integer of more than 64 bits")


def _check_tensor(tensor: torch.Tensor, file_bytes: int) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(f"it holds a tensor of layout {_name(tensor.layout)}")
    if tensor.device.type != "cpu":
        raise ValueError(
            f"it holds a tensor without content (on the device {tensor.device.type!r})"
        )
    if tensor.dtype not in _DTYPES or tensor.is_neg():
        raise ValueError(f"it holds a tensor of type {_name(tensor.dtype)}")
    storage = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > storage or storage > file_bytes:
        raise ValueError(
            f"it holds a tensor of shape {list(tensor.shape)} that is larger than what is stored"
        )


def _name(kind: object) -> str:
    return str(kind).removeprefix("torch.")
