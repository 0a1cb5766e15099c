"""Cleaning captions."""

from __future__ import annotations

import pytest

from vlm_bridge.data_pipeline.captions import clean_caption

SENTENCES = [
    ("A black dog is running in the snow .", "A black dog is running in the snow."),
    ("black dog chasing brown dog", "Black dog chasing brown dog."),
    ('" A man with a hat . "', "A man with a hat."),
    ('A sign says " STOP " .', 'A sign says "STOP".'),
    ('A man wearing a " shirt .', "A man wearing a shirt."),
    ("the dog 's ball , and the cat do n't care !", "The dog's ball, and the cat don't care."),
    ("Two men ( one tall ) walk ...", "Two men (one tall) walk."),
    ("  A\tdog\nruns\x00 .", "A dog runs."),
    ("école", "École."),
    ("3 dogs .", "3 dogs."),
    (". , !", ""),
    ('" "', ""),
    ("a dog ' 's toy", "A dog s toy."),
    ('"?dog".', "Dog."),
    ('cafe"\u0301 there', "Caf\u00e9 there."),
    ("", ""),
]


@pytest.mark.parametrize(("text", "cleaned"), SENTENCES)
def test_sentence_style(text: str, cleaned: str) -> None:
    assert clean_caption(text, "sentence") == cleaned


@pytest.mark.parametrize("style", ["sentence", "raw"])
@pytest.mark.parametrize("text", [text for text, _ in SENTENCES])
def test_cleaning_twice_changes_nothing_more(text: str, style: str) -> None:
    once = clean_caption(text, style)
    assert clean_caption(once, style) == once


def test_raw_style_keeps_wording_and_punctuation() -> None:
    assert clean_caption(' a dog ,  " running "\n', "raw") == 'a dog , " running "'
    assert clean_caption("cafe\u0301", "raw") == "caf\u00e9"
    assert clean_caption("\ufeffa\u200b dog\x07", "raw") == "a dog"
