"""Devices, precision, threads and memory of this machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_bridge.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

# Environment variables that torchrun and accelerate launch set.
LAUNCHED = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"})


def resolve_device(name: str) -> torch.device:
    """Return a torch device; `auto` is CUDA, else Apple's MPS, else the CPU.

    Raises ConfigurationError for an unknown device, or one that this machine does not have.
    """
    import torch

    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise ConfigurationError(f"device={name!r} is unknown (auto, cpu, cuda, cuda:1, mps)")
    device = torch.device(name)
    if not {"cpu": True, "cuda": has_cuda, "mps": has_mps}[device.type]:
        kind = "CUDA" if device.type == "cuda" else "Apple"
        raise ConfigurationError(f"device={name!r}, but torch sees no {kind} GPU here")
    return device


def process_rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if os.environ.keys() >= LAUNCHED else 0


def autocast(device: torch.device, dtype_name: str | None) -> AbstractContextManager[object]:
    """Return a new context of mixed precision; one without effect where `dtype_name` is None."""
    import torch

    if dtype_name is None:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype_name))


def usable_cores() -> int:
    """Return the physical cores that this process and its container may use."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # no limit reads "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def set_threads() -> None:
    """Let torch use OMP_NUM_THREADS, else one thread per usable core."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def cpu_emulates_bfloat16() -> bool:
    """Return whether Linux lists no bfloat16 instruction of the CPU (AVX-512, AMX, Arm)."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text("utf-8", errors="replace").split() if cpu.exists() else ["bf16"]
    return {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which `torch.compile` needs."""
    names = (os.environ.get("CXX", "c++"), "c++", "g++", "clang++", "cl")
    return any(map(shutil.which, names))


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return tensors on a device; copies to a GPU run in the background (pinned memory)."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    pinned = (tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors)
    return [tensor.to(device, non_blocking=True) for tensor in pinned]


def return_freed_memory() -> None:
    """Return freed memory to the system (glibc); batches of many lengths leave holes."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(keep: bool = True) -> None:
    """Reuse freed memory in the steps that follow (glibc), or return it at once as by default.

    Fresh pages of large tensors cost up to a fifth of a training step on a virtual machine.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in mallopt(3)
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 65536)
        libc.mallopt(trim_threshold, 2**31 - 1 if keep else 2**17)


def peak_rss_gib() -> float:
    """Return the peak resident memory of this process, in GiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
