"""Text from outside as plain values: whatever it holds, there is a value or one ValueError of one line.

JSON and YAML are harmless languages with harmful documents: nested until the parser's stack ends, aliases of aliases
that name a billion values in ten lines, escapes that are no characters.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import yaml

MAX_YAML_CHARACTERS = 100_000
"""A recipe has a few thousand; the parser, written in Python, takes about a second for so many."""
MAX_YAML_VALUES = 10_000
"""Values of a document once every alias is written out; a recipe has about a hundred."""
MAX_YAML_DEPTH = 50
MAX_LINE_BYTES = 1_000_000
"""A caption with its picture's name has a few hundred."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document. ValueError where it is none, nested without end, or not UTF-8."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string that can be written down: JSON's escapes can make half a character (``\\ud800``)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_yaml(text: str) -> Any:
    """The value of a YAML document of plain values (`yaml.safe_load`), if it is of a reasonable size.

    Raises:
        ValueError: not YAML, or more characters, values or levels than the limits of this module.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; at most {MAX_YAML_CHARACTERS:,} are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            # Before anything is made of it: merge keys (`<<`) write out their aliases.
            _check_size(root)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ArithmeticError, AttributeError, KeyError, TypeError, IndexError) as error:
        # What the parser's own conversions of odd dates, numbers and tags end in.
        raise ValueError(f"a value that cannot be read ({shown(str(error))})") from None


def _check_size(root: yaml.Node) -> None:
    """Raise ValueError for a document that is too large once its aliases are written out, or contains itself."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        key = id(node)
        if key in sizes:
            return sizes[key]
        if key in open_nodes:
            raise ValueError("an alias of what it stands in")
        if len(open_nodes) > MAX_YAML_DEPTH:
            raise ValueError(f"more than {MAX_YAML_DEPTH} levels")
        open_nodes.add(key)
        total = 1
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            total += sum(map(size, child)) if isinstance(child, tuple) else size(child)
        open_nodes.discard(key)
        sizes[key] = total
        if total > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES:,} values, aliases written out")
        return total

    size(root)


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long or deep."""
    if (
        isinstance(value, int) and value.bit_length() > 64
    ):  # Python refuses to write thousands of digits
        return f"an integer of {value.bit_length():,} bits"
    return _SHORT.repr(value)


def lines_of(path: Path) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (number from 1, offset in bytes, content) of each line of a file; None for the content of one too long.

    No more than ``MAX_LINE_BYTES`` are in memory, however long a line is.
    """
    with path.open("rb") as file:
        number = offset = 0
        while line := file.readline(MAX_LINE_BYTES):
            number, start, offset = number + 1, offset, offset + len(line)
            if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, start, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
                offset += len(line)
            yield number, start, None
