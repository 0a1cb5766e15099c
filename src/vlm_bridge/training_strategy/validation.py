"""Validation: perplexity, visual gain, and scores of decoded captions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from vlm_bridge.configuration import DecodeSettings, parse_interval
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import PackedBatch, TokenizedImages, in_batches, whole_rows
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.device import DeviceCopy
from vlm_bridge.metrics import score_without_java, simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionLoss, CaptionModel
from vlm_bridge.training_strategy.distributed import World

if TYPE_CHECKING:
    from vlm_bridge.training_strategy.data import TrainingData
    from vlm_bridge.training_strategy.monitor import Monitor
    from vlm_bridge.training_strategy.resume import Interruption, Saver
    from vlm_bridge.training_strategy.state import TrainState

logger = logging.getLogger(__name__)

BLIND_BELOW = 0.05  # nats per token of visual gain
DECODE_BATCH = 16


class Features(Protocol):
    """By image index: cached features [len(indices), N, D], or pixels [len(indices), 3, h, w]."""

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor | np.ndarray: ...


@dataclass(frozen=True)
class Validation:
    """Losses in nats per supervised token: captions and their EOS, without pads and prompt."""

    loss: float
    visual_gain: float  # loss with images shuffled among captions minus `loss`
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


class Sample(NamedTuple):
    """A generated caption with its image and references; tokens are without prompt and EOS."""

    image: Image.Image
    token_ids: Sequence[int]
    caption: str
    references: Sequence[str]


class SampleStatistics(NamedTuple):
    """Tokens per caption, distinct tokens over all tokens, and BLEU-4 of each caption (0 to 1)."""

    mean_length: float
    token_diversity: float
    bleu4: list[float]

    @property
    def mean_bleu4(self) -> float:
        return sum(self.bleu4) / len(self.bleu4)


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
    was_training = model.training
    model.eval()
    wrong_image = shuffled_images(len(data))
    right: list[torch.Tensor] = []
    wrong: list[torch.Tensor] = []
    num_tokens = 0
    rows = whole_rows(data.captions_per_image)
    longest_first = np.argsort(-data.image_lengths, kind="stable")
    for some in world.share(in_batches([rows[image] for image in longest_first], batch_images)):
        batch = data.pack(some)
        for image_of, sums in ((np.arange(len(data)), right), (wrong_image, wrong)):
            loaded = load_batch(batch, features, model.device, images=image_of[batch.image_indices])
            with autocast():
                sums.append(batch_loss(model, loaded).token_losses.sum())
        num_tokens += batch.num_supervised
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
    """A packed batch with its tensors on their way to the device."""

    packed: PackedBatch
    tensors: DeviceCopy  # ids, labels, segments [R, T], supervised [V], features or pixels
    weights: torch.Tensor | None = None  # of the losses of supervised tokens [V]; None is 1 each


def load_batch(
    batch: PackedBatch, features: Features, device: torch.device, images: np.ndarray | None = None
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
        ids, labels, segments, image, supervised_v=supervised, weights_v=batch.weights,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def sample_statistics(samples: Sequence[Sample]) -> SampleStatistics:
    """Compute length, diversity and BLEU-4, in simple tokens, of at least one caption."""
    from pycocoevalcap.bleu.bleu import Bleu

    tokens = [token for sample in samples for token in sample.token_ids]
    references = {i: simple_tokenize(sample.references) for i, sample in enumerate(samples)}
    captions = {i: simple_tokenize([sample.caption]) for i, sample in enumerate(samples)}
    _, by_caption = Bleu(4).compute_score(references, captions, verbose=0)
    diversity = len(set(tokens)) / max(len(tokens), 1)
    return SampleStatistics(len(tokens) / len(samples), diversity, list(map(float, by_caption[3])))


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
        self.decoded: DecodedValidation | None = None

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

    def validate_if_due(self, interruption: Interruption) -> None:
        """Validate, log samples, and save the best checkpoint."""
        if not self.is_due:
            return
        state, data, saved_to = self.state, self.data, self.saver.latest()
        with state.averaged(), interruption.immediate(saved_to):
            self.validation = validate(
                state.model, data.val, data.val_features, autocast=self.autocast, world=data.world
            )
            samples = self._samples()
            if count := self.recipe.decoded_images:
                self.decoded = decode_and_score(
                    state.model, data.format.prompt_ids, data.val_images[:count],
                    data.val_features, self.recipe.decode, self.autocast, data.world,
                )  # fmt: skip
        watched = self.validation.loss
        self.monitor.validation(state.step, state.last_epoch, self.validation, data.val)
        if self.decoded is not None:
            self.monitor.decoded(state.step, self.decoded)
            if self.recipe.monitor != "loss":
                score = self.decoded.score(self.recipe.monitor)
                state.best_score = max(state.best_score, score)
                watched = -score
        if samples:
            self.monitor.samples(state.step, samples, sample_statistics(samples))
        state.best_loss = min(state.best_loss, self.validation.loss)
        state.validated_step = state.step
        if state.watch(watched):
            self.saver.best()
        if self.stops_early:
            patience = self.recipe.early_stopping_patience
            logger.info(f"early stopping: no improvement in {patience} validations")
        if self.is_finished:
            self.saver.latest()
        self.monitor.restart_clock()

    def _samples(self) -> list[Sample]:
        """Caption the first validation images greedily, in the first process."""
        data, model = self.data, self.state.model
        count = min(self.recipe.num_validation_samples, len(data.val_images))
        if not count or not data.world.is_first:
            return []
        model.eval()
        greedy = DecodeSettings(num_beams=1, max_new_tokens=self.recipe.decode.max_new_tokens)
        features = model.features(torch.as_tensor(data.val_features[np.arange(count)]))
        with self.autocast():
            captions = model.generate(features, data.format.prompt_ids, greedy)
        model.train()
        decode = model.language_model.decode
        return [
            Sample(open_image(image.path), ids, decode(ids), image.captions)
            for image, (ids, _) in zip(data.val_images, captions, strict=False)
        ]
