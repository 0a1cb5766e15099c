"""Validation by real decoding: BLEU-4 and CIDEr of captions, while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch

from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.metrics import score_without_java
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.validation import Features

DECODE_BATCH = 16
"""Images decoded together."""


@dataclass(frozen=True)
class DecodedValidation:
    """Scores as fractions, on tokens of a simple rule: they follow a run and are not comparable with papers.

    CIDEr weighs words by the images it is given, so it compares within one run and one number of images only.
    """

    bleu4: float
    cider: float
    num_images: int

    def score(self, monitor: Literal["bleu4", "cider"]) -> float:
        return self.bleu4 if monitor == "bleu4" else self.cider


def decode_and_score(
    model: CaptionModel,
    prompt_ids: Sequence[int],
    images: Sequence[CaptionedImage],
    features: Features,
    decode: DecodeSettings,
    autocast: Callable[[], Any],
    world: World | None = None,
) -> DecodedValidation:
    """Caption the first images of a split and score them against all their references.

    Args:
        features: of the split, by image index; ``images`` are its first.
        world: the processes that share the batches of one, and all get the scores.
    """
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
