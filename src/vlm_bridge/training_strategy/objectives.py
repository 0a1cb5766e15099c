"""Objectives: cross-entropy of human captions, and self-critical sequence training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import CaptionFormat, Row, TokenizedImages, pack_rows
from vlm_bridge.device import DeviceCopy
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.metrics.coco import reference_tokens, simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy.validation import Features, LoadedBatch, batch_loss, load_batch

# Ends references and finished samples. Without it, training learns to break off.
END = "</s>"
SUMS = ("samples", "reward", "tokens", "unfinished")


@dataclass(frozen=True)
class ImageBatch:
    """Images [B] with their features or pixels on the way to the device, still without captions."""

    images: np.ndarray
    tensors: DeviceCopy


Batch = LoadedBatch | ImageBatch


class CrossEntropy:
    """Cross-entropy of human captions.

    Other objectives override its methods. `load` runs in threads ahead of a step; `captions` and
    `loss` run within it.
    """

    def __init__(
        self,
        model: CaptionModel,
        recipe: Recipe,
        format: CaptionFormat,
        images: Sequence[CaptionedImage],
        data: TokenizedImages,
        autocast: Callable[[], Any],
    ):
        self.model, self.recipe, self.format = model, recipe, format
        self.images, self.data, self.autocast = images, data, autocast

    def load(self, rows: Sequence[Row], features: Features) -> Batch:
        """Start to copy the rows of a micro-batch to the device."""
        return load_batch(self.data.pack(rows), features, self.model.device)

    def captions(self, batch: Any, step: int, number: int) -> LoadedBatch:
        """Return the captions of micro-batch ``number`` of a step; numbers count all processes."""
        return batch

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        """Return the loss summed over supervised tokens."""
        return batch_loss(self.model, batch, self.recipe.label_smoothing).total

    def statistics(self, add_up: Callable[[Sequence[float]], Sequence[float]]) -> dict[str, float]:
        """Return means since the last call; ``add_up`` sums over processes."""
        return {}


class SelfCritical(CrossEntropy):
    """Self-critical sequence training (Rennie et al. 2017).

    Captions sampled from the model are rewarded by CIDEr-D with the document frequencies of the
    training split. Each token's loss is weighted by its caption's reward minus the mean reward of
    the image's other samples (Kool et al. 2019). Samples are a function of (seed, step).
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.num_samples = self.recipe.scst_samples
        references = [image.captions for image in self.images]
        tokens = iter(reference_tokens(list(chain.from_iterable(references))))
        self.reward = CiderD([[f"{next(tokens)} {END}" for _ in some] for some in references])
        self._sampling = DecodeSettings(
            max_new_tokens=self.recipe.decode.max_new_tokens,
            do_sample=True,
            temperature=self.recipe.scst_temperature,
        )
        self._sums = np.zeros(len(SUMS))

    def load(self, rows: Sequence[Row], features: Features) -> ImageBatch:
        images = np.array([row.image for row in rows])
        values = torch.as_tensor(features[images]).contiguous()
        return ImageBatch(images, DeviceCopy([values], self.model.device))

    def captions(self, batch: ImageBatch, step: int, number: int) -> LoadedBatch:
        """Sample captions of a batch of images, one row an image."""
        (values,) = batch.tensors.wait()
        features_bnd = self.model.features(values)
        samples = self._sample(features_bnd, seed_of(self.recipe.seed, step, number))
        rewards_bk = self._rewards(batch.images, samples)
        unfinished = sum(ids[-1] != self.format.eos_id for ids in samples)
        lengths = list(map(len, samples))
        self._sums += (len(samples), rewards_bk.sum(), sum(lengths), unfinished)

        targets = [self.format.with_targets(ids) for ids in samples]
        starts = range(0, len(targets), self.num_samples)
        packed = pack_rows(
            batch.images.tolist(), [targets[start : start + self.num_samples] for start in starts]
        )
        arrays = (packed.input_ids, packed.labels, packed.segments, packed.supervised)
        advantages = (rewards_bk - others_mean(rewards_bk)).ravel().astype(np.float32)
        weights = torch.from_numpy(np.repeat(advantages, lengths)).to(self.model.device)
        tensors = [*map(torch.from_numpy, arrays), features_bnd]
        return LoadedBatch(packed, DeviceCopy(tensors, self.model.device), weights)

    def _sample(self, features_bnd: torch.Tensor, seed: int) -> list[list[int]]:
        """Return token ids with EOS, but for captions that were cut."""
        model, limit, eos = self.model, self._sampling.max_new_tokens, self.format.eos_id
        was_training = model.training
        model.eval()
        with self.autocast():
            captions = model.generate(
                features_bnd,
                self.format.prompt_ids,
                self._sampling.replace(seed=seed),
                self.num_samples,
                keys=range(len(features_bnd)),
            )
        model.train(was_training)
        return [[*ids, eos] if len(ids) < limit else ids for ids, _ in captions]

    def _rewards(self, images: np.ndarray, samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return CIDEr-D [B, K] of samples against the references of their image."""
        words = simple_tokenize([self.model.language_model.decode(list(ids)) for ids in samples])
        sentences = [
            f"{text} {END}" if ids[-1] == self.format.eos_id else text
            for text, ids in zip(words, samples, strict=True)
        ]
        per_image = np.array_split(sentences, len(images))
        pairs = zip(images.tolist(), per_image, strict=True)
        return np.array([self.reward.scores(image, some) for image, some in pairs])

    def statistics(self, add_up: Callable[[Sequence[float]], Sequence[float]]) -> dict[str, float]:
        """Return means since the last call: CIDEr-D (1 is what papers print as 100), and tokens."""
        sums = dict(zip(SUMS, add_up(self._sums.tolist()), strict=True))
        self._sums[:] = 0
        count = max(sums["samples"], 1)
        return {
            "reward": sums["reward"] / count,
            "sample_length": sums["tokens"] / count,
            "unfinished_share": sums["unfinished"] / count,
        }


def others_mean(rewards_bk: np.ndarray) -> np.ndarray:
    """Return for each sample the mean reward of the K - 1 others of its image [B, K]."""
    return (rewards_bk.sum(1, keepdims=True) - rewards_bk) / (rewards_bk.shape[1] - 1)


def seed_of(seed: int, step: int, number: int) -> int:
    """Return a seed for one of several random streams of a step."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


OBJECTIVES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy, "scst": SelfCritical}
