"""Naming objects in captions that the training captions never named.

After Flickr8k, a bridge calls a cat "a young boy". But the encoder was trained on a thousand kinds
of objects, and the language model knows the words for them. Decoding under lexical constraints
combines the two (Anderson et al. 2017, "Guided open vocabulary image captioning with constrained
beam search"). The constraint here is soft: naming the object once is worth a bonus.
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
from vlm_bridge.model_architecture.vision_encoder import EfficientNetLiteEncoder

SURE = 0.5  # probability from which on an object is named
# Alternative names of an object as tokens: `` cat`` or `` cats``; empty to name nothing.
Names = Sequence[tuple[int, ...]]


class ObjectNamer:
    """Finds the object in an image by the encoder's ImageNet classifier, and its name as tokens.

    Classes that share a name are one object, such as the breeds of cats.

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
        forms = [f" {form}" for name in self._objects for form in (name, plural(name))]
        tokens = [tuple(ids) for ids in language_model.encode_all(forms)]
        self._names: list[Names] = list(zip(tokens[::2], tokens[1::2], strict=True))

    def check(self, known: Collection[str]) -> None:
        """Raise ConfigurationError for a known name that no class has."""
        if strange := sorted(set(known) - set(self._objects)):
            raise ConfigurationError(
                f"decode.known_objects: no class is called {', '.join(strange)} "
                "(`python -m benchmarks.known_objects` lists names)"
            )

    @torch.no_grad()
    def __call__(self, features_bnd: torch.Tensor, known: Collection[str] = ()) -> list[Names]:
        """Name the object in each image of features [B, N, D], if it is sure and not ``known``."""
        self.check(known)
        pooled_bd = features_bnd[..., self._channels].float().mean(1).cpu()
        probabilities_bo = self._classifier(pooled_bd).softmax(-1) @ self._members
        likeliest, objects = probabilities_bo.max(-1)
        return [
            self._names[index] if probability >= SURE and self._objects[index] not in known else []
            for probability, index in zip(likeliest.tolist(), objects.tolist(), strict=True)
        ]


class ObjectBonus(LogitsProcessor):
    """Adds a bonus to the score of a caption that begins to name the object of its image.

    A name is rewarded once, and its further tokens are enforced. The first token of a caption gets
    no bonus, since a name follows an article.

    Args:
        names: of each image; captions of an image are side by side.
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
        per_image = len(input_ids) // len(self.names)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            names, caption = self.names[row // per_image], tuple(ids)
            if any(
                caption[at : at + len(name)] == name for name in names for at in range(len(ids))
            ):
                continue
            follows = {
                name[length]
                for name in names
                for length in range(1, len(name))
                if caption[-length:] == name[:length]
            }
            if follows:
                allowed = scores[row, sorted(follows)].clone()
                if not torch.isneginf(allowed).all():  # a forbidden repetition stays forbidden
                    scores[row] = -torch.inf
                    scores[row, sorted(follows)] = allowed
            else:
                scores[row, sorted({name[0] for name in names})] += self.bonus
        return scores


@cache
def imagenet_objects() -> dict[int, str]:
    """Return names of ImageNet's classes in captions, by number; some are never mentioned."""
    table = resources.files("vlm_bridge.model_architecture") / "imagenet_objects.txt"
    names = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            classes, name = line.split(" ", 1)
            first, _, last = classes.partition("-")
            names.update(dict.fromkeys(range(int(first), int(last or first) + 1), name))
    return names


def plural(name: str) -> str:
    """Return a name with its noun in the plural: `cups of coffee`."""
    noun, of, rest = name.partition(" of ")
    if noun.endswith(("s", "x", "ch", "sh")):
        noun += "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ies"
    else:
        noun += "s"
    return f"{noun}{of}{rest}"


def _classifier_of(encoder: Any) -> tuple[slice, nn.Linear]:
    """Return the channels of the features that the first classifier reads, and the classifier."""
    end = 0
    for part in getattr(encoder, "encoders", [encoder]):
        end += part.embed_dim
        is_lite = isinstance(part, EfficientNetLiteEncoder)
        if is_lite and (classifier := part.classifier()) is not None:
            return slice(end - classifier.in_features, end), classifier
    raise ConfigurationError(
        "decode.object_bonus needs a vision encoder that classifies: an EfficientNet-Lite whose "
        "last layer is among vision_encoder.layers; set it to 0"
    )
