"""What is installed and what is released: pinned packages, the wheel's content, and numbers that SECURITY.md gives."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "vlm_bridge"
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (REPOSITORY / "constraints-ci.txt").read_text(encoding="utf-8")
PINNED = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", LOCK, re.MULTILINE)
VERSIONS = {canonicalize_name(name): version for name, version, _ in PINNED}
LIMITS = re.findall(
    r"^\| [^|]+ \| ([\d,.]+) \| `([\w/]+\.py)` `(\w+)` \|$",
    (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_line_of_the_lock_is_a_pinned_package_with_its_hashes() -> None:
    rest = LOCK
    for name, version, hashes in PINNED:
        rest = rest.replace(f"{name}=={version}{hashes}\n", "")
    assert all(line.startswith("#") for line in rest.splitlines())
    assert "://" not in LOCK and len(VERSIONS) == len(PINNED) > 50


def test_the_lock_has_all_that_ci_needs_in_versions_that_are_allowed() -> None:
    extras = PYPROJECT["optional-dependencies"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (weights,) = re.findall(r"^WEIGHT_WHEELS := (.+)$", makefile, re.MULTILINE)
    (installed,) = re.findall(
        r"--editable '\.\[([\w,]+)\]' --constraint constraints\.txt\n.*WEIGHT", makefile
    )
    needed = [*PYPROJECT["dependencies"], *weights.split(), "hatchling", "editables"]
    for extra in installed.split(","):
        needed += extras[extra]
    for text in needed:
        requirement = Requirement(text)
        version = VERSIONS.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not locked: make lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{text} is locked at {version}: make lock"
        )
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([\w-]+)==(\S+)$", constraints, re.MULTILINE):
        assert VERSIONS[name].split("+")[0] == version


def constant(module: Path, name: str) -> object:
    """The literal that a module or one of its classes assigns to a name; without an import."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pairs = [(node.targets[0], node.value)]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            assert isinstance(node.targets[0], ast.Tuple)
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Name) and target.id == name:
                return ast.literal_eval(value)
    raise AssertionError(f"{module.name} has no constant {name}")


@pytest.mark.parametrize(("number", "module", "name"), LIMITS, ids=lambda part: part)
def test_the_limits_of_the_security_page_are_the_codes(number: str, module: str, name: str) -> None:
    assert ast.literal_eval(number.replace(",", "")) == constant(PACKAGE / module, name)


def test_the_security_page_lists_limits_and_remote_code_is_never_trusted() -> None:
    assert len(LIMITS) >= 15
    assert not [
        path for path in PACKAGE.rglob("*.py") if "trust_remote_code" in path.read_text(encoding="utf-8")
    ]


def test_the_wheel_has_the_package_its_types_and_the_recipes_and_no_tests(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is in the extra dev")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {f"vlm_bridge/{path.relative_to(PACKAGE).as_posix()}" for path in sources}
    expected |= {f"vlm_bridge/config/{path.name}" for path in (REPOSITORY / "config").glob("*.yaml")}
    assert "vlm_bridge/py.typed" in expected
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - information == expected
    assert any(name.endswith("licenses/LICENSE") for name in information)
