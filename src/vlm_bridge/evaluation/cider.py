"""CIDEr-D of single captions against document frequencies that are fixed: a reward that training can ask for.

pycocoevalcap counts in how many images of the very collection that it scores a phrase occurs. A reward needs these
counts once, from the training split, and then scores a few captions at a time, thousands of times.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vlm_bridge.evaluation.metrics import JavaError, ptb_tokenize

MAX_N = 4
SIGMA = 6.0
"""Longest phrase in words, and width of the length penalty, of CIDEr-D (Vedantam et al. 2015)."""
Phrase = tuple[str, ...]

# A clitic is a token of its own ("do n't", "dog 's"); words keep their inner hyphens, numbers their inner marks.
_TOKEN = re.compile(
    r"(?P<can>can)(?=not\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\w+?(?=n't\b)|\w+(?:(?!'(?:s|re|ve|ll|d|m)\b)[-'&]\w+|(?<=\d)[.,:/]\d+)*"
)


def caption_tokens(sentence: str) -> str:
    """Tokens in lower case without punctuation, joined by blanks: a cheap rule that agrees with PTB on captions.

    It parts clitics as PTB does (`n't`, `'s`); of PTB's other habits (abbreviations, fractions, brackets) it knows
    nothing. The same tokens as `ptb_tokenize` for 99.9% of Flickr8k's 30,000 training captions.
    """
    return " ".join(
        match.group() for match in _TOKEN.finditer(sentence.lower().replace("\u2019", "'"))
    )


def reference_tokens(captions: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """Tokens of human captions by PTB, or by `caption_tokens` where there is no Java; ``say`` is told then."""
    try:
        return ptb_tokenize(captions)
    except JavaError as error:
        say(f"references are tokenized by a simple rule, not by PTB: {error}")
        return [caption_tokens(caption) for caption in captions]


@dataclass(frozen=True)
class _Vector:
    """A sentence as tf-idf weights of its phrases, the norms of those of 1..4 words, and its number of word pairs."""

    weights: dict[Phrase, float]
    norms: list[float]
    length: int


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) of captions of a fixed set of images; pycocoevalcap's value for equal tokens.

    Document frequencies count all of the images; references become vectors when their image is asked for, which takes
    a fraction of a millisecond, while the vectors of all of COCO would fill gigabytes.

    Args:
        references: of each image its sentences, tokens joined by blanks.
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
        """The score of each caption (tokens joined by blanks) against all references of an image, up to 10."""
        references = [self._vector(sentence) for sentence in self.references[image]]
        return [self._score(self._vector(caption), references) for caption in captions]

    def _vector(self, sentence: str) -> _Vector:
        words = sentence.split()
        weights: dict[Phrase, float] = {}
        squares = [0.0] * MAX_N
        for phrase, count in Counter(_phrases(words)).items():
            frequency = self.document_frequency.get(phrase, 1)
            weight = weights[phrase] = count * (self._log_images - math.log(frequency))
            squares[len(phrase) - 1] += weight * weight
        # The length that the penalty compares is, as in the reference implementation, that of the list of pairs.
        return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(words) - 1))

    def _score(self, caption: _Vector, references: Sequence[_Vector]) -> float:
        total = 0.0
        for reference in references:
            similarity = [0.0] * MAX_N
            of_reference = reference.weights
            for phrase, weight in caption.weights.items():
                if phrase in of_reference:
                    other = of_reference[phrase]
                    similarity[len(phrase) - 1] += min(weight, other) * other
            penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
            for value, norm, other_norm in zip(
                similarity, caption.norms, reference.norms, strict=True
            ):
                if norm and other_norm:
                    total += penalty * value / (norm * other_norm)
        return 10.0 * total / (MAX_N * len(references))


def _phrases(words: Sequence[str]) -> list[Phrase]:
    """All runs of 1 to `MAX_N` words, as often as they occur."""
    return [
        tuple(words[start : start + n])
        for n in range(1, MAX_N + 1)
        for start in range(len(words) - n + 1)
    ]
