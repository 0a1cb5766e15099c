"""The repository keeps its own promises: recipes parse, documented commands exist, imports point one way."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.main

from readme import PROGRAMS, README, code_blocks, documented_commands

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "vlm_bridge"
RECIPES = sorted((REPOSITORY / "config").glob("*.yaml"))
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
COMMANDS = list(documented_commands(README))


def parse(words: list[str]) -> tuple[str, dict[str, object]]:
    """Parse a command line as the program would and run nothing; return the command's name and parameters."""
    from vlm_bridge.cli.main import app

    program, *arguments = words
    command = typer.main.get_command(app)
    arguments = [*PROGRAMS[program], *(word for word in arguments if word != "--debug")]
    context = command.make_context(program, arguments)
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, f"no command {name}"
        context = command.make_context(name, arguments, parent=context)
    return str(context.info_name), context.params


def private_names(tree: ast.Module) -> set[tuple[int, str]]:
    """Names with a leading underscore that a module takes from an object which is not its own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    own |= {node.attr for node in stored if isinstance(node.ctx, ast.Store)}
    return {
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and node.attr not in own
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def test_other_packages_are_used_by_their_public_names() -> None:
    """A release may rename what is private. EfficientNet-Lite's package is frozen, and one function takes it apart."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = {
            line
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "_take_apart"
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        found = {name for line, name in private_names(tree) if line not in allowed} - {
            "_exit"
        }  # os's is public
        assert not found, f"{path.name}: {sorted(found)}"


def test_no_protocol_of_generation_is_written_anew() -> None:
    """transformers may rename any of these within a minor release, as 5.24 did."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in ("GenerationMixin", "_reorder_cache", "prepare_inputs_for_generation"):
            assert name not in text, f"{path.name}: {name}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(recipe: Path) -> None:
    from vlm_bridge.configuration import load_recipe

    load_recipe(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_opens_with_its_cost_and_command(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    named = (f"--config config/{recipe.name}", f"vlm-bridge {recipe.stem}")
    assert any(command in header for command in named), "the first lines name the exact command"
    assert re.search(r"\b(minutes?|hours?)\b", header), "the first lines say how long it takes"
    assert re.search(r"\b[GM]i?B\b", header), "the first lines say how much memory it takes"


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_every_readme_command_is_understood(words: list[str]) -> None:
    name, parameters = parse(words)
    for value in parameters.values():
        if str(value).startswith("config/"):
            assert (REPOSITORY / str(value)).is_file(), (
                f"{shlex.join(words)} names a recipe that is not there"
            )
    if name == "train" and parameters.get("config"):
        from vlm_bridge.configuration import load_recipe

        overrides = next(
            (value for value in parameters.values() if isinstance(value, list | tuple)), ()
        )
        load_recipe(REPOSITORY / str(parameters["config"]), list(overrides))


def test_the_readme_shows_the_commands_that_matter() -> None:
    lines = [line.strip() for block in code_blocks(README, "bash") for line in block.splitlines()]
    assert "make quickstart" in lines
    assert "make test" in lines
    assert {words[0] for words in COMMANDS} == set(PROGRAMS)


def test_ci_runs_exactly_the_readme_test_command() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "make test"
    assert sum("make" in line for line in lines) == 1


def test_readme_python_blocks_compile() -> None:
    for block in code_blocks(README, "python"):
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [
        target
        for target in targets
        if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists()
    ]
    assert not missing


def test_command_line_starts_without_heavy_imports() -> None:
    program = (
        "import sys, vlm_bridge.cli.main\n"
        "heavy = 'torch transformers accelerate numpy scipy imagehash pycocoevalcap tensorboard'\n"
        "print(*sorted(set(heavy.split()) & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_python_m_is_the_program(run_cli) -> None:
    result = run_cli("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("vlm-bridge ")


# Rooms from the ground up: a room may import rooms of its own floor and below.
FLOORS = [
    {"errors", "files", "parsing", "credentials", "quantization", "device", "version",
     "runtime", "environment", "hub"},
    {"configuration", "metrics"},
    {"data_pipeline"},
    {"model_architecture"},
    {"formats"},
    {"training_strategy"},
    {"captioning"},
    {"evaluation"},
    {"finetuning", "quickstart", "doctor", "demo"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _imported_parts(module: Path) -> set[str]:
    """Parts of the package that a module imports, those for type checkers alone left out."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.module
            else []
        )
    ]
    return {name.split(".")[1] for name in names if name.startswith("vlm_bridge.")}


def test_imports_point_down() -> None:
    upward = set()
    for module in PACKAGE.rglob("*.py"):
        room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in _imported_parts(module) - {"__version__", "__init__"}:
            if FLOOR.get(name, -1) > FLOOR[room]:
                upward.add(f"{module.relative_to(PACKAGE)} imports {name}")
    assert not upward


def test_docstrings_describe_parameters_that_there_are() -> None:
    """One entry a parameter: the documentation of the API is made from them, and refuses others."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            section = re.search(
                r"^Args:\n((?: .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE
            )
            entries = re.findall(r"^ {4}(\S.*?):", section[1], re.MULTILINE) if section else []
            arguments = [*ast.walk(node.args)]
            names = {argument.arg for argument in arguments if isinstance(argument, ast.arg)}
            wrong += [
                f"{path.name}: {node.name}: {entry}" for entry in entries if entry not in names
            ]
    assert not wrong


def test_no_tracked_file_names_a_developer_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    # Somebody's home or build folder; paths that a container or a rented machine always has are fine.
    pattern = re.compile(rb"(?<![\w./~-])/(?:home|Users|work)/[\w.-]+")
    found = {
        f"{name}: {match.group().decode()}"
        for name in listing.stdout.split("\0")
        if name and (path := REPOSITORY / name).is_file()
        for match in pattern.finditer(path.read_bytes())
    }
    assert not found
