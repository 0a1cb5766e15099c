"""Stop when validation no longer improves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Counts validations without an improvement; part of every checkpoint.

    What is watched falls: the loss in nats per token, or a score's negative.
    """

    patience: int | None
    best: float = float("inf")
    bad_validations: int = 0

    def should_stop(self, watched: float) -> bool:
        """Record what one validation gave; True when patience is used up."""
        if watched < self.best:
            self.best = watched
            self.bad_validations = 0
        else:
            self.bad_validations += 1
        return self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """Whether the last validation used up the patience."""
        return self.patience is not None and self.bad_validations >= self.patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad_validations": self.bad_validations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = float(state["best"])
        self.bad_validations = int(state["bad_validations"])
