"""Validation: perplexity, visual gain, and scores of decoded captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import torch

from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import PackedBatch, TokenizedImages, in_batches, whole_rows
from vlm_bridge.device import DeviceCopy
from vlm_bridge.metrics import score_without_java
from vlm_bridge.model_architecture.captioner import CaptionLoss, CaptionModel
from vlm_bridge.training_strategy.distributed import World

BLIND_BELOW = 0.05  # nats per token of visual gain
DECODE_BATCH = 16


class Features(Protocol):
    """By image index: cached features [len(indices), N, D], or pixels [len(indices), 3, h, w]."""

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor | np.ndarray: ...


@dataclass(frozen=True)
class Validation:
    """Losses in nats per supervised token: captions and their EOS, without pads and prompt.

    Attributes:
        visual_gain: loss with images shuffled among captions minus ``loss``; 0 without looking.
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


@dataclass(frozen=True)
class DecodedValidation:
    """Scores as fractions, with simple tokens. They compare within one run, not with papers."""

    bleu4: float
    cider: float
    num_images: int

    def score(self, monitor: Literal["bleu4", "cider"]) -> float:
        return self.bleu4 if monitor == "bleu4" else self.cider


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
    """Measure the loss of all captions with their own image and with another one.

    Batches are longest first, so that the first takes the most memory. Neither the batch size nor
    the number of processes, which share the batches, changes the result.
    """
    world = world or World(model.device)
    was_training = model.training
    model.eval()
    wrong_image = shuffled_images(len(data))
    right: list[torch.Tensor] = []
    wrong: list[torch.Tensor] = []
    num_tokens = done = 0
    rows = whole_rows(data.captions_per_image)
    longest_first = np.argsort(-data.image_lengths, kind="stable")
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
        math.fsum(world.interleave(torch.stack(sums).tolist() if sums else [])) / num_tokens
        for sums in (right, wrong)
    )
    return Validation(loss, wrong_loss - loss if len(data) > 1 else 0.0, num_tokens)


def decode_and_score(
    model: CaptionModel,
    prompt_ids: Sequence[int],
    images: Sequence[CaptionedImage],
    features: Features,
    decode: DecodeSettings,
    autocast: Callable[[], Any],
    world: World | None = None,
) -> DecodedValidation:
    """Caption the first images of a split and score them against all their references."""
    world = world or World(model.device)
    was_training = model.training
    model.eval()
    shared: list[list[str]] = []
    for indices in world.share(in_batches(range(len(images)), DECODE_BATCH)):
        features_bnd = model.features(torch.as_tensor(features[np.array(indices)]))
        with autocast():
            captions = model.generate(features_bnd, prompt_ids, decode)
        shared.append([model.language_model.decode(caption.ids) for caption in captions])
    model.train(was_training)
    texts = list(chain.from_iterable(world.interleave(shared)))
    scores = score_without_java([image.captions for image in images], texts)
    return DecodedValidation(scores["BLEU-4"], scores["CIDEr"], len(images))


def shuffled_images(count: int) -> np.ndarray:
    """Return for each of ``count`` images another one: the neighbor in a seeded circle."""
    circle = np.random.default_rng(0).permutation(count)
    wrong_image = np.empty(count, np.int64)
    wrong_image[circle] = np.roll(circle, 1)
    return wrong_image


@dataclass(frozen=True)
class LoadedBatch:
    """A packed batch with its tensors on their way to the device.

    Attributes:
        tensors: input ids, labels, segments [R, T], supervised positions [V], features or pixels.
        weights: of the losses of supervised tokens [V]; None is 1 each.
    """

    packed: PackedBatch
    tensors: DeviceCopy
    weights: torch.Tensor | None = None


def load_batch(
    batch: PackedBatch,
    features: Features,
    device: torch.device,
    *,
    images: np.ndarray | None = None,
) -> LoadedBatch:
    """Read features of a batch, or of ``images`` [R], and start to copy it; threads may call it."""
    indices = batch.image_indices if images is None else images
    chosen = torch.as_tensor(features[indices]).contiguous()
    arrays = (batch.input_ids, batch.labels, batch.segments, batch.supervised)
    return LoadedBatch(batch, DeviceCopy([*map(torch.from_numpy, arrays), chosen], device))


def batch_loss(
    model: CaptionModel, batch: LoadedBatch, label_smoothing: float = 0.0
) -> CaptionLoss:
    """Compute the loss of a packed batch, in training and validation alike."""
    ids, labels, segments, supervised, features = batch.tensors.wait()
    image = model.image_inputs(model.features(features))
    return model.caption_loss(
        ids,
        labels,
        segments,
        image,
        supervised_v=supervised,
        weights_v=batch.weights,
        label_smoothing=label_smoothing,
    )
