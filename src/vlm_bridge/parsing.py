"""Foreign JSON, YAML and lines as plain values within limits."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from vlm_bridge.errors import DataError

MAX_YAML_CHARACTERS = 100_000
MAX_YAML_ALIASES = 20  # aliases of aliases can name a billion values in ten lines
MAX_LINE_BYTES = 1_000_000  # a caption with its image's name has a few hundred

_ALIAS = re.compile(r"(?:^|[\s,:\[{])\*\w")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document. Raises ValueError if it is none, nested without end, or not UTF-8."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Parse a YAML document of plain values. Raises ValueError if it is none, or too large."""
    if len(text) > MAX_YAML_CHARACTERS or len(_ALIAS.findall(text)) > MAX_YAML_ALIASES:
        raise ValueError(f"over {MAX_YAML_CHARACTERS:,} characters or {MAX_YAML_ALIASES} aliases")
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # PyYAML's conversions of odd dates, numbers and tags raise the others.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether a value is a string without half characters (JSON's ``\\ud800``)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def shown(value: Any) -> str:
    """Return a value's `repr` for a message, cut where it is long or deep."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python writes no 5,000 digits
        return f"an integer of {value.bit_length():,} bits"
    return _SHORT.repr(value)


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each line; DataError where one is too long for a caption."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{path}:{number} is too long for a caption")
            yield number, line
