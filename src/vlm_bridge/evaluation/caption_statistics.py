"""Statistics of captions: length, variety, repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlm_bridge.metrics import simple_tokenize

REPEATED = 3
"""Length of the n-grams that no caption should have twice, in words."""
PHRASE = 4


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of captions as simple tokens. Shares are fractions of all captions.

    Attributes:
        lengths: words of each caption.
        vocabulary: number of distinct words.
        distinct: distinct captions over captions.
        repeating: share with a trigram twice, or a word twice in a row.
        unfinished: share cut at the longest length allowed; None where that is unknown.
        phrases: most frequent 4-grams and the share of captions that have them.
    """

    lengths: tuple[int, ...]
    vocabulary: int
    distinct: float
    repeating: float
    unfinished: float | None
    phrases: tuple[tuple[str, float], ...]

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def caption_statistics(
    captions: Sequence[str], finished: Sequence[bool | None] = (), *, num_phrases: int = 8
) -> CaptionStatistics:
    """Count over at least one caption. ``finished``: whether each one ended, where known."""
    sentences = [sentence.split() for sentence in simple_tokenize(captions)]
    phrases = Counter(
        phrase for words in sentences for phrase in dict.fromkeys(_ngrams(words, PHRASE))
    )
    known = [end for end in finished if end is not None]
    total = len(sentences)
    return CaptionStatistics(
        lengths=tuple(map(len, sentences)),
        vocabulary=len({word for words in sentences for word in words}),
        distinct=len({tuple(words) for words in sentences}) / total,
        repeating=sum(map(_repeats, sentences)) / total,
        unfinished=known.count(False) / len(known) if known else None,
        phrases=tuple(
            (" ".join(phrase), count / total) for phrase, count in phrases.most_common(num_phrases)
        ),
    )


def _repeats(words: Sequence[str]) -> bool:
    ngrams = _ngrams(words, REPEATED)
    return len(set(ngrams)) < len(ngrams) or any(
        first == second for first, second in pairwise(words)
    )


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
