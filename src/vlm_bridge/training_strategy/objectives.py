"""Objectives: cross-entropy of human captions, and self-critical sequence training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from vlm_bridge.metrics.tokens import reference_tokens, simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.generation import Caption
from vlm_bridge.training_strategy.validation import Features, LoadedBatch, batch_loss, load_batch

# Ends references and finished samples. Without it, training learns to break off.
END = "</s>"
SUMS = ("samples", "reward", "baseline", "surprise", "tokens", "unfinished")
AddUp = Callable[[Sequence[float]], Sequence[float]]


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
        del step, number
        return batch

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        """Return the loss summed over supervised tokens."""
        return batch_loss(self.model, batch, self.recipe.label_smoothing).total

    def statistics(self, add_up: AddUp) -> dict[str, float]:
        """Return means since the last call; ``add_up`` sums over processes."""
        del add_up
        return {}

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        del state


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
            num_beams=1,
            max_new_tokens=self.recipe.decode.max_new_tokens,
            do_sample=True,
            temperature=self.recipe.scst_temperature,
        )
        self._sums: dict[str, Any] = dict.fromkeys(SUMS, 0.0)

    def load(self, rows: Sequence[Row], features: Features) -> ImageBatch:
        images = np.array([row.image for row in rows])
        values = torch.as_tensor(features[images]).contiguous()
        return ImageBatch(images, DeviceCopy([values], self.model.device))

    def captions(self, batch: ImageBatch, step: int, number: int) -> LoadedBatch:
        """Sample captions of a batch of images, one row an image."""
        model = self.model
        (values,) = batch.tensors.wait()
        features_bnd = model.features(values)
        seed = int(np.random.SeedSequence([self.recipe.seed, step, number]).generate_state(1)[0])
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
        samples = self._with_ends(captions)
        rewards_bk = self._rewards(batch.images, samples)
        baselines_bk = others_mean(rewards_bk)
        self._add(
            samples=rewards_bk.size,
            reward=float(rewards_bk.sum()),
            baseline=float(baselines_bk.sum()),
            tokens=sum(map(len, samples)),
            unfinished=sum(not self._has_ended(ids) for ids in samples),
        )

        targets = [self.format.with_targets(ids) for ids in samples]
        starts = range(0, len(targets), self.num_samples)
        packed = pack_rows(
            batch.images.tolist(), [targets[start : start + self.num_samples] for start in starts]
        )
        arrays = (packed.input_ids, packed.labels, packed.segments, packed.supervised)
        tensors = [*map(torch.from_numpy, arrays), features_bnd]
        advantages = (rewards_bk - baselines_bk).ravel().astype(np.float32)
        weights = torch.from_numpy(np.repeat(advantages, list(map(len, samples)))).to(model.device)
        return LoadedBatch(packed, DeviceCopy(tensors, model.device), weights)

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        loss = batch_loss(self.model, batch)
        surprise = loss.token_losses.detach().double().sum()
        # A skipped step must not void the mean of the others.
        self._add(surprise=surprise.nan_to_num(posinf=0.0))
        return loss.total

    def statistics(self, add_up: AddUp) -> dict[str, float]:
        """Return means since the last call.

        Reward and baseline are CIDEr-D (1 is what papers print as 100). The entropy of a token in
        nats is an estimate from the samples. Lengths are in tokens with EOS.
        """
        sums = dict(zip(SUMS, add_up(list(self.state_dict().values())), strict=True))
        self._sums = dict.fromkeys(SUMS, 0.0)
        count = max(sums["samples"], 1)
        return {
            "reward": sums["reward"] / count,
            "baseline": sums["baseline"] / count,
            "entropy": sums["surprise"] / max(sums["tokens"], 1),
            "sample_length": sums["tokens"] / count,
            "unfinished_share": sums["unfinished"] / count,
        }

    def state_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._sums = {name: state[name] for name in SUMS}

    def _add(self, **values: Any) -> None:
        for name, value in values.items():
            self._sums[name] += value  # of a tensor: without waiting for the device

    def _rewards(self, images: np.ndarray, samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return CIDEr-D [B, K] of samples against the references of their image."""
        sentences = np.array_split([self._words(ids) for ids in samples], len(images))
        pairs = zip(images.tolist(), sentences, strict=True)
        return np.array([self.reward.scores(image, some) for image, some in pairs])

    def _with_ends(self, captions: Sequence[Caption]) -> list[list[int]]:
        """Return token ids with EOS, but for captions that were cut."""
        limit, eos = self._sampling.max_new_tokens, self.format.eos_id
        return [[*ids, eos] if len(ids) < limit else ids for ids, _ in captions]

    def _words(self, ids: Sequence[int]) -> str:
        (words,) = simple_tokenize([self.model.language_model.decode(list(ids))])
        return f"{words} {END}" if self._has_ended(ids) else words

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return ids[-1:] == [self.format.eos_id]


def others_mean(rewards_bk: np.ndarray) -> np.ndarray:
    """Return for each sample the mean reward of the K - 1 others of its image [B, K]."""
    return (rewards_bk.sum(1, keepdims=True) - rewards_bk) / (rewards_bk.shape[1] - 1)


OBJECTIVES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy, "scst": SelfCritical}
