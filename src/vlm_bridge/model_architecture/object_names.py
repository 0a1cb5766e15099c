"""Naming objects that the training captions never named, by what the vision encoder was trained to recognise.

A bridge can say of a picture what captions taught it: after Flickr8k, a cat is "a young boy". But the encoder was
trained on a thousand kinds of things, and the language model knows the words for them. Decoding under lexical
constraints brings the two together (Anderson et al. 2017, "Guided open vocabulary image captioning with constrained
beam search"). The constraint here is soft: to name the object once is worth a bonus, and the rest of the caption is
the captioner's own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.vision_encoder import (
    EfficientNetLiteEncoder,
    PooledEncoder,
    SideBySideEncoder,
)

SURE = 0.5
"""Probability of an object from which on it is named."""

Names = Sequence[tuple[int, ...]]
"""Ways to name an object, any of which will do: `` cat`` or `` cats``, as tokens. None where nothing is to be named."""


class ObjectNamer:
    """Which object a picture shows, as the encoder's ImageNet classifier sees it, in the language model's tokens.

    Classes that share a name are one object: a cat is one whatever its breed.

    Raises:
        ConfigurationError: no part of the encoder has a classifier.
    """

    def __init__(self, vision_encoder: nn.Module, language_model: LanguageModel):
        self._channels, self._classifier = _classifier_of(vision_encoder)
        names = imagenet_objects()
        self._objects = sorted(set(names.values()))
        self._members = torch.zeros(self._classifier.out_features, len(self._objects))
        for index, name in names.items():
            self._members[index, self._objects.index(name)] = 1
        singulars = language_model.encode_all([f" {name}" for name in self._objects])
        plurals = language_model.encode_all([f" {plural(name)}" for name in self._objects])
        self._names: list[Names] = [
            [tuple(singular), tuple(plural)]
            for singular, plural in zip(singulars, plurals, strict=True)
        ]

    def check(self, known: Collection[str]) -> None:
        """Raise ConfigurationError where no class has a name that is given as known."""
        if strange := sorted(set(known) - set(self._objects)):
            raise ConfigurationError(
                f"decode.known_objects: no class is called {', '.join(strange)} "
                "(`python -m benchmarks.known_objects` lists names)"
            )

    @torch.no_grad()
    def __call__(self, features_bnd: torch.Tensor, known: Collection[str] = ()) -> list[Names]:
        """Names of the object in each of the pictures that features [B, N, D] are of.

        None where the classifier is not sure, or the object is ``known``.

        Raises:
            ConfigurationError: see `check`.
        """
        self.check(known)
        pooled_bd = features_bnd[..., self._channels].float().mean(1).cpu()
        probabilities_bo = self._classifier(pooled_bd).softmax(-1) @ self._members
        likeliest, objects = probabilities_bo.max(-1)
        return [
            self._names[index] if probability >= SURE and self._objects[index] not in known else []
            for probability, index in zip(likeliest.tolist(), objects.tolist(), strict=True)
        ]


class ObjectBonus(LogitsProcessor):
    """Adds a bonus to the score of a caption when it begins to name the object of its picture for the first time.

    A name of several tokens that has begun goes on to its end. The first token of a caption is left alone, since
    names stand behind something.

    Args:
        names: of each picture; captions of a picture stand beside each other.
        bonus: in nats.
        prompt_length: tokens before the caption.
    """

    def __init__(self, names: Sequence[Names], bonus: float, prompt_length: int):
        self.names = names
        self.bonus = bonus
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.prompt_length or not any(self.names):
            return scores
        scores = scores.clone()
        per_picture = len(input_ids) // len(self.names)
        for row, caption in enumerate(input_ids[:, self.prompt_length :].tolist()):
            names = self.names[row // per_picture]
            if any(_contains(caption, name) for name in names):
                continue
            if follows := _continuations(caption, names):
                allowed = scores[row, follows].clone()
                if not torch.isneginf(allowed).all():  # a repetition that is forbidden stays so
                    scores[row] = -torch.inf
                    scores[row, follows] = allowed
            else:
                scores[row, sorted({name[0] for name in names})] += self.bonus
        return scores


@cache
def imagenet_objects() -> dict[int, str]:
    """What a caption calls ImageNet's classes, by their numbers; without those that it would not mention."""
    table = (
        resources.files("vlm_bridge.model_architecture")
        .joinpath("imagenet_objects.txt")
        .read_text(encoding="utf-8")
    )
    names = {}
    for line in table.splitlines():
        if not line.startswith("#"):
            classes, name = line.split(" ", 1)
            first, _, last = classes.partition("-")
            names.update(dict.fromkeys(range(int(first), int(last or first) + 1), name))
    return names


def plural(name: str) -> str:
    """Of a name's noun: `cups of coffee`."""
    noun, of, rest = name.partition(" of ")
    if noun.endswith(("s", "x", "ch", "sh")):
        noun += "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ies"
    else:
        noun += "s"
    return f"{noun}{of}{rest}"


def _classifier_of(encoder: Any) -> tuple[slice, nn.Linear]:
    """The first classifier among an encoder's parts, and the channels of its features that it reads."""
    if isinstance(encoder, PooledEncoder):
        return _classifier_of(encoder.encoder)
    parts = encoder.encoders if isinstance(encoder, SideBySideEncoder) else [encoder]
    end = 0
    for part in parts:
        end += part.embed_dim
        if (
            isinstance(part, EfficientNetLiteEncoder)
            and (classifier := part.classifier()) is not None
        ):
            return slice(end - classifier.in_features, end), classifier
    raise ConfigurationError(
        "decode.object_bonus needs a vision encoder that classifies: an EfficientNet-Lite whose last layer is among "
        "vision_encoder.layers; set it to 0"
    )


def _contains(caption: Sequence[int], name: tuple[int, ...]) -> bool:
    return any(
        tuple(caption[start : start + len(name)]) == name
        for start in range(len(caption) - len(name) + 1)
    )


def _continuations(caption: Sequence[int], names: Names) -> list[int]:
    """The tokens with which a name that the caption ends in the middle of can go on."""
    return sorted(
        {
            name[length]
            for name in names
            for length in range(1, len(name))
            if tuple(caption[-length:]) == name[:length]
        }
    )
