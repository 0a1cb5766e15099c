"""Objectives: cross-entropy of human captions, and self-critical sequence training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from vlm_bridge import runtime
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import CaptionFormat, Row, TokenizedImages, pack_rows
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.metrics.tokens import reference_tokens, simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.generation import Caption
from vlm_bridge.training_strategy.validation import Features, LoadedBatch, batch_loss, load_batch

END = "</s>"
"""Token at the end of references and of finished samples. Without it, training learns to break off."""
AddUp = Callable[[Sequence[float]], Sequence[float]]


@dataclass(frozen=True)
class ImageBatch:
    """Images [B] with their features or pixels on the way to the device, before captions are sampled."""

    images: np.ndarray
    tensors: runtime.DeviceCopy


Batch = LoadedBatch | ImageBatch


class Objective(Protocol):
    """What training minimizes.

    `load` runs in threads ahead of a step; `captions` and `loss` run within it.
    """

    def load(self, rows: Sequence[Row], features: Features) -> Batch: ...

    def captions(self, batch: Any, step: int, number: int) -> LoadedBatch:
        """Return the captions of micro-batch ``number`` of a step, of all processes."""
        ...

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        """Return the loss summed over supervised tokens."""
        ...

    def statistics(self, add_up: AddUp) -> dict[str, float]:
        """Return means since the last call; ``add_up`` sums over processes."""
        ...

    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class CrossEntropy:
    """Cross-entropy of human captions."""

    def __init__(
        self,
        model: CaptionModel,
        recipe: Recipe,
        format: CaptionFormat,
        images: Sequence[CaptionedImage],
        data: TokenizedImages,
        autocast: Callable[[], Any],
    ):
        del format, images, autocast
        self.model, self.data = model, data
        self.label_smoothing = recipe.label_smoothing

    def load(self, rows: Sequence[Row], features: Features) -> LoadedBatch:
        return load_batch(self.data.pack(rows), features, self.model.device)

    def captions(self, batch: LoadedBatch, step: int, number: int) -> LoadedBatch:
        del step, number
        return batch

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        return batch_loss(self.model, batch, self.label_smoothing).total

    def statistics(self, add_up: AddUp) -> dict[str, float]:
        del add_up
        return {}

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        del state


@dataclass
class _Sums:
    samples: float = 0.0
    reward: float = 0.0
    baseline: float = 0.0
    surprise: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    tokens: float = 0.0
    unfinished: float = 0.0

    def numbers(self) -> dict[str, float]:
        return {f.name: float(getattr(self, f.name)) for f in fields(self)}


class SelfCritical:
    """Self-critical sequence training (Rennie et al. 2017).

    Captions sampled from the model are rewarded by CIDEr-D with the document frequencies of the training
    split. Each token's loss is weighted by its caption's reward minus the mean reward of the image's other
    samples (Kool et al. 2019; Luo 2020). Samples are a function of (seed, step).
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
        del data
        self.model, self.format, self.autocast = model, format, autocast
        self.seed, self.num_samples = recipe.seed, recipe.scst_samples
        self.max_new_tokens = recipe.decode.max_new_tokens
        tokens = iter(reference_tokens(list(chain.from_iterable(i.captions for i in images))))
        self.reward = CiderD([[f"{next(tokens)} {END}" for _ in i.captions] for i in images])
        self._sampling = DecodeSettings(
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=recipe.scst_temperature,
        )
        self._sums = _Sums()

    def load(self, rows: Sequence[Row], features: Features) -> ImageBatch:
        images = np.array([row.image for row in rows])
        values = torch.as_tensor(features[images]).contiguous()
        return ImageBatch(images, runtime.DeviceCopy([values], self.model.device))

    def captions(self, batch: ImageBatch, step: int, number: int) -> LoadedBatch:
        """Sample captions of a batch of images, one row an image."""
        model = self.model
        (values,) = batch.tensors.wait()
        features_bnd = model.features(values)
        seed = int(np.random.SeedSequence([self.seed, step, number]).generate_state(1)[0])
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
        self._sums.samples += rewards_bk.size
        self._sums.reward += float(rewards_bk.sum())
        self._sums.baseline += float(baselines_bk.sum())
        self._sums.tokens += sum(map(len, samples))
        self._sums.unfinished += sum(not self._has_ended(ids) for ids in samples)

        targets = [self.format.with_targets(ids) for ids in samples]
        starts = range(0, len(targets), self.num_samples)
        packed = pack_rows(
            batch.images.tolist(), [targets[start : start + self.num_samples] for start in starts]
        )
        arrays = (packed.input_ids, packed.labels, packed.segments, packed.supervised)
        tensors = [*map(torch.from_numpy, arrays), features_bnd]
        advantages = (rewards_bk - baselines_bk).ravel().astype(np.float32)
        weights = torch.from_numpy(np.repeat(advantages, list(map(len, samples)))).to(model.device)
        return LoadedBatch(packed, runtime.DeviceCopy(tensors, model.device), weights)

    def loss(self, batch: LoadedBatch) -> torch.Tensor:
        loss = batch_loss(self.model, batch)
        surprise = loss.token_losses.detach().double().sum()
        # A skipped step must not void the mean of the others.
        self._sums.surprise = self._sums.surprise.to(surprise) + surprise.nan_to_num(posinf=0.0)
        return loss.total

    def statistics(self, add_up: AddUp) -> dict[str, float]:
        """Means since the last call.

        Reward and baseline are CIDEr-D (1 is what papers print as 100). The entropy of a token in nats is
        an estimate from the samples. Lengths are in tokens with EOS.
        """
        sums = add_up(list(self._sums.numbers().values()))
        samples, reward, baseline, surprise, tokens, unfinished = sums
        self._sums = _Sums()
        count = max(samples, 1)
        return {
            "reward": reward / count,
            "baseline": baseline / count,
            "entropy": surprise / max(tokens, 1),
            "sample_length": tokens / count,
            "unfinished_share": unfinished / count,
        }

    def state_dict(self) -> dict[str, float]:
        return self._sums.numbers()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        surprise = torch.tensor(state["surprise"], dtype=torch.float64)
        self._sums = _Sums(
            state["samples"],
            state["reward"],
            state["baseline"],
            surprise,
            state["tokens"],
            state["unfinished"],
        )

    def _rewards(self, images: np.ndarray, samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return CIDEr-D [B, K] of samples against the references of their image."""
        sentences = [self._words(ids) for ids in samples]
        return np.array(
            [
                self.reward.scores(image, of_image)
                for image, of_image in zip(
                    images.tolist(), np.array_split(sentences, len(images)), strict=True
                )
            ]
        )

    def _with_ends(self, captions: Sequence[Caption]) -> list[list[int]]:
        """Return token ids with EOS, but for captions that were cut."""
        limit, eos = self.max_new_tokens, self.format.eos_id
        return [[*ids, eos] if len(ids) < limit else ids for ids, _ in captions]

    def _words(self, ids: Sequence[int]) -> str:
        (words,) = simple_tokenize([self.model.language_model.decode(list(ids))])
        return f"{words} {END}" if self._has_ended(ids) else words

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return ids[-1:] == [self.format.eos_id]


def others_mean(rewards_bk: np.ndarray) -> np.ndarray:
    """Return for each sample the mean reward of the K - 1 others of its image [B, K]."""
    return (rewards_bk.sum(1, keepdims=True) - rewards_bk) / (rewards_bk.shape[1] - 1)


OBJECTIVES = {"cross_entropy": CrossEntropy, "scst": SelfCritical}
