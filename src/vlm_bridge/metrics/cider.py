"""CIDEr-D of single captions against fixed document frequencies, for self-critical training.

pycocoevalcap counts document frequencies in the collection that it scores; a reward has those of
the training split, and scores a few captions at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean
from typing import NamedTuple

SIGMA = 6.0  # width of the length penalty
Phrase = tuple[str, ...]


class _Vector(NamedTuple):
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
            self.document_frequency.update(set(chain.from_iterable(map(_phrases, sentences))))
        self._log_images = math.log(len(references))

    def scores(self, image: int, captions: Iterable[str]) -> list[float]:
        """Score captions (tokens joined by spaces) of an image, each from 0 to 10."""
        references = [self._vector(sentence) for sentence in self.references[image]]
        return [
            10 * fmean(_similarity(vector, reference) for reference in references)
            for vector in map(self._vector, captions)
        ]

    def _vector(self, sentence: str) -> _Vector:
        weights, squares = {}, [0.0] * 4
        for phrase, count in Counter(_phrases(sentence)).items():
            frequency = self.document_frequency.get(phrase, 1)
            weight = weights[phrase] = count * (self._log_images - math.log(frequency))
            squares[len(phrase) - 1] += weight**2
        # As in the reference implementation, the length penalty compares numbers of word pairs.
        return _Vector(weights, list(map(math.sqrt, squares)), max(0, len(sentence.split()) - 1))


def _similarity(caption: _Vector, reference: _Vector) -> float:
    products = [0.0] * 4
    for phrase, weight in caption.weights.items():
        other = reference.weights.get(phrase, 0.0)
        products[len(phrase) - 1] += min(weight, other) * other
    cosines = [
        product / (norm * other)
        for product, norm, other in zip(products, caption.norms, reference.norms, strict=True)
        if norm and other
    ]
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    return penalty * sum(cosines) / 4


def _phrases(sentence: str) -> list[Phrase]:
    """Return all n-grams of 1 to 4 words, repeated ones included."""
    words = sentence.split()
    return [tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)]
