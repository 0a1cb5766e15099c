"""What README.md tells people to type: its fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")

PROGRAMS = {"vlm-bridge": [], "vlm-data": ["data"], "vlm-training": ["train"]}
"""Our programs, and the `vlm-bridge` command that each of them is."""


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str


def fenced_blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks in their order; a block without a language has an empty one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    return [Block(*fence) for fence in fences]


def code_blocks(markdown: str, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return [block.code for block in fenced_blocks(markdown) if block.language == language]


def shell_commands(code: str) -> Iterator[list[str]]:
    """Yield every command of a shell block as words: `uv run`, folders of programs, pipes and comments removed."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                command.append(word)
                continue
            if command[:2] == ["uv", "run"]:
                command = command[2:]
            if command:
                yield [Path(command[0]).name, *command[1:]]
            command = []


def documented_commands(markdown: str) -> Iterator[list[str]]:
    """Yield the commands in the ```bash blocks that are ours."""
    for code in code_blocks(markdown, "bash"):
        yield from (words for words in shell_commands(code) if words[0] in PROGRAMS)
