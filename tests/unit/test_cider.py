"""CIDEr-D in process: pycocoevalcap's numbers, with document frequencies that are counted once."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_bridge.metrics import JavaError, ptb_tokenize
from vlm_bridge.metrics.cider import CiderD
from vlm_bridge.metrics.tokens import reference_tokens, simple_tokenize

WORDS = [chr(ord("a") + number) * 3 for number in range(20)]


def drawn_sentences(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 14))) for _ in range(count)]


def test_equals_the_reference_implementation() -> None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    sentences = drawn_sentences(90, seed=0)
    references = [
        sentences[start : start + size]
        for start, size in zip(range(0, 90, 5), [5, 3, 1] * 6, strict=True)
    ]
    captions = drawn_sentences(len(references), seed=1)
    captions[0], captions[1], captions[2] = references[0][0], "", "words that nobody wrote"
    scorer = CiderScorer()
    for caption, of_image in zip(captions, references, strict=True):
        scorer += (caption, of_image)
    _, expected = scorer.compute_score()
    cider = CiderD(references)
    ours = [cider.scores(image, [caption])[0] for image, caption in enumerate(captions)]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert ours[0] > 1
    assert ours[1] == ours[2] == 0


def test_frequencies_are_those_of_all_images_whatever_is_scored() -> None:
    references = [[sentence] for sentence in drawn_sentences(20, seed=2)]
    captions = drawn_sentences(4, seed=3)
    cider = CiderD(references)
    together = cider.scores(7, captions)
    assert together == [cider.scores(7, [caption])[0] for caption in captions]


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("A dog runs .", "a dog runs"),
        (
            "Two men (one old) don't look at the dog's T-shirt!",
            "two men one old do n't look at the dog 's t-shirt",
        ),
        ('They\u2019re at 10:30, in the "park" ...', "they 're at 10:30 in the park"),
        ("A girl can't stop; it isn't 1,000 people.", "a girl ca n't stop it is n't 1,000 people"),
        ("A dog , a cat and a man 's hat", "a dog a cat and a man 's hat"),
        ("", ""),
    ],
)
def test_the_cheap_rule_gives_the_tokens_of_ptb(sentence: str, tokens: str) -> None:
    assert simple_tokenize([sentence]) == [tokens]
    try:
        (by_ptb,) = ptb_tokenize([sentence])
    except JavaError as error:
        pytest.skip(f"the comparison with PTB needs Java: {error}")
    if "(" not in sentence:  # its brackets stay, as `-lrb-`
        assert by_ptb == tokens


def test_without_java_the_rule_stands_in_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert reference_tokens(["A dog's ball."]) == ["a dog 's ball"]
    assert len(caplog.messages) == 1
    assert "Java" in caplog.messages[0]
