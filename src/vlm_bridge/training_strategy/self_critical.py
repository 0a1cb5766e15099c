"""Self-critical sequence training: samples of the model itself, weighed by how much better than a baseline they score.

The gradient of the expected reward is that of the samples' log-probability times their advantage (REINFORCE, Williams
1992; Rennie et al. 2017 for captions and CIDEr-D). Sampled captions are packed like human ones and go through the
same loss, in which the advantage of a caption is the weight of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from vlm_bridge import runtime
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import CaptionFormat, pack_rows
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.metrics.tokens import reference_tokens, simple_tokenize
from vlm_bridge.model_architecture.captioner import CaptionLoss, CaptionModel
from vlm_bridge.model_architecture.generation import Caption
from vlm_bridge.training_strategy.validation import Features, LoadedBatch

END = "</s>"
"""A token of the reward: references end with it, and samples that have ended. Without it a caption that breaks off in
"... with a" scores as if nothing were missing, and training learns to break off."""


@dataclass(frozen=True)
class ImageBatch:
    """Images [B] whose captions are still to be sampled, and their features or pixels on their way to the device."""

    images: np.ndarray
    tensors: runtime.DeviceCopy


def load_images(images: Sequence[int], features: Features, device: torch.device) -> ImageBatch:
    """Read the features of a step's images; may run in a thread, ahead of its step."""
    indices = np.asarray(images)
    return ImageBatch(
        indices, runtime.DeviceCopy([torch.as_tensor(features[indices]).contiguous()], device)
    )


class SelfCritical:
    """Samples captions, rewards them, and packs them as a batch with weights.

    Samples follow from (seed, step) alone, so that a resumed run draws what the interrupted one would have drawn.

    Args:
        images: the training split; document frequencies are those of its captions.
        autocast: what the model computes in.
    """

    def __init__(
        self,
        model: CaptionModel,
        recipe: Recipe,
        format: CaptionFormat,
        images: Sequence[CaptionedImage],
        autocast: Callable[[], Any],
        say: Callable[[str], object],
    ):
        self.model = model
        self.recipe = recipe
        self.format = format
        self.autocast = autocast
        tokens = iter(
            reference_tokens(list(chain.from_iterable(image.captions for image in images)))
        )
        self.reward = CiderD(
            [[f"{next(tokens)} {END}" for _ in image.captions] for image in images]
        )
        self._sampling = DecodeSettings(
            num_beams=1,
            max_new_tokens=recipe.decode.max_new_tokens,
            do_sample=True,
            temperature=recipe.scst_temperature,
        )
        self._forget()

    def sampled(self, batch: ImageBatch, step: int, number: int) -> LoadedBatch:
        """Captions of a batch of images, one row an image, each token weighed by its caption's advantage.

        Args:
            number: of the batch among those of the step.
        """
        recipe, model = self.recipe, self.model
        (values,) = batch.tensors.wait()
        features_bnd = model.features(values)
        seed = int(np.random.SeedSequence([recipe.seed, step, number]).generate_state(1)[0])
        was_training = model.training
        model.eval()
        with self.autocast():
            samples = self._with_ends(
                model.generate(
                    features_bnd,
                    self.format.prompt_ids,
                    self._sampling.replace(seed=seed),
                    recipe.scst_samples,
                    keys=range(len(features_bnd)),
                )
            )
        rewards_bk = self._rewards(batch.images, samples)
        baselines_bk = others_mean(rewards_bk)
        model.train(was_training)

        lengths = [len(ids) for ids in samples]
        self._remember(rewards_bk, baselines_bk, samples)
        captions = [self.format.with_targets(ids) for ids in samples]
        rows = [
            captions[start : start + recipe.scst_samples]
            for start in range(0, len(captions), recipe.scst_samples)
        ]
        packed = pack_rows(batch.images.tolist(), rows)
        arrays = (packed.input_ids, packed.labels, packed.segments, packed.supervised)
        tensors = [*map(torch.from_numpy, arrays), features_bnd]
        advantages = (rewards_bk - baselines_bk).ravel().astype(np.float32)
        weights = torch.from_numpy(np.repeat(advantages, lengths)).to(model.device)
        return LoadedBatch(packed, runtime.DeviceCopy(tensors, model.device), weights)

    def watch(self, loss: CaptionLoss) -> None:
        """Remember how likely the model finds the samples of a batch."""
        surprise = loss.token_losses.double().sum()
        self._surprise += surprise.nan_to_num(
            posinf=0.0
        )  # a step that is skipped shall not void the others' mean

    def statistics(
        self, add_up: Callable[[Sequence[float]], Sequence[float]] = tuple
    ) -> dict[str, float]:
        """Means since the last call: reward and baseline (CIDEr-D as papers' 100 is 1), the entropy of a token in nats
        as samples estimate it (too low where they are drawn at a temperature below 1), tokens a caption with EOS, and
        the share of captions that did not end.

        Args:
            add_up: makes sums of this process those of all.
        """
        num_samples, reward, baseline, surprise, num_tokens, num_unfinished = add_up(
            [
                self._num_samples,
                self._reward_sum,
                self._baseline_sum,
                self._surprise.item(),
                self._token_sum,
                self._num_unfinished,
            ]
        )
        count = max(num_samples, 1)
        statistics = {
            "reward": reward / count,
            "baseline": baseline / count,
            "entropy": surprise / max(num_tokens, 1),
            "sample_length": num_tokens / count,
            "unfinished_share": num_unfinished / count,
        }
        self._forget()
        return statistics

    def state_dict(self) -> dict[str, float]:
        """The sums that `statistics` will tell the means of; part of every checkpoint."""
        return {
            "samples": self._num_samples,
            "reward": self._reward_sum,
            "baseline": self._baseline_sum,
            "surprise": self._surprise.item(),
            "tokens": self._token_sum,
            "unfinished": self._num_unfinished,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._num_samples = int(state["samples"])
        self._reward_sum = state["reward"]
        self._baseline_sum = state["baseline"]
        self._surprise = torch.tensor(
            state["surprise"], dtype=torch.float64, device=self.model.device
        )
        self._token_sum = int(state["tokens"])
        self._num_unfinished = int(state["unfinished"])

    def _rewards(self, images: np.ndarray, samples: Sequence[Sequence[int]]) -> np.ndarray:
        """[B, K], the CIDEr-D of each sample against the references of its image."""
        per_image = len(samples) // len(images)
        sentences = [self._words(ids) for ids in samples]
        return np.array(
            [
                self.reward.scores(image, sentences[row * per_image : (row + 1) * per_image])
                for row, image in enumerate(images.tolist())
            ]
        )

    def _with_ends(self, captions: Sequence[Caption]) -> list[list[int]]:
        """Token ids with EOS, but of captions that were cut: only those are as long as they may be."""
        limit = self.recipe.decode.max_new_tokens
        return [[*ids, self.format.eos_id] if len(ids) < limit else ids for ids, _ in captions]

    def _words(self, ids: Sequence[int]) -> str:
        (words,) = simple_tokenize([self.model.language_model.decode(list(ids))])
        return f"{words} {END}" if self._has_ended(ids) else words

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return ids[-1:] == [self.format.eos_id]

    def _remember(
        self, rewards_bk: np.ndarray, baselines_bk: np.ndarray, samples: list[list[int]]
    ) -> None:
        self._num_samples += rewards_bk.size
        self._reward_sum += float(rewards_bk.sum())
        self._baseline_sum += float(np.broadcast_to(baselines_bk, rewards_bk.shape).sum())
        self._token_sum += sum(map(len, samples))
        self._num_unfinished += sum(not self._has_ended(ids) for ids in samples)

    def _forget(self) -> None:
        self._num_samples = self._token_sum = self._num_unfinished = 0
        self._reward_sum = self._baseline_sum = 0.0
        self._surprise = torch.zeros((), dtype=torch.float64, device=self.model.device)


def others_mean(rewards_bk: np.ndarray) -> np.ndarray:
    """[B, K], for each sample the mean reward of the K - 1 others of its image (Kool et al. 2019)."""
    return (rewards_bk.sum(1, keepdims=True) - rewards_bk) / (rewards_bk.shape[1] - 1)
