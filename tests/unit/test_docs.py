"""README.md and the docs site: pages, links, commands and names of the API are there."""

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

from readme import FILES as README_AND_DOCS
from readme import PROGRAMS, REPOSITORY, code_blocks, documented_commands, shell_commands
from vlm_bridge.cli.main import app
from vlm_bridge.configuration import Recipe, find_recipe, load_recipe

DOCS = REPOSITORY / "docs"
FILES = [REPOSITORY / "CONTRIBUTING.md", *README_AND_DOCS]
PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
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
    assert sorted(pages(site["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Return the ids that Python-Markdown gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_lead_to_files_and_headings(file: Path) -> None:
    text = without_code(PAGES[file.name])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        assert target.exists(), link
        if file.parent == DOCS:
            assert target.resolve().is_relative_to(DOCS), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def commands(page: str) -> Iterator[list[str]]:
    """Yield our commands in the shell blocks of a page, and in its running text."""
    yield from documented_commands(page)
    for code in re.findall(r"`((?:vlm-bridge|vlm-data|vlm-training)\b[^`]*)`", without_code(page)):
        yield shlex.split(code)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words call, and the words behind it."""
    command, rest = typer.main.get_command(app), [*PROGRAMS[words[0]], *words[1:]]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "...":  # any command
            break
        assert name in command.commands, f"no command {name}: {shlex.join(words)}"  # type: ignore[attr-defined]
        command = command.commands[name]  # type: ignore[attr-defined]
    return command, rest


@pytest.mark.parametrize("name", PAGES)
def test_commands_options_recipes_and_scripts_exist(name: str) -> None:
    for words in commands(PAGES[name]):
        command, rest = command_of(words)
        known = {o for option in command.params for o in (*option.opts, *option.secondary_opts)}
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known | ANYWHERE, shlex.join(words)
        for word in rest:
            if word.startswith("config/"):
                assert (REPOSITORY / word).is_file(), shlex.join(words)
            if command.name == "train" and re.match(r"[a-z_.]+=", word):
                key = word.partition("=")[0].partition(".")[0]
                assert key in {*Recipe.model_fields, "output_dir"}, shlex.join(words)
    for module in re.findall(r"python -m (benchmarks\.\w+)", PAGES[name]):
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"\b((?:scripts|benchmarks)/\w+\.(?:sh|py|yaml))\b", PAGES[name]):
        assert (REPOSITORY / script).is_file(), script


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_shell_blocks_parse(name: str) -> None:
    for words in documented_commands(PAGES[name]):
        command, rest = command_of([word for word in words if word != "--debug"])
        parameters = command.make_context(words[0], rest).params
        if command.name == "train" and parameters.get("config"):
            lists = [value for value in parameters.values() if isinstance(value, list | tuple)]
            load_recipe(find_recipe(parameters["config"]), list(lists[0] if lists else ()))


@pytest.mark.parametrize("name", PAGES)
def test_options_of_scripts_and_benchmarks_are_in_their_source(name: str) -> None:
    common = (REPOSITORY / "benchmarks" / "harness.py").read_text(encoding="utf-8")
    for code in code_blocks(PAGES[name], "bash"):
        for words in shell_commands(code):
            if words[:2] == ["python", "-m"]:
                script, given = f"{words[2].replace('.', '/')}.py", words[3:]
            elif words[0] == "python" and words[1].startswith("scripts/"):
                script, given = words[1], words[2:]
            elif (REPOSITORY / "scripts" / words[0]).is_file():
                script, given = f"scripts/{words[0]}", words[1:]
            else:
                continue
            source = (REPOSITORY / script).read_text(encoding="utf-8") + common
            for option in (word for word in given if re.match(r"--?[a-z]", word)):
                # typer makes the option of a parameter's name.
                parameter = f"    {option.strip('-').replace('-', '_')}: "
                assert f'{option}"' in source or f"{option})" in source or parameter in source, (
                    option
                )


@pytest.mark.parametrize("name", NAMES)
def test_names_on_the_api_page_exist_and_are_documented(name: str) -> None:
    module, _, member = name.rpartition(".")
    thing = getattr(importlib.import_module(module), member, None) or importlib.import_module(name)
    documentation = (thing.__doc__ or "").strip()
    # dataclasses makes a docstring of the signature where there is none.
    assert documentation and not documentation.startswith(f"{member}(")


def test_names_that_examples_import_are_on_the_api_page() -> None:
    on_page = {name.rpartition(".")[2] for name in NAMES}
    for page in PAGES.values():
        for code in code_blocks(page, "python"):
            compile(code, "example", "exec")
            for imported in re.findall(r"^from vlm_bridge\S* import (.+)$", code, re.MULTILINE):
                assert {name.strip() for name in imported.split(",")} <= on_page, imported


def test_the_first_page_is_short() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
