"""Several processes, on one machine or more, that `torchrun` or `accelerate launch` started.

Every process computes its share of the rows of every batch; gradients are summed once a step.
DistributedDataParallel has no place for global token counts and empty shares.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from vlm_bridge import device as devices
from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import ConfigurationError, TrainingError, VLMBridgeError

# One machine may prepare its caches long before another; a dead process is noticed at once.
TIMEOUT = timedelta(days=2)

Item = TypeVar("Item")
Result = TypeVar("Result")


class PeerFailed(VLMBridgeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them; rank 0 is the one that writes and logs."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: Any = None  # process group for numbers and objects

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of some items, which may be empty."""
        return items[self.rank :: self.size]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum over all processes in float64, exact for counts."""
        sums = torch.tensor(list(numbers), dtype=torch.float64)
        if self.size > 1:
            with _together():
                distributed.all_reduce(sums, group=self.hosts)
        return sums.tolist()

    def gather(self, item: Item) -> list[Item]:
        """Return every process's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _together():
            distributed.all_gather_object(items, item, group=self.hosts)
        return items

    def interleave(self, items: Sequence[Item]) -> list[Item]:
        """Return results for the `share` of every process, in the order of the whole."""
        shares = self.gather(list(items))
        longest = max(map(len, shares))
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def from_first(self, make: Callable[[], Result]) -> Result:
        """Return what the first process makes; the others need not have its files."""
        made = [make() if self.is_first else None]
        if self.size > 1:
            with _together():
                cpu = torch.device("cpu")
                distributed.broadcast_object_list(made, src=0, group=self.hosts, device=cpu)
        return made[0]  # type: ignore[return-value]

    def copy_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors on the device by those of the first process."""
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    distributed.broadcast(tensor, src=0)

    @contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """Let the first process of a machine prepare files for the others."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(0)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerFailed(
            "another process of this run is gone: see its own message, or it was killed or its "
            "machine cannot be reached"
        ) from error


@torch.no_grad()
def sum_gradients(
    world: World, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor
) -> None:
    """Replace the gradients and a step's loss by their sums over all processes.

    A parameter that has no gradient in any process keeps none.
    """
    if world.size == 1:
        return
    counts = world.sum([float(parameter.grad is not None) for parameter in parameters])
    tensors = [loss]
    for parameter, count in zip(parameters, counts, strict=True):
        if parameter.grad is None and count:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    # One message for all: many small ones would wait for each other.
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    with _together():
        distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that a launcher started, each with a GPU of its own or on the CPU."""
    if not os.environ.keys() >= devices.LAUNCHED or os.environ["WORLD_SIZE"] == "1":
        yield World(devices.resolve_device(device))
        return
    world = _join(device)
    try:
        yield world
        world.wait()  # for the one that still writes
    except BaseException:
        atexit.unregister(distributed.destroy_process_group)  # it would wait for the others
        raise


@functools.cache
def _join(device: str) -> World:
    from accelerate import PartialState

    is_cpu = devices.resolve_device(device).type == "cpu"
    size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if not is_cpu and (count := torch.cuda.device_count()) < size:
        raise ConfigurationError(
            f"{size} processes share {count} CUDA GPUs: start one for each (--nproc-per-node "
            f"{count}), or use device=cpu"
        )
    state = PartialState(cpu=is_cpu, timeout=TIMEOUT)
    atexit.register(distributed.destroy_process_group)
    hosts = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    ranks = state.process_index, state.num_processes, state.local_process_index
    return World(torch.device(str(state.device)), *ranks, hosts)


def check_machine(recipe: Recipe, world: World) -> None:
    """Set threads, and refuse a precision that this machine does not have."""
    if recipe.autocast_dtype == "float16" and world.device.type != "cuda":
        raise ConfigurationError(
            "amp_dtype=float16 needs a CUDA GPU; use amp_dtype=bfloat16 or float32"
        )
    if world.device.type == "cpu":
        devices.set_threads()
        devices.keep_freed_memory()


def check_folders(**folders: str) -> None:
    """Raise ConfigurationError if a recipe's folder cannot be written; leave nothing behind."""
    for key, folder in folders.items():
        try:
            place = next(p for p in (Path(folder), *Path(folder).parents) if p.exists())
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(bytes(1 << 20))  # on a full disk, making an empty file succeeds
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {key}={folder}: {error.strerror or error} (free some space, "
                f"or choose another folder with {key}=...)"
            ) from error


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Raise TrainingError where memory runs out, with settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # The CPU and Apple's GPUs raise a plain RuntimeError.
        if not ran_out and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        raise TrainingError(
            f"out of memory on {device}: try a smaller batch_size with more "
            "gradient_accumulation_steps, gradient_checkpointing=true, amp_dtype=bfloat16 or "
            "language_model.dtype=bfloat16"
        ) from error
