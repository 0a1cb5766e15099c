"""Pinned packages, the wheel's content, and the limits that SECURITY.md gives."""

from __future__ import annotations

import ast
import importlib
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
PROJECT = TOML["project"]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
LOCK = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
PINS = [line for line in LOCK.splitlines() if not line.startswith("#")]
SECURITY = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
LIMITS = re.findall(r"(?m)^\| [^|]+ \| ([\d,.]+) \| `([\w/]+)\.py` `(\w+)` \|$", SECURITY)


def locked(name: str, python: str, system: str) -> str:
    """Return the one version of a package that the lock has for a Python and a system."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.9", "platform_system": system,
        "sys_platform": system.lower(), "os_name": "posix", "implementation_name": "cpython",
        "platform_machine": {"Linux": "x86_64", "Darwin": "arm64"}[system],
    }  # fmt: skip
    (version,) = [
        next(iter(pin.specifier)).version
        for pin in map(Requirement, PINS)
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    return version


def test_every_line_of_the_lock_is_one_exact_public_version() -> None:
    for pin in map(Requirement, PINS):
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None and "+" not in specifier.version
    assert "://" not in LOCK and len(PINS) > 100
    assert not {"torchvision", "timm"} & {Requirement(pin).name for pin in PINS}
    assert TOML["tool"]["uv"]["constraint-dependencies"] == PINS, "make lock writes both"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_the_lock_has_an_allowed_version_of_every_dependency(python: str, system: str) -> None:
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], "hatchling", "editables"]
    for extra in ("lite", "photos", "demo", "docs", "dev"):
        needed += extras[extra]
    for requirement in map(Requirement, needed):
        version = locked(requirement.name, python, system)
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement}: make lock"
        )


def test_pip_installs_from_the_lock() -> None:
    (recipe,) = re.findall(r"(?m)^\$\(STAMP\):.*\n((?:\t.*\n)+)", MAKEFILE)
    installations = [line for line in recipe.splitlines() if "pip install" in line]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(installations) == 2
    for line in [*installations, *re.findall(r"(?m)^pip install .*$", readme)]:
        assert "--constraint constraints.txt" in line, line


@pytest.mark.parametrize(("number", "module", "name"), LIMITS, ids=lambda part: part)
def test_the_limits_of_the_security_page_are_the_codes(number: str, module: str, name: str) -> None:
    if module.startswith("demo"):
        pytest.importorskip("gradio")
    path = module.removesuffix("/__init__").replace("/", ".")
    module = importlib.import_module(f"vlm_bridge.{path}")
    assert ast.literal_eval(number.replace(",", "")) == getattr(module, name)


def test_remote_code_is_never_trusted() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert not [name for name, text in texts.items() if "trust_remote_code" in text]


def test_the_wheel_has_the_package_and_the_recipes_and_no_tests(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is in the extra dev")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = (path for path in PACKAGE.rglob("*") if path.is_file())
    expected = {path.relative_to(PACKAGE).as_posix() for path in sources}
    expected |= {f"config/{path.name}" for path in (REPOSITORY / "config").glob("*.yaml")}
    expected = {f"vlm_bridge/{name}" for name in expected if "__pycache__" not in name}
    assert "vlm_bridge/py.typed" in expected
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - information == expected
    assert any(name.endswith("licenses/LICENSE") for name in information)
