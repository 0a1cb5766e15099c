"""Clean captions, and remove and count their grounding tags."""

from __future__ import annotations

import random

import pytest

from vlm_bridge.data_pipeline.captions import clean_caption, strip_tags

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
    for style in ("sentence", "raw"):
        once = clean_caption(text, style)
        assert clean_caption(once, style) == once


def test_raw_style_keeps_wording_and_punctuation() -> None:
    assert clean_caption(' a dog ,  " running "\n', "raw") == 'a dog , " running "'
    assert clean_caption("cafe\u0301", "raw") == "caf\u00e9"
    assert clean_caption("\ufeffa\u200b dog\x07", "raw") == "a dog"


# Written text, and the text without tags.
CASES = {
    "no tag": ("A man walks.", "A man walks."),
    "object": ('<gdo class="person" person-0>The man</gdo> walks.', "The man walks."),
    "action": ('A man <gda class="run" person-0>runs</gda> fast.', "A man runs fast."),
    "location": ('He sits <gdl class="couch" couch-0>on the couch</gdl>.', "He sits on the couch."),
    "no ids": ('<gdo class="person">The man</gdo> walks.', "The man walks."),
    "class of two words": ('<gdo class="dining table" dining table-0>a table</gdo>', "a table"),
    "nested": (
        '<gdo class="person" person-0>The man <gda class="hold" person-0>holding <gdo class="cup" cup-0>a cup</gdo>'
        "</gda></gdo> smiles.",
        "The man holding a cup smiles.",
    ),
    "overlapping": ("<gdo a-0>the <gda b-0>big</gdo> dog</gda>", "the big dog"),
    "never closed": ('<gdo class="person" person-0>The man walks.', "The man walks."),
    "empty tag": ('A <gdo class="dog" dog-0></gdo> man.', "A man."),
    "opening without its end": ('<gdo class="person" person-0 The man</gdo> walks.', "The man walks."),
    "closing without its end": ("<gdo p-0>The man</gdo walks.", "The man walks."),
    "cut off in a class": ('A man and <gdo class="per', "A man and"),
    "cut off after the class": ('A man and <gdo class="person" person-', "A man and"),
    "cut off after the bracket": ("A man and a dog</", "A man and a dog"),
    "quote never closed": ('<gdo class="person person-0>The man</gdo> walks.', "The man walks."),
    "spaces inside": ('< gdo class = "person"  person-0 >The man</ gdo > walks.', "The man walks."),
    "no space before class": ('<gdoclass="person" person-0>The man</gdo>', "The man"),
    "over lines": ('<gdo class="person"\n  person-0>The\nman</gdo>\nwalks.', "The\nman walks."),
    "self-closing": ("A man <gdo/> walks.", "A man walks."),
    "space before a full stop": ("He holds <gdo c-0>a cup </gdo>.", "He holds a cup."),
    "possessive": ("<gdo p-0>the man</gdo>'s hat and <gdo p-1>hers</gdo> \u2019s", "the man's hat and hers\u2019s"),
    "plural outside": ("two <gdo dog-0 dog-1>dog</gdo>s and <gdo b-0>box</gdo>es", "two dogs and boxes"),
    "words with no space": ("a<gdo d-0>dog</gdo>runs", "a dog runs"),
    "sentence after a tag": ("He is <gda p-0>running.</gda><gdo p-1>She</gdo> waits.", "He is running. She waits."),
    "brackets": ("a cup (<gdo c-0> the red one </gdo>) falls", "a cup (the red one) falls"),
    "hyphen": ("a well-<gda p-0>dressed</gda> man", "a well-dressed man"),
    "entities": ("Tom &amp; Jerry&#39;s &quot;house&quot; &#x2014; big", "Tom & Jerry's \"house\" \u2014 big"),
    "escaped tag": ("&lt;gdo class=&quot;dog&quot; dog-0&gt;a dog&lt;/gdo&gt; runs", "a dog runs"),
    "escaped twice": ("&amp;lt;gdo dog-0&amp;gt;a dog&amp;lt;/gdo&amp;gt; runs", "a dog runs"),
    "no entity": ("R&B plays, cat&copy and &unknown; stay", "R&B plays, cat&copy and &unknown; stay"),
    "less than": ("5 < 6 and 7 > 3, or x<y", "5 < 6 and 7 > 3, or x<y"),
    "other markup": ("a <b>bold</b> <sign> stands", "a <b>bold</b> <sign> stands"),
    "nearly a tag": ("<gdansk> and <gdx> and <gd o> stay", "<gdansk> and <gdx> and <gd o> stay"),
    "arrow at the end": ("an arrow points left <", "an arrow points left <"),
    "only tags": ('<gdo class="person" person-0></gdo>', ""),
    "empty": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tags_go_and_text_stays(case: str) -> None:
    written, plain = CASES[case]
    assert strip_tags(written) == plain
    assert strip_tags(plain) == plain


def test_any_mixture_of_pieces_is_clean_after_one_pass() -> None:
    pieces = ["<gdo", ' class="person"', " person-0", ">", "</gdo>", "<gda x-1>", "the man", " ", "&lt;", "&gt;",
              "&amp;", "gdl", "<", "/", "'s", ".", "(", "</gd", "\n"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        once = strip_tags(text)
        assert strip_tags(once) == once, text


def test_a_hostile_caption_takes_no_time() -> None:
    for piece in ("<gdo ", "<gdo class=", "a-0 ", "< ", "</gdo", ' class="', "&lt;"):
        strip_tags("<gdo " + piece * 3000)
