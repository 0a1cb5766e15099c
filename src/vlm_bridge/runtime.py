"""Facts about the machine a command runs on: device, precision, memory."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from vlm_bridge.errors import ConfigurationError


def resolve_device(name: str) -> Any:
    """``auto`` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ConfigurationError: an unknown device, or one that this machine does not have.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"device={name!r} is unknown (auto, cpu, cuda, cuda:1, mps)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={name!r}, but torch sees no CUDA GPU here (vlm-bridge doctor says more)"
        )
    return device


def autocast(device: Any, dtype_name: str | None) -> Any:
    """Mixed precision on a device, or nothing when ``dtype_name`` is None. Use a new one for every block."""
    import torch

    if dtype_name is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype_name))


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
