"""Several processes that train together, as a launcher would start them.

They are forked from a server that has imported everything once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe

SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """A process's answer, or the error that it ended with, as `Kind: message`."""

    returned: Any = None
    error: str | None = None


def run_world(size: int, work: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """Run a function of this module in ``size`` processes of one world; return outcomes by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_bridge.training_strategy.trainer", "accelerate"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def _outcome(pipe: Any) -> Outcome:
    assert pipe.poll(SECONDS), "the processes wait for each other"
    try:
        return pipe.recv()
    except EOFError:
        return Outcome(error="it ended without a word")


def _member(
    pipe: Any, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({**where, **{name: str(number) for name, number in ranks.items()}})
    try:
        outcome = Outcome(work(*arguments))
    except Exception as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    pipe.send(outcome)


# What the processes do.


def trained_weights(recipe: Recipe, resume: Path | None = None) -> dict[str, Any]:
    """Train; return this process's weights as arrays, the seeds of its dropout and its log."""
    import torch

    from logs import log_lines
    from vlm_bridge.training_strategy import objectives, trainer

    seeds, models, lines = [], [], log_lines()
    batch_loss, prepare_model = objectives.batch_loss, trainer.prepare_model

    def watched(*arguments: Any) -> Any:
        seeds.append(torch.initial_seed())
        return batch_loss(*arguments)

    def kept(*arguments: Any) -> Any:
        models.append(prepare_model(*arguments))
        return models[-1]

    objectives.batch_loss, trainer.prepare_model = watched, kept
    trainer.train(recipe, resume=resume)
    weights = {name: tensor.numpy() for name, tensor in models[0].trained_state_dict().items()}
    return {"weights": weights, "seeds": seeds, "lines": lines}


def train_until(recipe: Recipe, rank: int, step: int, then: str) -> None:
    """Train, until an `error`, a `kill` or a `signal` (SIGTERM) in a step of one process."""
    from vlm_bridge.errors import DataError
    from vlm_bridge.training_strategy.step import TrainStep
    from vlm_bridge.training_strategy.trainer import train

    take_step = TrainStep.__call__

    def step_or_trouble(self: TrainStep, *arguments: Any) -> Any:
        if self.world.rank == rank and self.state.step == step:
            if then == "error":
                raise DataError("image 7 is a fake")
            os.kill(os.getpid(), signal.SIGKILL if then == "kill" else signal.SIGTERM)
        return take_step(self, *arguments)

    TrainStep.__call__ = step_or_trouble  # type: ignore[method-assign]
    train(recipe)


def judgement_of(recipe: Recipe, checkpoint: Path) -> list[Any]:
    """Evaluate a checkpoint on the images of validation, in batches of three."""
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder
    from vlm_bridge.evaluation.run import evaluate_captioner
    from vlm_bridge.training_strategy.distributed import joined

    os.environ["PATH"] = ""  # no Java: one process scores for all
    with joined(recipe.device) as world:
        captioner = Captioner.from_pretrained(checkpoint, "cpu")
        images = open_data_folder(recipe.data_dir).split("val")
        evaluation = evaluate_captioner(
            captioner, images, decode=recipe.decode, batch_size=3,
            world=world,
        )  # fmt: skip
    return [evaluation.predictions, evaluation.metrics]


def ask_world() -> dict[str, Any]:
    """What a `World` of processes answers."""
    import torch

    from vlm_bridge.training_strategy.distributed import joined, sum_gradients

    with joined("cpu") as world:
        used, unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        if world.rank == 1:  # the others have an empty share
            used.grad = torch.ones(3)
        loss = torch.tensor(float(world.rank))
        sum_gradients(world, [used, unused], loss)
        copied = torch.full((2, 2), float(world.rank))
        world.copy_from_first([copied])
        assert used.grad is not None
        return {
            "share": world.share(range(5)),
            "interleaved": world.interleave(world.share("abcde")),
            "sum": world.sum([1, world.rank]),
            "gathered": world.gather(str(world.rank)),
            "from_first": world.from_first(lambda: {"made by": world.rank}),
            "gradient": used.grad.tolist(),
            "unused": unused.grad,
            "loss": loss.item(),
            "copied": copied.tolist(),
        }
