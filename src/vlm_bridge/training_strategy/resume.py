"""Save a training, stop it on a signal, and continue it from a checkpoint."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vlm_bridge.configuration import Recipe, parse_interval, published_recipe
from vlm_bridge.errors import CheckpointError, TrainingError
from vlm_bridge.formats.dinov2_gemma import ORIGINAL_NAMES
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState

logger = logging.getLogger(__name__)

AUTO = "auto"  # the newest sound checkpoint in the recipe's checkpoint_dir, if there is one
KEPT_STEP_CHECKPOINTS = 3
ECHO_SECONDS = 1.0  # within which torchrun repeats a Ctrl-C to processes that have had it


Found = tuple[Path, dict[str, Any]]  # a checkpoint and its content


class Interrupted(Exception):
    """Training stopped on a signal after saving; ``exit_code`` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, signal_number: int, saved_to: Path):
        self.exit_code = 128 + signal_number
        self.saved_to = saved_to
        super().__init__(f"interrupted; saved {saved_to}")


def find_run(path: str | Path) -> Found:
    """Return a checkpoint and its content; of a folder, the newest sound one."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if found := checkpoints.newest_sound(folder):
            return found
    path = checkpoints.checkpoint_path(path)
    return path, checkpoints.load_checkpoint(path)


def resumed_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a run; dinov2-gemma's own settings go over training-default."""
    _, content = find_run(path)
    if "recipe" in content:
        recipe = checkpoints.recipe_of(content, path)
        checkpoints.check_sizes(content, recipe, path)
    else:
        settings = content[checkpoints.ORIGINAL_TRAINING].get("config") or {}
        recipe = published_recipe(settings, str(path))
        checkpoints.refuse_own_code(recipe, path)
    return recipe.replace(resume_from_checkpoint=str(path))


def find_checkpoint(
    resume: str | Path | None, recipe: Recipe, fingerprint: str, world: World, *, force: bool
) -> Found | None:
    """Return the checkpoint that a training continues; None for a new run.

    Args:
        fingerprint: of the data.
        force: log changes of recipe and data, which otherwise raise CheckpointError.

    Raises:
        CheckpointError: the checkpoint cannot be continued.
    """
    folder = Path(recipe.checkpoint_dir)
    if resume is None:
        if (folder / checkpoints.LATEST).is_file():
            logger.info(f"replacing the earlier run in {folder} (--resume continues it)")
        if (start := recipe.start_from) is not None:
            content = world.from_first(lambda: checkpoints.load_checkpoint(start))
            checkpoints.check_architecture(content, recipe, start, is_start=True)
        return None
    is_auto = str(resume) == AUTO
    find = (lambda: checkpoints.newest_sound(folder)) if is_auto else (lambda: find_run(resume))
    if (found := world.from_first(find)) is None:
        logger.info(f"no checkpoint to resume from in {folder}: training starts anew")
        return None
    path, content = found
    checkpoints.check_architecture(content, recipe, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        return found
    if "training" not in content:
        raise CheckpointError(
            f"{path} holds weights only; resume from {checkpoints.LATEST} or {checkpoints.BEST}, "
            f"or train on from these weights with start_from={path}"
        )
    changes = recipe.changes_since(checkpoints.recipe_of(content, path, is_built=False))
    if (before := content["training"]["dataset_fingerprint"]) != fingerprint:
        changes = [f"data fingerprint={fingerprint}, was {before}", *changes]
    if changes and not force:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(changes)} (go back to what "
            "it was, or continue all the same with --force)"
        )
    for change in changes:
        logger.info(f"changed by --force: {change}")
    return found


def continue_from(found: Found, state: TrainState, data: TrainingData) -> None:
    """Load a checkpoint into the state of a training. Raises CheckpointError."""
    path, content = found
    checkpoints.restore(state.model, content, path)
    state.average.restart()
    if checkpoints.ORIGINAL_TRAINING in content:
        _continue_original(path, content[checkpoints.ORIGINAL_TRAINING], state, data)
        return
    try:
        state.load_state_dict(content["training"], path)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} has a state that this training cannot continue ({type(error).__name__}: "
            f"{error}); train on from its weights with start_from={path}"
        ) from error
    if state.step_in_epoch and state.step_in_epoch >= data.steps_in_epoch(state.epoch):
        # Early versions counted an epoch after its validation.
        state.epoch, state.step_in_epoch, state.validated_step = state.epoch + 1, 0, 0
    logger.info(f"resumed {path} at step {state.step} of {data.total_steps}")


def _continue_original(
    path: Path, training: Mapping[str, Any], state: TrainState, data: TrainingData
) -> None:
    """Continue a run of dinov2-gemma's own code at its epoch; its best loss counts pads."""
    torch.manual_seed(data.recipe.seed)  # of dropout
    epochs = training.get("epoch")
    state.epoch = min(epochs if type(epochs) is int else 0, data.recipe.num_epochs)
    steps = sum(data.steps_in_epoch(epoch) for epoch in range(state.epoch))
    state.step = state.validated_step = min(steps, data.total_steps)
    optimizer = "its" if take_original_moments(state.optimizer, training) else "a new"
    logger.info(
        f"resumed {path} of the original project at epoch {state.epoch + 1}, step {state.step} of "
        f"{data.total_steps}, with {optimizer} optimizer"
    )


def take_original_moments(optimizer: torch.optim.Optimizer, training: Mapping[str, Any]) -> bool:
    """Load AdamW's moments of dinov2-gemma's own code, in ORIGINAL_NAMES' order, if they fit."""
    ours = optimizer.state_dict()
    names = [name for group in ours["param_groups"] for name in group["param_names"]]
    try:
        theirs = training["optimizer_state_dict"]["state"]
        by_name = {name: theirs[number] for number, name in enumerate(ORIGINAL_NAMES)}
        moments = {number: by_name[name] for number, name in enumerate(names)}
        optimizer.load_state_dict({"state": moments, "param_groups": ours["param_groups"]})
    except (KeyError, TypeError, AttributeError):
        return False
    return True


class Saver:
    """Save checkpoints of a state, with the fingerprint of its data."""

    def __init__(self, state: TrainState, recipe: Recipe, world: World, fingerprint: str):
        self.state, self.recipe, self.world = state, recipe, world
        self.fingerprint = fingerprint
        self.folder = Path(recipe.checkpoint_dir)
        self.every = parse_interval(recipe.save_every)
        self.saved_at = time.monotonic()
        self._latest_holds: tuple[int, int] | None = None
        if world.is_first:
            checkpoints.discard_unfinished(self.folder)

    def latest(self) -> Path:
        """Save the latest checkpoint, unless it holds this state already."""
        position = self.state.step, self.state.validated_step
        if self._latest_holds != position:
            self._save(checkpoints.LATEST)
            self._latest_holds = position
        return self.folder / checkpoints.LATEST

    def best(self) -> None:
        """Save the best checkpoint, and its weights alone in bfloat16; `latest` checked them."""
        if self.world.is_first:
            weights = checkpoints.stored_as(self.state.weights(), "bfloat16")
            checkpoints.save_checkpoint(
                self.folder / checkpoints.BEST_WEIGHTS, self.recipe, weights
            )
        self._save(checkpoints.BEST)  # last: a killed run continues from it

    def after_step(self) -> None:
        """Save where the recipe's ``save_every`` asks for it."""
        (count, unit), state = self.every, self.state
        if unit == "step" and state.step % count == 0:
            self.step()
        is_epoch = unit == "epoch" and state.step_in_epoch == 0 and state.epoch % count == 0
        if is_epoch or (unit == "minute" and time.monotonic() - self.saved_at >= 60 * count):
            self.latest()

    def step(self) -> Path:
        """Keep a checkpoint of this very step, and the newest few of its kind."""
        path = self._save(checkpoints.STEP.format(self.state.step))
        if self.world.is_first:
            steps = self.folder.glob(checkpoints.STEP_PATTERN)
            by_age = sorted(steps, key=lambda path: (path.stat().st_mtime_ns, path.name))
            for old in by_age[:-KEPT_STEP_CHECKPOINTS]:
                old.unlink(missing_ok=True)
        return path

    def _check_weights(self) -> None:
        """Raise TrainingError if an update overflowed; waits for the device."""
        weights = [*self.state.model.trained_state_dict().values(), *self.state.weights().values()]
        if not torch.stack([tensor.isfinite().all() for tensor in weights]).all():
            raise TrainingError(
                f"stopped at step {self.state.step}: the weights are not finite any more, and were "
                f"not saved: resume the last one in {self.folder}, or start again, with a "
                f"learning_rate below {self.recipe.learning_rate:g}"
            )

    def _save(self, name: str) -> Path:
        self._check_weights()
        path = self.folder / name
        if self.world.is_first:
            training = {**self.state.state_dict(), "dataset_fingerprint": self.fingerprint}
            checkpoints.save_checkpoint(path, self.recipe, self.state.weights(), training)
        self.saved_at = time.monotonic()
        return path


class Interruption:
    """Note SIGINT and SIGTERM; a second Ctrl-C ends the program without saving.

    Attributes:
        received: number of the first signal; 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Receive signals inside this block, in the main thread."""
        previous = {}
        with suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._receive)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > ECHO_SECONDS:
            raise KeyboardInterrupt
