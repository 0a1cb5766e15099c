"""Objectives: cross-entropy of human captions, and self-critical sequence training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.features import Features
from vlm_bridge.data_pipeline.hints import (
    draw_words,
    in_prompt,
    shared_words,
    swap_words,
    swapped_back,
)
from vlm_bridge.data_pipeline.loader import (
    CaptionFormat,
    Row,
    hint_tokens,
    in_batches,
    pack_rows,
)
from vlm_bridge.device import to_device
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.generation import object_names
from vlm_bridge.training_strategy.data import Split
from vlm_bridge.training_strategy.validation import (
    LoadedBatch,
    batch_loss,
    evaluating,
    load_batch,
)

# Ends references and finished samples. Without it, training learns to break off.
END = "</s>"


# Images [B], and their features or pixels on the device, still without captions.
ImageBatch = tuple[np.ndarray, torch.Tensor]
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
        split: Split,
        autocast: Callable[[], Any],
    ):
        self.model, self.recipe, self.format = model, recipe, format
        self.split, self.autocast = split, autocast

    def load(self, rows: Sequence[Row], features: Features) -> Batch:
        """Start to copy the rows of a micro-batch to the device."""
        packed = self.split.captions.pack(rows, share_rows=self.model.bridge.shares_rows)
        return load_batch(packed, features, self.model.device)

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
        references = [image.captions for image in self.split.images]
        self.reward = CiderD([[f"{x} {END}" for x in simple_tokenize(some)] for some in references])
        self.num_samples = self.recipe.scst_samples
        self._names = object_names()
        self._sampling = DecodeSettings(
            max_new_tokens=self.recipe.decode.max_new_tokens,
            do_sample=True,
            temperature=self.recipe.scst_temperature,
        )
        self._count_and_rewards = np.zeros(2)

    def load(self, rows: Sequence[Row], features: Features) -> ImageBatch:
        images = np.array([row.image for row in rows])
        values = torch.as_tensor(features[images]).contiguous()
        (copied,) = to_device([values], self.model.device)
        return images, copied

    def captions(self, batch: ImageBatch, step: int, number: int) -> LoadedBatch:
        """Sample captions of a batch of images, one row an image."""
        images, values = batch
        features_bnd, seed = self.model.features(values), seed_of(self.recipe.seed, step, number)
        words, swapped = self._words(images, seed)
        hints = hint_tokens(words, self.format.encode_all)
        samples = self._sample(features_bnd, seed, hints)
        rewards_bk = self._rewards(images, samples, swapped)
        self._count_and_rewards += (rewards_bk.size, rewards_bk.sum())

        targets = [
            self.format.with_targets(ids, hints[index // self.num_samples])
            for index, ids in enumerate(samples)
        ]
        packed = pack_rows(images.tolist(), in_batches(targets, self.num_samples))
        arrays = (packed.input_ids, packed.labels, packed.segments, packed.supervised)
        advantages = (rewards_bk - others_mean(rewards_bk)).ravel().astype(np.float32)
        weights = torch.from_numpy(np.repeat(advantages, list(map(len, samples))))
        tensors = [*map(torch.from_numpy, arrays), features_bnd]
        device = self.model.device
        return LoadedBatch(packed, to_device(tensors, device), weights.to(device))

    def _words(self, images: np.ndarray, seed: int) -> tuple[list[list[str]], list[dict[str, str]]]:
        """Draw the words of each image's prompt, and what some of them stand for."""
        words, swapped = [], []
        for index in images.tolist():
            candidates = shared_words(self.split.images[index].captions)
            drawn = draw_words(candidates, self.recipe.prompt_words, [seed, index])
            names = swap_words(drawn, self._names, [seed, index, 1])
            words.append(in_prompt(drawn, names))
            swapped.append(names)
        return words, swapped

    def _sample(
        self, features_bnd: torch.Tensor, seed: int, hints: list[list[int]]
    ) -> list[list[int]]:
        """Return token ids with EOS, but for captions that were cut."""
        settings, eos = self._sampling.replace(seed=seed), self.format.eos_id
        keys, prompt = range(len(features_bnd)), self.format.prompt_ids
        with evaluating(self.model), self.autocast():
            captions = self.model.generate(
                features_bnd, prompt, settings, self.num_samples, keys, hints
            )
        limit = settings.max_new_tokens
        return [[*ids, eos] if len(ids) < limit else ids for ids, _ in captions]

    def _rewards(
        self,
        images: np.ndarray,
        samples: Sequence[Sequence[int]],
        swapped: Sequence[dict[str, str]],
    ) -> np.ndarray:
        """Return CIDEr-D [B, K] of samples against the references of their image."""
        words = simple_tokenize([self.model.language_model.decode(list(ids)) for ids in samples])
        words = [
            swapped_back(text, swapped[index // self.num_samples])
            for index, text in enumerate(words)
        ]
        sentences = [
            f"{text} {END}" if ids[-1] == self.format.eos_id else text
            for text, ids in zip(words, samples, strict=True)
        ]
        per_image = np.array_split(sentences, len(images))
        pairs = zip(images.tolist(), per_image, strict=True)
        return np.array([self.reward.scores(image, some) for image, some in pairs])

    def statistics(self, add_up: Callable[[Sequence[float]], Sequence[float]]) -> dict[str, float]:
        """Return the mean CIDEr-D since the last call; 1 is what papers print as 100."""
        count, rewards = add_up(self._count_and_rewards.tolist())
        self._count_and_rewards[:] = 0
        return {"reward": rewards / max(count, 1)}


def others_mean(rewards_bk: np.ndarray) -> np.ndarray:
    """Return for each sample the mean reward of the K - 1 others of its image [B, K]."""
    return (rewards_bk.sum(1, keepdims=True) - rewards_bk) / (rewards_bk.shape[1] - 1)


def seed_of(seed: int, step: int, number: int) -> int:
    """Return a seed for one of several random streams of a step."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


OBJECTIVES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy, "scst": SelfCritical}
