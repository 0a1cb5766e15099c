"""Clean captions: whitespace, punctuation, and the grounding tags of GroundCap.

GroundCap (Oliveira, Teodoro and de Matos, 2025, arXiv:2502.13898) ties phrases to detections::

    <gdo class="person" person-0>the man</gdo> <gda class="run" person-0>runs</gda>

A model wrote these captions: tags may be nested, cut short, never closed, or escaped as HTML.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Literal

CaptionStyle = Literal["sentence", "raw"]
MAX_CAPTION_CHARACTERS = 10_000  # longer ones are left as they are here, and then skipped

_QUOTE_LOOKALIKES = re.compile(r"``|''|[“”„«»]")
_SPACES = [
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    # Tokenized corpora separate clitics from their word: "dog 's", "do n't", "they 're".
    (re.compile(r"\s+('(?:s|re|ve|ll|d|m)|n't)\b", re.IGNORECASE), r"\1"),
    (re.compile(r"\s+([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[])\s+"), r"\1"),
]
_CLOSING_MARKS = " .,;:!?…-"

_CLASS = r"""\s*class\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_ID = r"[\w.-]*\w-\d+\b"
# A tag ends at its first ">". Without one, only class and ids go with it; at the end of a caption,
# any part of a tag does.
_TAG = rf"""(?:
    <\s* (?:/\s*)? gd[oal] (?:\b|(?=class\b)) (?:
        [^<>]* >
      | \s* (?:c|cl|cla|clas|class \s* (?:=\s*(?:["'][^"'<>]*)?)?) $
      | (?:{_CLASS})? (?:\s+{_ID})* (?:\s+[\w.-]*-$)?
    )
  | < (?:/(?:gd?)?|gd) $
)"""
_TAGS = re.compile(_TAG, re.IGNORECASE | re.VERBOSE)
_RUN_OF_TAGS = re.compile(rf"\s*{_TAG}(?:\s*{_TAG})*\s*", re.IGNORECASE | re.VERBOSE)
# With a semicolon only: "R&B" and "cat&copy" are text.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]*);")
# Text that belongs to the word before a tag: punctuation, clitics, a plural's ending.
_ENDING = re.compile(r"[,.;:!?%)\]}]|['\u2019](?:s|re|ve|ll|d|m)\b|(?<=>)e?s\b", re.IGNORECASE)


def clean_caption(text: str, style: CaptionStyle) -> str:
    """Return ``text`` cleaned; an empty string where no letter or digit is left.

    ``raw`` normalizes Unicode (NFC) and white space and drops control characters. ``sentence`` also
    removes the spaces that tokenization left around punctuation, drops stray quotes, and gives a
    capital first letter and exactly one full stop. Cleaning twice changes nothing more.
    """
    # Repeat: a removal may join an accent to its letter, or two apostrophes to a quotation mark.
    before = None
    while text != before:
        before, text = text, _normalize(text)
        text = _as_sentence(text) if style == "sentence" else text
    return text if any(map(str.isalnum, text)) else ""


def _normalize(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    # Newlines and tabs are control characters too, but they separate words. Joiners and other
    # format characters (Cf) stay: some scripts need them.
    noise = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cs") or c in "\ufeff\u200b"}
    return " ".join("".join(c for c in text if c.isspace() or c not in noise).split())


def _as_sentence(text: str) -> str:
    text = _QUOTE_LOOKALIKES.sub('"', text)
    body = text.rstrip(" .")
    is_around = text.count('"') == 2 and body.startswith('"') and body.endswith('"')
    if is_around or text.count('"') % 2:
        text = text.replace('"', "")
    for pattern, kept in _SPACES:
        text = pattern.sub(kept, text)
    # Not a regular expression: on a hostile caption of many marks it would take cubic time.
    body = " ".join(text.split()).rstrip(_CLOSING_MARKS)
    is_quoted = body.endswith('"')
    body = body[:-1].rstrip(_CLOSING_MARKS) + '".' if is_quoted else body + "."
    text = body.lstrip(" .,;:!?-")
    first = 1 if text.startswith('"') else 0
    return text[:first] + text[first : first + 1].upper() + text[first + 1 :]


def strip_tags(text: str) -> str:
    """Remove grounding tags, keep their words, and decode HTML entities.

    Words that only tags separated get a space between them. Punctuation behind a tag moves up to
    its word. Other markup stays. Stripping twice changes nothing more.
    """
    if len(text) > MAX_CAPTION_CHARACTERS:
        return text
    # Repeat: a tag may be escaped twice, or be complete only when another one is removed.
    while (plain := _RUN_OF_TAGS.sub(_gap, _decode_entities(text))) != text:
        text = plain
    return text


def _decode_entities(text: str) -> str:
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def _gap(run: re.Match[str]) -> str:
    """Return the replacement for a run of tags and white space: nothing or one space."""
    text, (start, end) = run.string, run.span()
    before, after = text[start - 1 : start], text[end : end + 1]
    if not (start and after) or before in "([{" or _ENDING.match(text, end):
        return ""
    if _TAGS.sub("", run[0]):
        return " "
    return " " if after.isalnum() and (before.isalnum() or before in ",.;:!?") else ""
