"""Validation: token perplexity, and how much the image helps (the visual gain)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vlm_bridge.data_pipeline.loader import PackedBatch, TokenizedImages, in_batches, whole_rows
from vlm_bridge.model_architecture.captioner import CaptionerModel, CaptionLoss

BLIND_BELOW = 0.05
"""Visual gain, in nats per token, under which a captioner is said to ignore its images."""


class Features(Protocol):
    """By image index: features [len(indices), N, D] from a cache, or pixels [len(indices), 3, h, w] to be encoded."""

    def __getitem__(self, indices: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Validation:
    """Losses are nats per supervised token (captions and their EOS; pads and prompt never count).

    Attributes:
        visual_gain: the loss with images shuffled among captions minus ``loss``; 0 for a captioner that does not look.
    """

    loss: float
    visual_gain: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 50.0))

    @property
    def ignores_images(self) -> bool:
        return self.visual_gain < BLIND_BELOW


@torch.no_grad()
def validate(
    model: CaptionerModel,
    data: TokenizedImages,
    features: Features,
    *,
    batch_images: int = 16,
    autocast: Callable[[], Any],
    progress: Callable[[int], None] = lambda done: None,
) -> Validation:
    """Loss of all captions with their own image and, for the visual gain, with another image each.

    The result does not depend on the batch size.
    """
    was_training = model.training
    model.eval()
    wrong_image = shuffled_images(len(data))
    right_sum = wrong_sum = 0.0
    num_tokens = done = 0
    for rows in in_batches(whole_rows([len(captions) for captions in data.captions]), batch_images):
        batch = data.pack(rows)
        with autocast():
            right = batch_loss(model, batch, features[batch.image_indices])
            wrong = batch_loss(model, batch, features[wrong_image[batch.image_indices]])
        right_sum += right.token_losses.double().sum().item()
        wrong_sum += wrong.token_losses.double().sum().item()
        num_tokens += right.num_tokens
        done += len(rows)
        progress(done)
    model.train(was_training)
    loss = right_sum / num_tokens
    gain = wrong_sum / num_tokens - loss if len(data) > 1 else 0.0
    return Validation(loss, gain, num_tokens)


def shuffled_images(count: int) -> np.ndarray:
    """For each of ``count`` images the index of another, for the visual gain.

    The wrong image of image i is that of its neighbour in a seeded random circle: no image keeps its own, and every
    image is used once.
    """
    circle = np.random.default_rng(0).permutation(count)
    wrong_image = np.empty(count, np.int64)
    wrong_image[circle] = np.roll(circle, 1)
    return wrong_image


def batch_loss(model: CaptionerModel, batch: PackedBatch, features: np.ndarray) -> CaptionLoss:
    """From a packed batch and its features [B, N, D] (or pixels) to a loss; training and validation share it."""
    device = model.device
    ids, labels, segments = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (batch.input_ids, batch.labels, batch.segments)
    )
    image_state = model.image_state(model.features(torch.from_numpy(np.ascontiguousarray(features))))
    return model.caption_loss(ids, labels, segments, image_state)
