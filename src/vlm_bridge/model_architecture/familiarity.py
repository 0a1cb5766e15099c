"""How near an image is to the training images, and how sure a caption is therefore."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import ConfidenceOptions


class Familiarity(nn.Module):
    """Cosine similarity of an image to the nearest of some training images, by mean features."""

    memory: torch.Tensor

    def __init__(self, options: ConfidenceOptions, dim: int):
        super().__init__()
        self.unlike_below = options.unlike_below
        self.register_buffer("memory", torch.zeros(options.remembered_images, dim))

    @torch.no_grad()
    def remember(self, features_bnd: torch.Tensor) -> None:
        """Keep images of features [B, N, D], evenly chosen, in the place of as many others."""
        count = min(len(features_bnd), len(self.memory))
        chosen = torch.linspace(0, len(features_bnd) - 1, count).long()
        self.memory[:count] = _directions(features_bnd[chosen]).to(self.memory.device)

    @torch.no_grad()
    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return the similarity [B], at most 1; 0 while nothing is remembered."""
        return (_directions(features_bnd).to(self.memory) @ self.memory.T).amax(1)

    def is_unlike(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return for each image [B] whether it is unlike the training images."""
        return self(features_bnd) < self.unlike_below


def _directions(features_bnd: torch.Tensor) -> torch.Tensor:
    return F.normalize(features_bnd.float().mean(1), dim=-1)


def confidence(options: ConfidenceOptions, score: float, similarity: float) -> float:
    """Return the probability that a caption names the right subject (Platt 1999).

    Args:
        score: mean log-probability per token, in nats.
        similarity: of the image to the training images (`Familiarity`).
    """
    constant, per_nat, per_similarity = options.weights
    return 1 / (1 + math.exp(-(constant + per_nat * score + per_similarity * similarity)))
