"""Stop when the validation loss no longer improves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Counts validations without an improvement of at least ``min_delta`` nats; part of every checkpoint."""

    patience: int
    min_delta: float
    best: float = float("inf")
    bad_validations: int = 0

    def should_stop(self, loss: float) -> bool:
        """Record one validation loss; True when patience is used up."""
        if loss < self.best - self.min_delta:
            self.best = loss
            self.bad_validations = 0
        else:
            self.bad_validations += 1
        return self.bad_validations >= self.patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad_validations": self.bad_validations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = float(state["best"])
        self.bad_validations = int(state["bad_validations"])
