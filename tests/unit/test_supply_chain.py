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
TOML = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PYPROJECT, UV = TOML["project"], TOML["tool"]["uv"]
LOCK = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
PINS = [line for line in LOCK.splitlines() if not line.startswith("#")]
LIMITS = re.findall(
    r"^\| [^|]+ \| ([\d,.]+) \| `([\w/]+\.py)` `(\w+)` \|$",
    (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def locked(name: str, python: str = "3.11", system: str = "Linux") -> str | None:
    """The version of a package that the lock has for a Python and a system."""
    platform = {"Linux": "linux", "Darwin": "darwin"}[system]
    machine = {"Linux": "x86_64", "Darwin": "arm64"}[system]
    environment = {
        "python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform, "os_name": "posix",
        "platform_system": system, "platform_machine": machine, "implementation_name": "cpython",
    }  # fmt: skip
    found = [
        next(iter(pin.specifier)).version
        for pin in map(Requirement, PINS)
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    assert len(found) < 2, f"{name} has several versions at once"
    return found[0] if found else None


def test_every_line_of_the_lock_is_one_exact_version_and_names_no_place() -> None:
    for pin in map(Requirement, PINS):
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None
        assert "+" not in specifier.version, f"{pin}: a local build fits no other machine"
    assert "://" not in LOCK and len(PINS) > 100
    assert not {"torchvision", "timm"} & {Requirement(pin).name for pin in PINS}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_the_lock_has_all_that_is_installed_in_versions_that_are_allowed(
    python: str, system: str
) -> None:
    extras = PYPROJECT["optional-dependencies"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (weights,) = re.findall(r"^WEIGHT_WHEELS := (.+)$", makefile, re.MULTILINE)
    needed = [*PYPROJECT["dependencies"], *weights.split(), "hatchling", "editables"]
    for extra in ("lite", "photos", "demo", "docs", "dev"):
        needed += extras[extra]
    for requirement in map(Requirement, needed):
        version = locked(requirement.name, python, system)
        assert version is not None, f"{requirement} is not locked: make lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} is locked at {version}: make lock"
        )


def test_the_default_source_and_the_default_system_need_no_extra() -> None:
    """`uv sync`, then `vlm-data` on GroundCap and `vlm-training` with its default recipe."""
    core = {Requirement(requirement).name for requirement in PYPROJECT["dependencies"]}
    assert {"torch", "transformers", "accelerate", "tensorboard", "pyarrow", "pillow"} <= core
    assert PYPROJECT["optional-dependencies"]["data"] == [], "the old name of what the core has now"


def test_uv_takes_the_versions_of_the_lock() -> None:
    assert UV["constraint-dependencies"] == PINS, "make lock writes both"


def test_pip_installs_from_the_lock_wherever_it_installs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^\$\(STAMP\):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    installations = [line for line in recipe.splitlines() if "pip install" in line]
    assert len(installations) == 3
    assert all("--constraint constraints.txt" in line for line in installations)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^pip install .*$", readme, re.MULTILINE):
        assert "--constraint constraints.txt" in line, line


def constant(module: Path, name: str) -> object:
    """The literal that a module or one of its classes assigns to a name; without an import."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
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
        path
        for path in PACKAGE.rglob("*.py")
        if "trust_remote_code" in path.read_text(encoding="utf-8")
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
    sources = [
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {f"vlm_bridge/{path.relative_to(PACKAGE).as_posix()}" for path in sources}
    expected |= {
        f"vlm_bridge/config/{path.name}" for path in (REPOSITORY / "config").glob("*.yaml")
    }
    expected.add("vlm_bridge/constraints.txt")
    assert "vlm_bridge/py.typed" in expected
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - information == expected
    assert any(name.endswith("licenses/LICENSE") for name in information)
