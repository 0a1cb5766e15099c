"""Everything that a checkpoint holds and a resumed run continues from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy import checkpoint as checkpoints

POSITION = ("step", "epoch", "step_in_epoch", "validated_step")
PROGRESS = (*POSITION, "best_loss", "skipped_in_a_row", "epoch_loss", "epoch_steps")


class WeightAverage:
    """Exponential moving average of the trained parameters (Polyak & Juditsky 1992).

    `torch.optim.swa_utils.AveragedModel` would copy the frozen models, too.

    Args:
        decay: None for no averaging; ``weights`` is then empty.

    Attributes:
        weights: the average, by parameter name.
        live_weights: the weights that the optimizer changes.
    """

    def __init__(self, model: torch.nn.Module, decay: float | None):
        self.decay = decay or 0.0
        named = model.named_parameters() if decay is not None else []
        self.live_weights = {name: p.detach() for name, p in named if p.requires_grad}
        self.restart()

    def restart(self) -> None:
        """Start again from the weights of the model."""
        self.weights = {name: live.clone() for name, live in self.live_weights.items()}

    def update(self, step: int) -> None:
        """Average in the weights after a step, counted from 1.

        Early on the decay is (1 + step) / (10 + step), TensorFlow's rule.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, live in self.live_weights.items():
            self.weights[name].lerp_(live, share)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model for a block."""
        kept = {name: live.clone() for name, live in self.live_weights.items()}
        try:
            for name, live in self.live_weights.items():
                live.copy_(self.weights[name])
            yield
        finally:
            for name, live in self.live_weights.items():
                live.copy_(kept[name])


@dataclass
class TrainState:
    """State of a run between two optimizer steps."""

    model: CaptionModel
    optimizer: torch.optim.Optimizer
    scaler: torch.GradScaler
    average: WeightAverage
    step: int = 0
    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0
    validated_step: int = 0  # of the last finished validation
    best_loss: float = float("inf")  # of validation, in nats per token
    best_watched: float = float("inf")  # as early stopping counts it; lower is better
    bad_validations: int = 0  # in a row without a new best
    skipped_in_a_row: int = 0  # steps without a finite loss or gradient; they changed nothing
    epoch_loss: float = 0.0  # sum over the other steps of this epoch
    epoch_steps: int = 0  # their number

    @property
    def last_epoch(self) -> int:
        """0-based epoch of the last step; with its last step an epoch counts as finished."""
        return self.epoch - 1 if self.step_in_epoch == 0 else self.epoch

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights to validate and save: the average, where there is one."""
        return {**self.model.trained_state_dict(), **self.average.weights}

    def advance(self, steps_in_epoch: int, loss: float | None) -> None:
        """Count an optimizer step; a skipped one has no loss."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_in_epoch:
            self.epoch += 1
            self.step_in_epoch = 0
        if loss is None:
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.epoch_loss += loss
            self.epoch_steps += 1

    def watch(self, value: float) -> bool:
        """Record the monitored value of a validation; return whether it is the lowest so far."""
        improved = value < self.best_watched
        self.best_watched = value if improved else self.best_watched
        self.bad_validations = 0 if improved else self.bad_validations + 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint beside weights and recipe."""
        is_cuda = self.model.device.type == "cuda"
        return {
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "early_stopping": {"best": self.best_watched, "bad_validations": self.bad_validations},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if is_cuda else [],
            "live_weights": self.average.live_weights,
        }

    def load_state_dict(self, training: Mapping[str, Any], where: Path) -> None:
        """Continue from `state_dict`; the model's weights are loaded already."""
        weights = {**self.model.trained_state_dict(), **training.get("live_weights", {})}
        checkpoints.load_weights(self.model, weights, where)
        groups, ours = (
            [group["param_names"] for group in optimizer["param_groups"]]
            for optimizer in (training["optimizer"], self.optimizer.state_dict())
        )
        if groups != ours:
            raise ValueError("keep the patterns under trainable in their order")
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        # Versions before this key saved a state after its validation.
        progress = {"validated_step": training["progress"]["step"], **training["progress"]}
        if not all(type(progress[name]) is int and progress[name] >= 0 for name in POSITION):
            raise ValueError(f"its position is {progress}")
        for name in progress.keys() & set(PROGRESS):
            setattr(self, name, progress[name])
        self.best_watched = float(training["early_stopping"]["best"])
        self.bad_validations = int(training["early_stopping"]["bad_validations"])
        torch.set_rng_state(training["random_state"])
        states = training["cuda_random_state"][: torch.cuda.device_count()]
        for index, state in enumerate(states):
            torch.cuda.set_rng_state(state, index)
