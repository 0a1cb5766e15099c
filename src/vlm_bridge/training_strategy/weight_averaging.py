"""An exponential moving average of what is trained: less noise than the last step leaves (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WeightAverage:
    """The average of a model's trained parameters; it starts as what they are when it is made.

    Attributes:
        weights: the average, by the parameters' names.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self._trained = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.weights = {name: tensor.clone() for name, tensor in self._trained.items()}

    @property
    def live_weights(self) -> dict[str, torch.Tensor]:
        """What the optimiser changes."""
        return dict(self._trained)

    def update(self, step: int, skipped: torch.Tensor) -> None:
        """Take in the weights after a step (the first is 1).

        Early on the decay is (1 + step) / (10 + step), TensorFlow's rule, or the start would weigh for too long.

        Args:
            skipped: 1.0 where the step changed no weights and shall not move their average either, else 0.0; on the
                device.
        """
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skipped)
        for name, trained in self._trained.items():
            self.weights[name].lerp_(trained, share.to(trained.dtype))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average inside this block, and its own weights again behind it, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, trained in self._trained.items():
            kept = trained.clone()
            trained.copy_(self.weights[name])
            self.weights[name].copy_(kept)
