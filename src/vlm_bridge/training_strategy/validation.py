"""Validation: perplexity, visual gain, and scores of decoded captions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vlm_bridge.configuration import parse_interval
from vlm_bridge.data_pipeline.features import Features
from vlm_bridge.data_pipeline.loader import (
    PackedBatch,
    Row,
    TokenizedImages,
    in_batches,
    whole_rows,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.device import to_device
from vlm_bridge.metrics import score_without_java
from vlm_bridge.model_architecture.captioner import CaptionLoss, CaptionModel
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.resume import Saver
from vlm_bridge.training_strategy.state import TrainState

if TYPE_CHECKING:
    from vlm_bridge.training_strategy.monitor import Monitor

logger = logging.getLogger(__name__)

DECODE_BATCH = 16


@dataclass(frozen=True)
class Validation:
    """Losses in nats per supervised token: captions and their EOS, without pads and prompt."""

    loss: float
    visual_gain: float  # loss with images shuffled among captions minus `loss`
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 50.0))


class Sample(NamedTuple):
    """A generated caption of an image; tokens are without prompt and EOS."""

    image: CaptionedImage
    token_ids: Sequence[int]
    caption: str


@dataclass(frozen=True)
class LoadedBatch:
    """A packed batch with its tensors on the device."""

    packed: PackedBatch
    tensors: list[torch.Tensor]  # ids, labels, segments [R, T], supervised [V], features or pixels
    weights: torch.Tensor | None = None  # of the losses of supervised tokens [V]; None is 1 each
    places: torch.Tensor | None = None  # [B, L], of `PackedBatch`


def load_batch(batch: PackedBatch, features: Features, device: torch.device) -> LoadedBatch:
    """Read features of a batch and start to copy it; threads may call it."""
    chosen = torch.as_tensor(features[batch.image_indices]).contiguous()
    arrays = [batch.input_ids, batch.labels, batch.segments, batch.supervised]
    tensors = to_device([*map(torch.from_numpy, arrays), chosen], device)
    if batch.places is None:
        return LoadedBatch(batch, tensors)
    return LoadedBatch(batch, tensors, places=torch.from_numpy(batch.places).to(device))


def batch_loss(
    model: CaptionModel, batch: LoadedBatch, label_smoothing: float = 0.0
) -> CaptionLoss:
    """Compute the loss of a packed batch, in training and validation alike."""
    ids, labels, segments, supervised, features = batch.tensors
    image = model.image_inputs(model.features(features))
    return model.caption_loss(
        ids, labels, segments, image, batch.places,
        supervised_v=supervised, weights_v=batch.weights,
        label_smoothing=label_smoothing,
    )  # fmt: skip


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a block."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


@torch.no_grad()
def validate(
    model: CaptionModel,
    data: TokenizedImages,
    features: Features,
    *,
    batch_images: int = 16,
    autocast: Callable[[], Any],
    world: World | None = None,
) -> Validation:
    """Measure the loss of all captions with their own image and with another one.

    Batches are longest first, so that the first takes the most memory. Neither the batch size nor
    the number of processes, which share the batches, changes the result.
    """
    world = world or World(model.device)
    circle = shuffled(len(data))
    wrong_image = np.empty_like(circle)
    wrong_image[circle] = np.roll(circle, 1)  # its neighbor
    losses: list[torch.Tensor] = []  # of each batch: with its own images, with wrong ones
    num_tokens = 0
    rows = whole_rows(data.captions_per_image)
    longest_first = np.argsort(-data.image_lengths, kind="stable")
    with evaluating(model):
        for some in world.share(in_batches([rows[i] for i in longest_first], batch_images)):
            right = data.pack(some)
            wrong = replace(right, image_indices=wrong_image[right.image_indices])
            for batch in (right, wrong):
                loaded = load_batch(batch, features, model.device)
                with autocast():
                    losses.append(batch_loss(model, loaded).token_losses.sum())
            num_tokens += right.num_supervised
    num_tokens = int(world.sum([num_tokens])[0])
    all_losses = list(chain(*world.gather(torch.stack(losses).tolist() if losses else [])))
    loss, wrong_loss = (math.fsum(all_losses[start::2]) / num_tokens for start in (0, 1))
    return Validation(loss, wrong_loss - loss if len(data) > 1 else 0.0, num_tokens)


def shuffled(count: int) -> np.ndarray:
    """Return the order [count] in which each image's wrong image is the one before it."""
    return np.random.default_rng(0).permutation(count)


@dataclass
class StreamedValidation:
    """`validate` for features that come in batches, such as those of captioning.

    Images must come in the order `shuffled`; several processes each take a part of it. Features of
    three batches are held at most.

    Args:
        rows: path -> all captions of its image.
    """

    model: CaptionModel
    data: TokenizedImages
    rows: Mapping[str, Row]
    autocast: Callable[[], Any]
    losses: list[torch.Tensor] = field(default_factory=list, init=False)
    wrong_losses: list[torch.Tensor] = field(default_factory=list, init=False)
    num_tokens: int = field(default=0, init=False)
    first: tuple[PackedBatch, torch.Tensor] | None = field(default=None, init=False)
    last_1nd: torch.Tensor | None = field(default=None, init=False)

    def add(self, paths: Sequence[str], features_bnd: torch.Tensor) -> None:
        """Measure the captions of a batch of images."""
        indices = np.arange(len(paths))
        batch = replace(self.data.pack([self.rows[path] for path in paths]), image_indices=indices)
        self.num_tokens += batch.num_supervised
        self.losses.append(self._loss(batch, features_bnd))
        if self.last_1nd is None:
            self.first = batch, features_bnd
        else:
            self.wrong_losses.append(self._loss(batch, features_bnd, self.last_1nd))
        self.last_1nd = features_bnd[-1:]

    def result(self, world: World) -> Validation:
        """Return the outcome of all processes to each of them."""
        lasts = world.gather(None if self.last_1nd is None else self.last_1nd.cpu())
        if self.first:  # behind the last image of the processes before this one
            *_, before = filter(torch.is_tensor, (*lasts[world.rank :], *lasts[: world.rank]))
            self.wrong_losses.append(self._loss(*self.first, before.to(self.model.device)))
        (num_tokens,) = world.sum([self.num_tokens])
        loss, wrong_loss = (
            math.fsum(chain(*world.gather([each.item() for each in losses]))) / num_tokens
            for losses in (self.losses, self.wrong_losses)
        )
        return Validation(loss, wrong_loss - loss, int(num_tokens))

    @torch.no_grad()
    def _loss(
        self, batch: PackedBatch, features_bnd: torch.Tensor, wrong_1nd: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum the losses; with the features of the image before, each image has wrong ones."""
        if wrong_1nd is not None:
            features_bnd = torch.cat([wrong_1nd, features_bnd[:-1]])
        loaded = load_batch(batch, features_bnd, self.model.device)
        with self.autocast():
            return batch_loss(self.model, loaded).token_losses.sum()


def scores_of(samples: Sequence[Sample]) -> dict[str, float]:
    """Return `score_without_java` of captions."""
    references = [sample.image.captions for sample in samples]
    return score_without_java(references, [sample.caption for sample in samples])


class Validator:
    """Validate when the recipe asks for it; decide the best checkpoint and the end of training.

    The state is saved before a validation, so that an interrupted one is simply done again.
    """

    def __init__(
        self,
        state: TrainState,
        data: TrainingData,
        monitor: Monitor,
        saver: Saver,
        autocast: Callable[[], Any],
    ):
        self.state, self.data, self.recipe = state, data, data.recipe
        self.monitor, self.saver, self.autocast = monitor, saver, autocast
        self.every = parse_interval(self.recipe.validate_every)
        self.validation: Validation | None = None
        self.decoded: dict[str, float] | None = None

    @property
    def stops_early(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state.bad_validations >= patience

    @property
    def is_finished(self) -> bool:
        return self.stops_early or self.state.step >= self.data.total_steps

    @property
    def is_due(self) -> bool:
        state, (count, unit) = self.state, self.every
        if state.validated_step == state.step or state.step >= self.data.total_steps:
            return state.validated_step != state.step
        if unit == "step":
            return state.step % count == 0
        return state.step_in_epoch == 0 and state.epoch % count == 0

    def validate_if_due(self) -> None:
        """Validate, log samples, and save the best checkpoint."""
        if not self.is_due:
            return
        state, recipe, monitor, val = self.state, self.recipe, self.monitor, self.data.val
        num_scored = min(recipe.decoded_images, len(val.images))
        num_shown = recipe.num_validation_samples
        self.saver.latest()
        with state.average.in_model():
            self.validation = validate(
                state.model, val.captions, val.features, autocast=self.autocast,
                world=self.data.world,
            )  # fmt: skip
            samples = self.decode(max(num_scored, num_shown))
        monitor.validation(state.step, state.last_epoch, self.validation, val.captions)
        watched = self.validation.loss
        if num_scored:
            self.decoded = scores_of(samples[:num_scored])
            monitor.decoded(state.step, num_scored, self.decoded)
            if recipe.monitor != "loss":
                watched = -self.decoded[recipe.monitor]
        if num_shown:
            monitor.samples(state.step, samples[:num_shown])
        state.best_loss = min(state.best_loss, self.validation.loss)
        state.validated_step = state.step
        if state.watch(watched):
            self.saver.best()
        if self.stops_early:
            patience = recipe.early_stopping_patience
            logger.info(f"early stopping: no improvement in {patience} validations")
        if self.is_finished:
            self.saver.latest()
        monitor.restart_clock()

    def decode(self, count: int) -> list[Sample]:
        """Caption the first images; processes share the work, and each gets all captions."""
        model, val, world = self.state.model, self.data.val, self.data.world
        images, prompt_ids, shared = val.images[:count], self.data.format.prompt_ids, []
        with evaluating(model):
            for indices in world.share(in_batches(range(len(images)), DECODE_BATCH)):
                features_bnd = model.features(torch.as_tensor(val.features[np.array(indices)]))
                with self.autocast():
                    captions = model.generate(features_bnd, prompt_ids, self.recipe.decode)
                shared.append([(ids, model.language_model.decode(ids)) for ids, _ in captions])
        decoded = chain(*world.interleave(shared))
        return [Sample(image, *caption) for image, caption in zip(images, decoded, strict=True)]
