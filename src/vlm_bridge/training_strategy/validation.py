"""Validation: token perplexity, and how much the image helps (the visual gain)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vlm_bridge import runtime
from vlm_bridge.data_pipeline.loader import PackedBatch, TokenizedImages, in_batches, whole_rows
from vlm_bridge.model_architecture.captioner import CaptionLoss, CaptionModel
from vlm_bridge.training_strategy.distributed import World

BLIND_BELOW = 0.05
"""Visual gain, in nats per token, under which a captioner is said to ignore its images."""


class Features(Protocol):
    """By image index: features [len(indices), N, D] from a cache, or pixels [len(indices), 3, h, w] to be encoded."""

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor | np.ndarray: ...


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
    model: CaptionModel,
    data: TokenizedImages,
    features: Features,
    *,
    batch_images: int = 16,
    autocast: Callable[[], Any],
    world: World | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Validation:
    """Loss of all captions with their own image and, for the visual gain, with another image each.

    The result depends neither on the batch size nor on the order, which is by length: batches have few pads, and the
    first takes the most memory. Processes share the batches of one, whose sums are added up as one process does: their
    number changes no bit of the result.

    Args:
        world: the processes that validate together, each of which gets the result.
    """
    world = world or World(model.device)
    was_training = model.training
    model.eval()
    wrong_image = shuffled_images(len(data))
    right: list[torch.Tensor] = []
    wrong: list[torch.Tensor] = []
    num_tokens = done = 0
    rows, longest_first = (
        whole_rows(data.captions_per_image),
        np.argsort(-data.image_lengths, kind="stable"),
    )
    for some in world.share(in_batches([rows[image] for image in longest_first], batch_images)):
        batch = data.pack(some)
        for image_of, sums in ((np.arange(len(data)), right), (wrong_image, wrong)):
            loaded = load_batch(batch, features, model.device, images=image_of[batch.image_indices])
            with autocast():
                sums.append(batch_loss(model, loaded).token_losses.sum())
        num_tokens += batch.num_supervised
        done += len(some)
        progress(done)
    model.train(was_training)
    num_tokens = int(world.sum([num_tokens])[0])
    loss, wrong_loss = (
        math.fsum(world.interleave(_numbers(sums))) / num_tokens for sums in (right, wrong)
    )
    return Validation(loss, wrong_loss - loss if len(data) > 1 else 0.0, num_tokens)


def _numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Fetched from the device at once."""
    return torch.stack(list(tensors)).tolist() if tensors else []


def shuffled_images(count: int) -> np.ndarray:
    """For each of ``count`` images the index of another, for the visual gain.

    The wrong image of image i is that of its neighbour in a seeded random circle: no image keeps its own, and every
    image is used once.
    """
    circle = np.random.default_rng(0).permutation(count)
    wrong_image = np.empty(count, np.int64)
    wrong_image[circle] = np.roll(circle, 1)
    return wrong_image


@dataclass(frozen=True)
class LoadedBatch:
    """A packed batch with what a step reads of it, on the device or on its way there.

    Attributes:
        tensors: input ids, labels, segments [B, T], supervised positions [V], features or pixels of B images, and
            text states [B, T, H] where they are cached.
        weights: [V], of the losses of the supervised tokens in their sum, on the device; None weighs them alike.
    """

    packed: PackedBatch
    tensors: runtime.DeviceCopy
    weights: torch.Tensor | None = None


def load_batch(
    batch: PackedBatch,
    features: Features,
    device: torch.device,
    *,
    images: np.ndarray | None = None,
) -> LoadedBatch:
    """Read a batch's features and start its copy to the device; may run in a thread, ahead of its step.

    Args:
        images: [B], whose features each row reads instead of its own.
    """
    chosen = torch.as_tensor(
        features[batch.image_indices if images is None else images]
    ).contiguous()
    arrays = (batch.input_ids, batch.labels, batch.segments, batch.supervised)
    tensors = [*map(torch.from_numpy, arrays), chosen]
    return LoadedBatch(batch, runtime.DeviceCopy(tensors, device))


def batch_loss(
    model: CaptionModel, batch: LoadedBatch, label_smoothing: float = 0.0
) -> CaptionLoss:
    """The loss of a packed batch; training and validation share it, but for the smoothing."""
    input_ids, labels, segments, supervised, features = batch.tensors.wait()
    image = model.image_inputs(model.features(features))
    return model.caption_loss(
        input_ids,
        labels,
        segments,
        image,
        supervised,
        weights=batch.weights,
        label_smoothing=label_smoothing,
    )
