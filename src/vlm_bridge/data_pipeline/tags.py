"""Grounding tags in captions: taking them out so that plain sentences remain, and counting them.

GroundCap (Oliveira, Teodoro and de Matos, 2025, arXiv:2502.13898) ties phrases to detections::

    <gdo class="person" person-0>the man</gdo> <gda class="run" person-0>runs</gda> <gdl class="road" road-0>by</gdl>

The captions were written by a model: tags may be nested, cut short, never closed, or escaped as HTML.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import Any

import numpy as np

TAG_MEANINGS = {"gdo": "objects", "gda": "actions", "gdl": "locations"}

_CLASS = r"""\s*class\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_ID = r"[\w.-]*\w-\d+\b"
# A tag ends at its first ">". Where that is missing, only what can be nothing but class and ids goes with it; at the
# very end of a caption that was cut off, whatever there is of a tag.
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
_OPENING = re.compile(
    r"""<\s*(?P<kind>gd[oal])(?:\s*class\s*=\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"'>]+)))?""",
    re.IGNORECASE,
)
_IDS = re.compile(_ID)
# With a semicolon only: "R&B" and "cat&copy" are text.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]*);")
# An ampersand written as an entity, again and again: one step decodes them all.
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+")
# What belongs to the word before it, although a tag stands between: punctuation, clitics, a plural's ending.
_ENDING = re.compile(r"[,.;:!?%)\]}]|['\u2019](?:s|re|ve|ll|d|m)\b|(?<=>)e?s\b", re.IGNORECASE)


def strip_tags(text: str) -> str:
    """Return ``text`` without ``gdo``, ``gda`` and ``gdl`` tags, their words kept and HTML entities decoded.

    Words that only tags parted get a space between them; punctuation behind a tag moves up to its word. Any
    other ``<`` is text and stays, and so does other markup. Stripping twice changes nothing more.
    """
    # Again, since tags may hide in entities of entities, or come to light when others are gone.
    while (plain := _RUN_OF_TAGS.sub(_gap, _decode_entities(text))) != text:
        text = plain
    return text


class TagCounter:
    """Counts the tags of captions, one caption at a time."""

    def __init__(self) -> None:
        self._captions = 0
        self._unbalanced = 0
        self._tags: Counter[str] = Counter()
        self._classes: dict[str, Counter[str]] = {kind: Counter() for kind in TAG_MEANINGS}
        self._ids_per_tag: dict[str, Counter[int]] = {kind: Counter() for kind in TAG_MEANINGS}
        self._ids_per_caption: list[int] = []

    def add(self, caption: str) -> None:
        """Count the opening tags of one caption, and whether as many are closed."""
        self._captions += 1
        opened = closed = 0
        ids_of_caption: set[str] = set()
        for tag in _TAGS.findall(_decode_entities(caption)):
            opening = _OPENING.match(tag)
            if opening is None:
                closed += 1
                continue
            opened += 1
            kind = opening["kind"].lower()
            ids = _IDS.findall(tag, opening.end())
            ids_of_caption.update(ids)
            self._tags[kind] += 1
            self._classes[kind][
                (opening["double"] or opening["single"] or opening["bare"] or "(none)")
            ] += 1
            self._ids_per_tag[kind][len(ids)] += 1
        self._unbalanced += opened != closed
        if opened or closed:
            self._ids_per_caption.append(len(ids_of_caption))

    def summary(self, most_common: int = 10) -> dict[str, Any] | None:
        """Return the counts as plain data, None where no caption had a tag.

        For each kind: how many tags, how many classes and the most frequent of them as ``[class, count]``, and how
        many tags name 0, 1, 2 ... detections. ``ids_per_caption`` is the mean number of different detections.
        """
        tagged = len(self._ids_per_caption)
        if not tagged:
            return None
        return {
            "captions_with_tags": tagged,
            "captions_without_tags": self._captions - tagged,
            "captions_with_unbalanced_tags": self._unbalanced,
            "ids_per_caption": float(np.mean(self._ids_per_caption)),
            "kinds": {
                kind: {
                    "meaning": meaning,
                    "tags": self._tags[kind],
                    "per_caption": self._tags[kind] / self._captions,
                    "classes": len(self._classes[kind]),
                    "most_common": self._classes[kind].most_common(most_common),
                    "ids_per_tag": dict(sorted(self._ids_per_tag[kind].items())),
                }
                for kind, meaning in TAG_MEANINGS.items()
            },
        }


def _decode_entities(text: str) -> str:
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), _AMPERSANDS.sub("&", text))


def _gap(run: re.Match[str]) -> str:
    """Return what stands for a run of tags and the white space around them: nothing or one space."""
    text, (start, end) = run.string, run.span()
    before, after = text[start - 1 : start], text[end : end + 1]
    if not (start and after) or before in "([{" or _ENDING.match(text, end):
        return ""
    if _TAGS.sub("", run[0]):
        return " "
    return " " if after.isalnum() and (before.isalnum() or before in ",.;:!?") else ""
