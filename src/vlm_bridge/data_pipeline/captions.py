"""Cleaning captions: the smallest edits that make text of many origins look like one author's sentences."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, get_args

CaptionStyle = Literal["sentence", "raw"]
CAPTION_STYLES: tuple[str, ...] = get_args(CaptionStyle)

MAX_CAPTION_CHARACTERS = 10_000
"""A longer text is no caption, and is set aside."""

_SPACE_BEFORE_CLOSING = re.compile(r"\s+([,.;:!?%)\]])")
_SPACE_AFTER_OPENING = re.compile(r"([(\[])\s+")
# Tokenised corpora part clitics from their word: "dog 's", "do n't", "they 're".
_PARTED_CLITIC = re.compile(r"\s+('(?:s|re|ve|ll|d|m)|n't)\b", re.IGNORECASE)
_QUOTE_LOOKALIKES = re.compile(r"``|''|[“”„«»]")
_SPACED_QUOTATION = re.compile(r'"\s*([^"]*?)\s*"')
_CLOSING_MARKS = " .,;:!?…-"


def clean_caption(text: str, style: CaptionStyle) -> str:
    """Return ``text`` cleaned; an empty string where no letter or digit is left.

    ``raw`` normalises Unicode (NFC) and white space and drops control characters. ``sentence`` also removes
    the spaces that tokenisation left around punctuation, drops stray quotes, and gives a capital first letter
    and exactly one closing full stop. Cleaning twice changes nothing more.
    """
    # Again, since what is taken away may let an accent meet its letter, or two apostrophes make a quotation mark.
    while (cleaned := _cleaned_once(text, style)) != text:
        text = cleaned
    return text if any(character.isalnum() for character in text) else ""


def _cleaned_once(text: str, style: CaptionStyle) -> str:
    text = _normalise(text)
    return _as_sentence(text) if style == "sentence" else text


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    # Newlines and tabs are control characters too, but they part words.
    kept = "".join(c for c in text if c.isspace() or not _is_noise(c))
    return " ".join(kept.split())


def _is_noise(character: str) -> bool:
    # Joiners and other format characters (Cf) stay, since some scripts need them; these two mean nothing.
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\ufeff\u200b"


def _as_sentence(text: str) -> str:
    text = _QUOTE_LOOKALIKES.sub('"', text)
    text = _drop_stray_quotes(text)
    text = _SPACED_QUOTATION.sub(r'"\1"', text)
    text = _PARTED_CLITIC.sub(r"\1", text)
    text = _SPACE_BEFORE_CLOSING.sub(r"\1", text)
    text = _SPACE_AFTER_OPENING.sub(r"\1", text)
    text = " ".join(text.split())
    text = _closed(text).lstrip(" .,;:!?-")
    first = 1 if text.startswith('"') else 0
    return text[:first] + text[first : first + 1].upper() + text[first + 1 :]


def _closed(text: str) -> str:
    """``text`` with one full stop for whatever marks end it, behind a closing quote.

    No regular expression: an anchored run of marks takes time in the cube of the marks that a caption is made of.
    """
    body = text.rstrip(_CLOSING_MARKS)
    if body.endswith('"'):
        return body[:-1].rstrip(_CLOSING_MARKS) + '".'
    return body + "."


def _drop_stray_quotes(text: str) -> str:
    """Remove double quotes that have no partner or that wrap the whole caption; keep quotations inside it."""
    if text.count('"') % 2:
        return text.replace('"', "")
    body = text.rstrip(" .")
    if text.count('"') == 2 and body.startswith('"') and body.endswith('"'):
        return text.replace('"', "")
    return text
