"""The fenced blocks of a page, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
"""README.md and the pages of the documentation, by their names."""
PROGRAMS = {"vlm-bridge": [], "vlm-data": ["data"], "vlm-training": ["train"]}
"""Our programs, and the `vlm-bridge` command that each of them is."""


def fenced_blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, code) of the fenced blocks; a block may have no language."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def code_blocks(page: str, language: str) -> list[str]:
    return [code for block_language, code in fenced_blocks(page) if block_language == language]


def shell_commands(code: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block as words, without `uv run`, folders and comments."""
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


def documented_commands(page: str) -> Iterator[list[str]]:
    """Yield the commands in the ```bash blocks that are ours."""
    for code in code_blocks(page, "bash"):
        for words in shell_commands(code):
            if "-m" in words and words[words.index("-m") + 1] == "vlm_bridge":  # torchrun
                words = ["vlm-bridge", *words[words.index("-m") + 2 :]]
            if words[0] in PROGRAMS:
                yield words
