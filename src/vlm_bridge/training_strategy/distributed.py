"""Several processes, on one machine or more: who there is, and the few things that they tell each other.

`torchrun` and `accelerate launch` start the processes and say in the environment who is who. Every process holds all
of the model and computes its share of the rows of every batch. The gradients of what is trained, a few percent of the
parameters, are added up once per optimiser step. DistributedDataParallel would compute the same; its hooks would have
to be told of accumulation and of processes whose share is empty.

Whatever is asked of a `World` changes nothing where there is one process. Numbers and objects travel between the hosts
(gloo), only tensors between devices (NCCL for CUDA): to agree on a step, no host waits for its device.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from vlm_bridge import runtime
from vlm_bridge.errors import ConfigurationError, VLMBridgeError

TIMEOUT = timedelta(minutes=30)
"""After which a process that is alive but silent in the middle of a step is given up. A dead one is noticed at once."""
PREPARATION_TIMEOUT = timedelta(days=2)
"""The same for caches, which a machine may be done with long before another."""
BUCKET_BYTES = 32 * 2**20
"""Gradients that are sent together, about as DistributedDataParallel's 25 MiB."""
LAST_WORDS_TIMEOUT = 10.0
"""Seconds that the first process, whose memory may hold the message of a failure, waits for the others to read it."""
_FAILURE = "vlm_bridge/failure"
_ENDED = "vlm_bridge/ended"

Item = TypeVar("Item")
Result = TypeVar("Result")


class PeerFailed(VLMBridgeError):
    """Another process of the run failed; the message is its."""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them; by default it is alone.

    Attributes:
        device: of this process; each process of a machine has a GPU of its own.
        rank: of this process among all; the first, 0, is the one that writes and speaks.
        local_rank: among those of its machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: Any = None
    """The group in which numbers and objects travel; None where there is one process."""
    store: Any = None
    """Where the first process to fail leaves its message."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of some items. All parts together have every item once; some may be empty."""
        return items[self.rank :: self.size]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes, number by number, in float64: exact for counts."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        with self._together():
            distributed.all_reduce(sums, group=self.hosts)
        return sums.tolist()

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(int(number))
        with self._together():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.hosts)
        return int(largest)

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with self._together():
            distributed.all_gather_object(items, item, group=self.hosts)
        return items

    def interleave(self, items: Sequence[Item]) -> list[Item]:
        """What the processes made of their `share` of something, in the order of the whole."""
        shares = self.gather(list(items))
        longest = max(map(len, shares))
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What the first process makes: the others need not have the files that it reads."""
        made = [make() if self.is_first else None]
        if self.size > 1:
            with self._together():
                distributed.broadcast_object_list(
                    made, src=0, group=self.hosts, device=torch.device("cpu")
                )
        return made[0]  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors on the device by their sums over all processes, the same to the bit in each."""
        if self.size > 1:
            _in_buckets(tensors, self._all_reduce)

    def copy_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors on the device by those of the first process."""
        if self.size > 1:
            _in_buckets(tensors, self._broadcast)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ConfigurationError where a process has other facts than the first: it would go another way."""
        first = self.from_first(lambda: facts)
        if others := [
            f"{name}={fact}, not {first[name]}"
            for name, fact in facts.items()
            if fact != first[name]
        ]:
            raise ConfigurationError(
                f"process {self.rank} of {self.size} has {'; '.join(others)} as the first one: start all of them with "
                "the same recipe, on the same data"
            )

    @contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """The first process of a machine does alone what the others then find done."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here; for as long as preparations may take."""
        if self.size > 1:
            with self._together():
                distributed.monitored_barrier(self.hosts, timeout=PREPARATION_TIMEOUT)

    def _all_reduce(self, flat: torch.Tensor) -> None:
        with self._together():
            distributed.all_reduce(flat)

    def _broadcast(self, flat: torch.Tensor) -> None:
        with self._together():
            distributed.broadcast(flat, src=0)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Communicate. It fails where another process is gone, and then says what that one said."""
        try:
            yield
        except RuntimeError as error:
            raise PeerFailed(self._last_words()) from error

    def _last_words(self) -> str:
        with suppress(RuntimeError):  # the store was the failed process's
            if self.store.check([_FAILURE]):
                return self.store.get(_FAILURE).decode()
        return (
            "another process of this training is gone and left no message: it was killed, ran out of memory, or its "
            "machine cannot be reached (what it printed last may say more)"
        )

    def _leave_message(self, error: BaseException) -> None:
        if self.size > 1:
            known = hasattr(error, "exit_code")  # our errors, and interruptions
            reason = str(error) if known else f"unexpected {type(error).__name__}: {error}"
            with suppress(RuntimeError):  # nobody is left to be told
                self.store.compare_set(
                    _FAILURE, "", f"process {self.rank} of {self.size} failed: {reason}"
                )

    def _end_after_the_others(self) -> None:
        """The store ends with the first process where no launcher holds it; those still asking would get no answer."""
        if self.size == 1:
            return
        with suppress(RuntimeError):
            ended = self.store.add(_ENDED, 1)
            give_up = time.monotonic() + LAST_WORDS_TIMEOUT
            while self.is_first and ended < self.size and time.monotonic() < give_up:
                time.sleep(0.05)
                ended = self.store.add(_ENDED, 0)


class GradientSum:
    """Adds up the gradients of all processes, once per optimiser step.

    Which parameters take part is the same in every step and is agreed on in the first: a process whose share of a step
    is empty has no gradients, and a parameter that no loss depends on has none anywhere.
    """

    def __init__(self, world: World, parameters: Sequence[torch.nn.Parameter]):
        self.world = world
        self.parameters = parameters
        self._taking_part: list[torch.nn.Parameter] | None = None

    def __call__(self, *others: torch.Tensor) -> None:
        """Replace the gradients, and other tensors beside them, by their sums over all processes."""
        if self.world.size == 1:
            return
        if self._taking_part is None:
            having = self.world.sum([parameter.grad is not None for parameter in self.parameters])
            self._taking_part = [
                p for p, count in zip(self.parameters, having, strict=True) if count
            ]
        for parameter in self._taking_part:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.world.add_up([*others, *(p.grad for p in self._taking_part if p.grad is not None)])


_joined: World | None = None
"""The world that this process has joined; it stays for as long as the process lives."""


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that a launcher started together, and their end together: what fails in one, fails in all.

    Args:
        device: a recipe's; `auto` and `cuda` give each process of a machine its own GPU.

    Raises:
        ConfigurationError: there are fewer GPUs than processes, or the device cannot be shared.
        PeerFailed: another process failed.
    """
    world = _join(device)
    try:
        yield world
        world.wait()  # or a process that has nothing to write would end before the one that has
    except BaseException as error:
        if not isinstance(error, PeerFailed):
            world._leave_message(error)
        world._end_after_the_others()
        atexit.unregister(
            distributed.destroy_process_group
        )  # it would wait for those that are gone
        raise


def _join(device_name: str) -> World:
    global _joined
    size = int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= runtime.LAUNCHED else 1
    if size == 1:
        return World(runtime.resolve_device(device_name))
    if _joined is None:
        _joined = _join_launched(device_name, runtime.process_rank(), size)
    return _joined


def _join_launched(device_name: str, rank: int, size: int) -> World:
    from accelerate import PartialState

    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = _own_device(device_name, local_rank, local_size)
    store, *_ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    PartialState(cpu=device.type == "cpu", timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    atexit.register(distributed.destroy_process_group)
    hosts = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return World(device, rank, size, local_rank, local_size, hosts, store)


def _own_device(name: str, local_rank: int, local_size: int) -> torch.device:
    device = runtime.resolve_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ConfigurationError(
            f"device={name!r} cannot be shared by several processes: use device=cuda (a GPU each) or device=cpu"
        )
    if (count := torch.cuda.device_count()) < local_size:
        raise ConfigurationError(
            f"{local_size} processes were started on this machine, which has {count} GPUs: start one for each "
            f"(--nproc-per-node {count}), or use device=cpu"
        )
    return torch.device("cuda", local_rank)


def _in_buckets(
    tensors: Sequence[torch.Tensor], communicate: Callable[[torch.Tensor], None]
) -> None:
    """Communicate tensors laid one behind the other: for many small ones the way there and back is what costs."""
    bucket: list[torch.Tensor] = []
    num_bytes = 0
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        num_bytes += tensor.nbytes
        is_last = number + 1 == len(tensors)
        if is_last or num_bytes >= BUCKET_BYTES or tensors[number + 1].dtype != tensor.dtype:
            flat = torch.cat([member.detach().flatten() for member in bucket])
            communicate(flat)
            parts = flat.split([member.numel() for member in bucket])
            with torch.no_grad():
                for member, part in zip(bucket, parts, strict=True):
                    member.copy_(part.view_as(member))
            bucket, num_bytes = [], 0
