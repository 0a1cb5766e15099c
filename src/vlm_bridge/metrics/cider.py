"""CIDEr-D of single captions against fixed document frequencies, for self-critical training.

pycocoevalcap counts document frequencies in the collection that it scores; a reward has those of
the training split, and scores a few captions at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_N = 4
SIGMA = 6.0  # width of the length penalty
Phrase = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """Tf-idf weights of a sentence's n-grams, their norms for n = 1..4, and its word pairs."""

    weights: dict[Phrase, float]
    norms: list[float]
    length: int


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) of captions for a fixed set of images.

    For equal tokens it equals pycocoevalcap's value. Vectors of references are made when needed:
    those of all of COCO would fill gigabytes.

    Args:
        references: per image its sentences, as tokens joined by spaces.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        self.references = references
        self.document_frequency: Counter[Phrase] = Counter()
        for sentences in references:
            self.document_frequency.update(
                {phrase for sentence in sentences for phrase in _phrases(sentence.split())}
            )
        self._log_images = math.log(len(references))

    def scores(self, image: int, captions: Iterable[str]) -> list[float]:
        """Score captions (tokens joined by spaces) of an image, each from 0 to 10."""
        references = [self._vector(sentence) for sentence in self.references[image]]
        return [
            10 * sum(_similarity(vector, reference) for reference in references) / len(references)
            for vector in map(self._vector, captions)
        ]

    def _vector(self, sentence: str) -> _Vector:
        words = sentence.split()
        weights: dict[Phrase, float] = {}
        squares = [0.0] * MAX_N
        for phrase, count in Counter(_phrases(words)).items():
            frequency = self.document_frequency.get(phrase, 1)
            weight = weights[phrase] = count * (self._log_images - math.log(frequency))
            squares[len(phrase) - 1] += weight * weight
        # As in the reference implementation, the length penalty compares numbers of word pairs.
        return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(words) - 1))


def _similarity(caption: _Vector, reference: _Vector) -> float:
    products = [0.0] * MAX_N
    for phrase, weight in caption.weights.items():
        if other := reference.weights.get(phrase):
            products[len(phrase) - 1] += min(weight, other) * other
    cosines = [
        product / (norm * other)
        for product, norm, other in zip(products, caption.norms, reference.norms, strict=True)
        if norm and other
    ]
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    return penalty * sum(cosines) / MAX_N


def _phrases(words: Sequence[str]) -> list[Phrase]:
    """Return all n-grams of 1 to `MAX_N` words, repeated ones included."""
    return [
        tuple(words[start : start + n])
        for n in range(1, MAX_N + 1)
        for start in range(len(words) - n + 1)
    ]
