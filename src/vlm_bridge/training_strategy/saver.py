"""When and what a training saves, and how a signal ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vlm_bridge.configuration import Recipe, parse_interval
from vlm_bridge.errors import TrainingError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState

KEPT_STEP_CHECKPOINTS = 3
ECHO_SECONDS = 1.0  # within which torchrun repeats a Ctrl-C to processes that have had it


class Interrupted(Exception):
    """Training stopped on a signal after saving; ``exit_code`` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, signal_number: int, saved_to: Path):
        self.exit_code = 128 + signal_number
        self.saved_to = saved_to
        super().__init__(f"interrupted; saved {saved_to}")


class Saver:
    """Save checkpoints of a state, with facts beside it, that may be ``resumed`` from one."""

    def __init__(
        self,
        state: TrainState,
        recipe: Recipe,
        world: World,
        facts: Mapping[str, Any],
        resumed: Path | None = None,
    ):
        self.state, self.recipe, self.world, self.facts = state, recipe, world, facts
        self.folder = Path(recipe.checkpoint_dir)
        self.every = parse_interval(recipe.save_every)
        self.saved_at = time.monotonic()
        self.last_sound = resumed
        is_latest = resumed and resumed.resolve() == (self.folder / checkpoints.LATEST).resolve()
        self._latest_holds = self._position if is_latest else None
        if world.is_first:
            checkpoints.discard_unfinished(self.folder)

    @property
    def _position(self) -> tuple[int, int]:
        return self.state.step, self.state.validated_step

    def latest(self) -> Path:
        """Save the latest checkpoint, unless it holds this state already."""
        if self._latest_holds != self._position:
            self._save(checkpoints.LATEST)
            self._latest_holds = self._position
        return self.folder / checkpoints.LATEST

    def best(self) -> None:
        """Save the best checkpoint, and its weights alone in bfloat16."""
        self.check_weights()
        if self.world.is_first:
            weights = checkpoints.in_bfloat16(self.state.weights())
            path = self.folder / checkpoints.BEST_WEIGHTS
            checkpoints.save_checkpoint(path, self.recipe, weights)
        self._save(checkpoints.BEST)

    def after_step(self) -> None:
        """Save where the recipe's ``save_every`` asks for it."""
        (count, unit), state = self.every, self.state
        if unit == "step" and state.step % count == 0:
            self.step()
        if unit == "minute" and time.monotonic() - self.saved_at >= 60 * count:
            self.latest()
        if unit == "epoch" and state.step_in_epoch == 0 and state.epoch % count == 0:
            self.latest()

    def step(self) -> Path:
        """Keep a checkpoint of this very step, and the newest few of its kind."""
        path = self._save(checkpoints.STEP.format(self.state.step))
        if self.world.is_first:
            checkpoints.keep_newest_steps(self.folder, KEPT_STEP_CHECKPOINTS)
        return path

    def check_weights(self) -> None:
        """Raise TrainingError if an update overflowed; waits for the device."""
        if not self.state.is_finite():
            before = self.last_sound
            mend = f"resume {before}, the last checkpoint before that," if before else "start"
            raise TrainingError(
                f"stopped at step {self.state.step}: the weights are not finite any more, and were "
                f"not saved: {mend} with a learning_rate below {self.recipe.learning_rate:g}"
            )

    def _save(self, name: str) -> Path:
        self.check_weights()
        path = self.folder / name
        if self.world.is_first:
            training, weights = {**self.state.state_dict(), **self.facts}, self.state.weights()
            checkpoints.save_checkpoint(path, self.recipe, weights, training)
        self.saved_at = time.monotonic()
        self.last_sound = path
        return path


class Interruption:
    """Receive SIGINT and SIGTERM: noted during a step, immediate in a validation.

    A second Ctrl-C ends the program without saving.

    Attributes:
        received: number of the first signal; 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._saved_to: Path | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Receive signals inside this block, in the main thread."""
        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._receive)
        except ValueError:  # not in the main thread
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def immediate(self, saved_to: Path) -> Iterator[None]:
        """Raise `Interrupted` for a signal inside this block, whose start is saved."""
        self._saved_to = saved_to
        try:
            if self.received:
                raise Interrupted(self.received, saved_to)
            yield
        finally:
            self._saved_to = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            if self._saved_to is not None:
                raise Interrupted(number, self._saved_to)
        elif number == signal.SIGINT and time.monotonic() - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # a shell sees 130
            raise SystemExit(128 + number)  # process 1 of a container is spared by the kernel
