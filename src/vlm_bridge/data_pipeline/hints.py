"""Words for an image's prompt: in training from its captions, where a classifier names them later.

As in OSCAR (Li et al. 2020) and Tag2Text (Huang et al. 2023): words from the captions are right, so
that a captioner learns to rely on them. Given a classifier's words, it learns to ignore them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_bridge.metrics import simple_tokenize

SHARE_WITHOUT = 0.5  # of captions, whose prompts stay empty as those of most images do
SHARE_SWAPPED = 0.5  # of objects in prompts: something else is then what the captions name
MIN_LENGTH = 3
# Frequent words of captions that name no object of ImageNet; those in -ing are left out too.
_NO_OBJECTS = """
    the and with are his her their its two three four five several many some one other another each
    both all group large small big little young old very while that this who which for from into
    onto over under near next through along around across behind front between during off out down
    has have been being there they them him she red blue white black green yellow brown orange pink
    purple gray grey dark bright colorful tan blond blonde wearing holds stands sits runs walks
    plays jumps rides looks sit stand play run walk jump ride look together outside inside dressed
    covered wears outdoors top side back edge high air mouth face man men woman women boy boys girl
    girls child children kid kids people person persons baby lady guy guys someone
"""
NO_OBJECTS = frozenset(_NO_OBJECTS.split())


def shared_words(captions: Sequence[str]) -> list[str]:
    """Return words for objects that at least two captions of an image have, sorted.

    Of one or two captions, one is enough.
    """
    counts = Counter(word for text in simple_tokenize(captions) for word in set(text.split()))
    least = 1 if len(captions) < 3 else 2
    return sorted(
        word
        for word, count in counts.items()
        if count >= least
        and len(word) >= MIN_LENGTH
        and word.isalpha()
        and not word.endswith("ing")
        if word not in NO_OBJECTS
    )


def draw_words(words: list[str], most: int, seed: Sequence[int]) -> list[str]:
    """Draw up to ``most`` of an image's words, or none for `SHARE_WITHOUT` of the seeds."""
    if not words or not most:
        return []
    random = np.random.default_rng(seed)
    if random.random() < SHARE_WITHOUT:
        return []
    count = min(len(words), int(random.integers(1, most + 1)))
    chosen = random.choice(len(words), count, replace=False).tolist()
    return [words[index] for index in chosen]


def swap_words(words: Sequence[str], names: Sequence[str], seed: Sequence[int]) -> dict[str, str]:
    """Draw another name for some words that are themselves names of objects.

    The image then shows one thing and its prompt names another, as with an object that no training
    image shows: the prompt is right.

    Returns:
        The name in the prompt -> the word of the captions.
    """
    if not words:
        return {}
    random = np.random.default_rng(seed)
    known, swapped = set(names), {}
    for word in words:
        if word in known and random.random() < SHARE_SWAPPED:
            swapped[names[int(random.integers(len(names)))]] = word
    return {name: word for name, word in swapped.items() if name not in words}


def in_prompt(words: Sequence[str], swapped: Mapping[str, str]) -> list[str]:
    """Return the words as the prompt names them."""
    shown = {word: name for name, word in swapped.items()}
    return [shown.get(word, word) for word in words]


def with_swapped(caption: str, swapped: Mapping[str, str]) -> str:
    """Return a caption that names what the prompt names."""
    for name, word in swapped.items():
        article = "an" if name[0] in "aeiou" else "a"
        caption = re.sub(rf"\b(A|a)n? {re.escape(word)}\b", rf"\1{article[1:]} {name}", caption)
        caption = re.sub(rf"\b{re.escape(word)}\b", name, caption)
        start = re.escape(word.capitalize())
        caption = re.sub(rf"^{start}\b", name.capitalize(), caption)
    return caption


def swapped_back(text: str, swapped: Mapping[str, str]) -> str:
    """Return a caption with the words of the captions for the names of the prompt.

    A word that the prompt replaced, and that the caption has still, is no word any more.
    """
    for name, word in swapped.items():
        text = re.sub(rf"\b{re.escape(word)}\b", "_", text)
        text = re.sub(rf"\b{re.escape(name)}\b", word, text)
    return text
