"""Several processes that train together, as a launcher would start them, without its seconds of imports.

They are forked from a server that has imported everything once, and find each other by the environment, as ever.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What a process returned, or the error that it ended with."""

    returned: Any = None
    error: BaseException | None = None


def run_world(size: int, work: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """Run ``work(*arguments)`` in ``size`` processes of one world; by rank what became of each.

    ``work`` belongs to a module that the processes can import (this one, or a test's).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_bridge.training_strategy.trainer", "accelerate"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(sender, rank, size, port, work, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return [_outcome(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _outcome(pipe: Any) -> Outcome:
    assert pipe.poll(SECONDS), "the processes wait for each other"
    try:
        return pipe.recv()
    except EOFError:
        return Outcome(error=RuntimeError("the process ended without a word"))


def _member(
    pipe: Any, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        outcome = Outcome(work(*arguments))
    except BaseException as error:
        traceback.print_exc()
        outcome = Outcome(error=error)
    pipe.send(outcome)


def train_lines(recipe: Any, resume: Any = None) -> list[str]:
    """Train, and say what was said."""
    from vlm_bridge.training_strategy.trainer import train

    lines: list[str] = []
    train(recipe, resume=resume, say=lines.append)
    return lines
