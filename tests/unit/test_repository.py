"""Rules of the repository: recipes parse, imports point down, other packages' names are public."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from vlm_bridge.cli.main import app
from vlm_bridge.configuration import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "vlm_bridge"
PUBLIC = {"_asdict", "_exit", "_replace"}  # of os and of named tuples, documented
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted((REPOSITORY / "config").glob("*.yaml"))


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def private_names(tree: ast.Module) -> set[str]:
    """Return names with a leading underscore that a module takes from an object of others."""
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return {
        node.attr
        for node in attributes
        if re.match(r"_[a-z]", node.attr)
        and node.attr not in own
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def test_other_packages_are_used_by_their_public_names() -> None:
    """A release may rename what is private. EfficientNet-Lite's package is frozen."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "_take_apart":
                node.body = [ast.Pass()]
        assert not private_names(tree) - PUBLIC, path.name
        text = path.read_text(encoding="utf-8")
        for name in ("GenerationMixin", "_reorder_cache", "prepare_inputs_for_generation"):
            assert name not in text, f"{path.name}: {name} is an internal protocol of transformers"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses_and_opens_with_its_cost_and_command(recipe: Path) -> None:
    load_recipe(recipe)
    lines = recipe.read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    named = (f"--config config/{recipe.name}", f"vlm-bridge {recipe.stem}")
    assert any(command in header for command in named), "the command"
    assert re.search(r"\b(minutes?|hours?)\b", header), "the time"
    assert re.search(r"\b[GM]i?B\b", header), "the memory"


def test_ci_runs_exactly_the_readme_test_command() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "make test"
    assert sum("make" in line for line in lines) == 1


def test_command_line_starts_without_heavy_imports() -> None:
    program = (
        "import sys, vlm_bridge.cli.main\n"
        "import vlm_bridge.doctor, vlm_bridge.model_architecture.wheels\n"  # for `weights`
        "heavy = 'torch transformers accelerate numpy scipy imagehash pycocoevalcap tensorboard'\n"
        "print(*sorted(set(heavy.split()) & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "given", "found"),
    [
        ("vlm_bridge", {}, None),
        ("vlm_bridge.cli.main", {}, "10000"),
        ("vlm_bridge.cli.main", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("vlm_bridge.cli.main", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_only_the_commands_choose_how_threads_wait(
    module: str, given: dict[str, str], found: str | None
) -> None:
    kept = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = f"import os, {module}; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=kept | given, capture_output=True, text=True, check=True)
    assert result.stdout == f"{found}\n"


# Rooms from the ground up: a room may import rooms of its own floor and below.
FLOORS = [
    {"errors", "files", "parsing", "credentials", "device"},
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


def imported_rooms(tree: ast.Module) -> set[str]:
    """Return the rooms that a module imports, those for type checkers alone left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("vlm_bridge.")}


def test_imports_point_down() -> None:
    upward = set()
    for path, tree in modules():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            higher = {name for name in imported_rooms(tree) if FLOOR.get(name, -1) > FLOOR[room]}
            upward |= {f"{path.relative_to(PACKAGE)} imports {name}" for name in higher}
    assert not upward


def test_docstrings_describe_existing_parameters() -> None:
    """The documentation of the API is made from them, and refuses others."""
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            section = re.search(r"^Args:\n((?: .*\n?|\n)+)", docstring, re.MULTILINE)
            entries = re.findall(r"^ {4}(\S.*?):", section[1], re.MULTILINE) if section else []
            names = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
            wrong += [f"{path.name}: {node.name}: {e}" for e in entries if e not in names]
    assert not wrong


def test_no_tracked_file_names_a_developer_machine() -> None:
    command = ["git", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    # Somebody's home or build folder; paths that a container or a rented machine has are fine.
    pattern = re.compile(rb"(?<![\w./~-])/(?:home|Users|work)/[\w.-]+")
    files = (REPOSITORY / name for name in listing.stdout.split("\0") if name)
    found = [path for path in files if path.is_file() and pattern.search(path.read_bytes())]
    assert not found


def test_the_container_installs_what_is_tested_and_its_commands_exist() -> None:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    steps = [tuple(line.split(" ", 1)) for line in re.findall(r"(?m)^[A-Z]+ .*$", text)]
    installs = [step for name, step in steps if name == "RUN" and "pip install" in step]
    assert installs and all("--constraint constraints.txt" in step for step in installs)
    (extras,) = re.findall(r'"\.\[(.+)\]"', text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    copied = [path for name, step in steps if name == "COPY" for path in step.split()[:-1]]
    assert all((REPOSITORY / path).exists() for path in copied)
    assert SpecifierSet(PROJECT["requires-python"]).contains(
        re.findall(r"FROM python:([\d.]+)", text)[0]
    )
    last = dict(steps)
    assert last["USER"] != "root" and json.loads(last["ENTRYPOINT"]) == ["vlm-bridge"]
    commands = [json.loads(last["CMD"]), ["weights"]]
    commands += [
        line.split() for line in re.findall(r"(?m)^#   docker run .* vlm-bridge (\w.*)$", text)
    ]
    for name, *arguments in commands:
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_commits_are_checked_by_the_tools_of_make_lint() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    for hook in config["repos"][0]["hooks"]:
        program = hook["entry"].removeprefix(".venv/").removesuffix(" --force-exclude")
        assert f"$(BIN)/{program.removeprefix('bin/')}\n" in makefile


def test_the_citation_says_what_the_package_says() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    for key in ("version", "license", "keywords"):
        assert citation[key] == PROJECT[key]
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}] - {citation['date-released']}\n" in changes
    assert (citation["title"], citation["authors"]) == (PROJECT["name"], PROJECT["authors"])
