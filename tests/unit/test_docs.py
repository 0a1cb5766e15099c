"""The docs site without building it: pages, links, commands and what the API page names are there."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from readme import PROGRAMS, README, code_blocks, documented_commands
from vlm_bridge.cli.main import app
from vlm_bridge.configuration import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
NAMES = re.findall(r"^::: (\S+)$", PAGES["api.md"], re.MULTILINE)
ANYWHERE = {"--help", "--debug"}
"""Options that every command takes; `--debug` is read before the commands are."""


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for value in inner for page in pages(value)]  # type: ignore[union-attr]

    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(site["nav"])) == sorted(PAGES)


# --- Links -------------------------------------------------------------------------------------------------


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """The ids that Python-Markdown gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    plain = [
        re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings
    ]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_pages_headings_and_pictures(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[name])):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        assert (DOCS / (file or name)).is_file(), link
        assert (DOCS / (file or name)).resolve().is_relative_to(DOCS), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(PAGES[file or name]), link


# --- Commands ----------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[list[str]]:
    """Our commands in the shell blocks of a page, and in its running text."""
    yield from documented_commands(page)
    for code in re.findall(r"`((?:vlm-bridge|vlm-data|vlm-training)\b[^`]*)`", without_code(page)):
        yield shlex.split(code)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words call, and the words behind it."""
    command, rest = typer.main.get_command(app), [*PROGRAMS[words[0]], *words[1:]]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "...":  # any command
            break
        assert name in command.commands, f"no command {name}: {shlex.join(words)}"  # type: ignore[attr-defined]
        command = command.commands[name]  # type: ignore[attr-defined]
    return command, rest


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_options_and_recipes_exist(name: str) -> None:
    keys = set(Recipe.model_fields)
    for words in commands(PAGES[name]):
        command, rest = command_of(words)
        known = {
            name for option in command.params for name in (*option.opts, *option.secondary_opts)
        }
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known | ANYWHERE, shlex.join(words)
        for word in rest:
            if word.startswith("config/"):
                assert (REPOSITORY / word).is_file(), shlex.join(words)
            if command.name == "train" and re.match(r"[a-z_.]+=", word):
                assert word.partition("=")[0].partition(".")[0] in keys, shlex.join(words)


@pytest.mark.parametrize("name", PAGES)
def test_benchmarks_and_scripts_that_are_named_exist(name: str) -> None:
    for module in re.findall(r"python -m (benchmarks\.\w+)", PAGES[name]):
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"\b((?:scripts|benchmarks)/\w+\.(?:sh|py|yaml))\b", PAGES[name]):
        assert (REPOSITORY / script).is_file(), script


# --- API ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_the_api_page_names_is_there_and_documented(name: str) -> None:
    module, _, member = name.rpartition(".")
    thing = getattr(importlib.import_module(module), member, None) or importlib.import_module(name)
    documentation = (thing.__doc__ or "").strip()
    assert documentation
    assert not documentation.startswith(f"{member}("), (
        "dataclasses writes that where there is no docstring"
    )


def test_what_the_examples_import_is_on_the_api_page() -> None:
    on_page = {name.rpartition(".")[2] for name in NAMES}
    for page in (README, *PAGES.values()):
        for code in code_blocks(page, "python"):
            for imported in re.findall(r"^from vlm_bridge\S* import (.+)$", code, re.MULTILINE):
                assert {name.strip() for name in imported.split(",")} <= on_page, imported
