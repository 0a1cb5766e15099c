"""Everything that a checkpoint holds and a resumed run continues from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy import checkpoint as checkpoints

if TYPE_CHECKING:
    from vlm_bridge.training_strategy.monitor import Monitor

POSITION = ("step", "epoch", "step_in_epoch", "validated_step")
PROGRESS = (*POSITION, "best_loss", "best_score", "skipped_steps")


class WeightAverage:
    """Exponential moving average of the trained parameters (Polyak & Juditsky 1992).

    `torch.optim.swa_utils.AveragedModel` would copy the frozen models, too.

    Attributes:
        weights: the average, by parameter name.
        live_weights: the weights that the optimizer changes.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.live_weights = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.weights = {name: tensor.clone() for name, tensor in self.live_weights.items()}

    def restart(self) -> None:
        """Start again from the weights of the model."""
        for name, live in self.live_weights.items():
            self.weights[name].copy_(live)

    def update(self, step: int, skipped: torch.Tensor) -> None:
        """Average in the weights after a step (the first is 1).

        Early on the decay is (1 + step) / (10 + step), TensorFlow's rule.

        Args:
            skipped: 1.0 on the device where the step changed nothing, else 0.0.
        """
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skipped)
        for name, live in self.live_weights.items():
            self.weights[name].lerp_(live, share.to(live.dtype))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Swap the average into the model for a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, live in self.live_weights.items():
            kept = live.clone()
            live.copy_(self.weights[name])
            self.weights[name].copy_(kept)


@dataclass
class TrainState:
    """State of a run between two optimizer steps."""

    model: CaptionModel
    optimizer: torch.optim.Optimizer
    scaler: torch.GradScaler
    average: WeightAverage | None = None
    monitor: Monitor | None = None
    step: int = 0
    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0
    validated_step: int = 0  # of the last finished validation
    best_loss: float = float("inf")  # of validation, in nats per token
    best_score: float = float("-inf")  # BLEU-4 or CIDEr, where the recipe monitors one
    best_watched: float = float("inf")  # as early stopping counts it; lower is better
    bad_validations: int = 0  # in a row without a new best
    skipped_steps: int = 0  # without a finite loss or gradient; they changed nothing
    skipped_in_a_row: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def last_epoch(self) -> int:
        """0-based epoch of the last step; with its last step an epoch counts as finished."""
        return self.epoch - 1 if self.step_in_epoch == 0 else self.epoch

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights to validate and save: the average, where there is one."""
        averaged = self.average.weights if self.average is not None else {}
        return {**self.model.trained_state_dict(), **averaged}

    def averaged(self) -> AbstractContextManager[None]:
        """Swap the average, where there is one, into the model for a block."""
        return self.average.in_model() if self.average is not None else nullcontext()

    def is_finite(self) -> bool:
        """Return whether every trained and averaged weight is finite; waits for the device."""
        return all_finite([*self.model.trained_state_dict().values(), *self.weights().values()])

    def advance(self, steps_in_epoch: int) -> None:
        """Count an optimizer step."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_in_epoch:
            self.epoch += 1
            self.step_in_epoch = 0

    def watch(self, value: float) -> bool:
        """Record the monitored value of a validation; return whether it is the lowest so far."""
        improved = value < self.best_watched
        self.best_watched = value if improved else self.best_watched
        self.bad_validations = 0 if improved else self.bad_validations + 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint beside weights and recipe."""
        monitor = self.monitor.state_dict() if self.monitor is not None else {}
        average = self.average
        return {
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "early_stopping": {"best": self.best_watched, "bad_validations": self.bad_validations},
            "running": {"skipped_in_a_row": self.skipped_in_a_row, "monitor": monitor},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if self._is_cuda else [],
            **({"live_weights": average.live_weights} if average is not None else {}),
        }

    def load_state_dict(self, training: Mapping[str, Any], where: Path) -> None:
        """Continue from `state_dict`; the model's weights are loaded already."""
        if live := training.get("live_weights"):
            if not all_finite(live.values()):
                raise ValueError("its live weights are not finite")
            weights = {**self.model.trained_state_dict(), **live}
            checkpoints.load_weights(self.model, weights, where)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        progress = dict(training["progress"])
        # Versions before this key saved a state after its validation.
        validated = 0 if progress.get("owes_decoding") else progress["step"]
        progress.setdefault("validated_step", validated)
        if not all(type(progress[name]) is int and progress[name] >= 0 for name in POSITION):
            raise ValueError(f"its position is {progress}")
        for name in progress.keys() & set(PROGRESS):
            setattr(self, name, progress[name])
        self.best_watched = float(training["early_stopping"]["best"])
        self.bad_validations = int(training["early_stopping"]["bad_validations"])
        self.skipped_in_a_row = training["running"]["skipped_in_a_row"]
        if self.monitor is not None:
            self.monitor.load_state_dict(training["running"]["monitor"])
        torch.set_rng_state(training["random_state"])
        if self._is_cuda:
            states = training["cuda_random_state"][: torch.cuda.device_count()]
            for index, state in enumerate(states):
                torch.cuda.set_rng_state(state, index)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether every number of some tensors is finite. Waits for the device once."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())
