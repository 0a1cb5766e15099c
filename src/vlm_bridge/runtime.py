"""Facts about the machine a command runs on: device, precision, memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
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
        raise ConfigurationError(
            f"device={name!r} is unknown (auto, cpu, cuda, cuda:1, mps)"
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigurationError(f"device={name!r} is unknown (auto, cpu, cuda, cuda:1, mps)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(f"device={name!r}, but torch sees no Apple GPU here")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={name!r}, but torch sees no CUDA GPU here (vlm-bridge doctor says more)"
        )
    return device


LAUNCHED = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"})
"""What torchrun and accelerate launch put into the environment of the processes that they start."""


def process_rank() -> int:
    """The rank of this process among those that a launcher started together; 0 without a launcher."""
    return int(os.environ["RANK"]) if os.environ.keys() >= LAUNCHED else 0


def autocast(device: Any, dtype_name: str | None) -> Any:
    """Mixed precision on a device, or nothing when ``dtype_name`` is None. Use a new one for every block."""
    import torch

    if dtype_name is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype_name))


def usable_cores() -> int:
    """Physical cores that this process may compute on: in its affinity, and no more than its container is given.

    Hyper-threads of a core share the units that matrix products keep busy.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        import psutil

        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no limit reads "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def _siblings(cpu: int) -> str:
    """The hyper-threads of a logical processor's core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(
            "ascii"
        )
    except OSError:
        return str(cpu)


def set_threads() -> int:
    """Give torch a thread for every one of `usable_cores`, unless OMP_NUM_THREADS says how many; and say how many.

    Those are the threads within an operator. Operators run one after the other here: the pool between them is idle.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


def cpu_has_bfloat16() -> bool | None:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX, Arm); None where nobody says."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def missing_compiler(device: Any) -> str | None:
    """What `torch.compile` lacks for a device, or None. It writes C++ for CPUs and Triton for GPUs."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C++ compiler (g++, clang++)"
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    return None


class DeviceCopy:
    """Tensors copied to a device beside its work: begun where they are loaded, waited for where they are read.

    For CUDA they go through pinned memory on a stream of their own, and it is the device that waits, never the
    program. Elsewhere a copy is begun and done at once; on the CPU there is none.
    """

    def __init__(self, tensors: Sequence[Any], device: Any):
        import torch

        self.done = None
        if device.type != "cuda":
            self.tensors = [tensor.to(device) for tensor in tensors]
            return
        stream = _copy_stream(device)
        with torch.cuda.stream(stream):
            self.tensors = [
                tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
                for tensor in tensors
            ]
            self.done = stream.record_event()

    def wait(self) -> list[Any]:
        """The tensors, for work that is queued from now on."""
        import torch

        if self.done is not None:
            current = torch.cuda.current_stream(self.tensors[0].device)
            current.wait_event(self.done)
            for (
                tensor
            ) in self.tensors:  # or their memory could be given to the next copy while it is read
                tensor.record_stream(current)
        return self.tensors


@functools.cache
def _copy_stream(device: Any) -> Any:
    import torch

    return torch.cuda.Stream(device)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc).

    Tensors of ever other sizes leave holes between them that only a smaller one fits into: a process that trains on
    batches of all lengths holds a gigabyte of them after an hour.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
