"""Versions of installed packages, and the range that is tested."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DISTRIBUTION = "vlm-bridge"
LOCK = "constraints.txt"
"""Newest tested versions: in the installed package, or at a checkout's root."""


@dataclass(frozen=True)
class Deviation:
    """An installed version beyond one end (`tested`) of the tested range."""

    name: str
    installed: str
    tested: str
    is_newer: bool

    @property
    def kind(self) -> str:
        return "newer than tested" if self.is_newer else "older than the lowest tested"

    def __str__(self) -> str:
        return f"{self.name} {self.installed} is {self.kind} ({self.tested})"


def extras() -> list[str]:
    """Return the optional groups that the package declares for its users."""
    declared = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return sorted(set(declared) - {"dev"})


def requirements(extra: str | None = None) -> list[Requirement]:
    """Return the declared direct dependencies: of the core, or what an extra adds."""
    declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    core = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    if extra is None:
        return core
    others = [r for r in declared if r not in core and r.marker]
    return [r for r in others if r.marker and r.marker.evaluate({"extra": extra})]


def newest_tested() -> dict[str, str]:
    """Return the version that the lock pins for this Python and system, by canonical name."""
    package = Path(__file__).parent
    locks = [folder / LOCK for folder in (package, package.parents[1])]
    lock = next((path for path in locks if path.is_file()), None)
    text = lock.read_text("utf-8") if lock else ""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pins = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def deviation_of(requirement: Requirement) -> Deviation | None:
    """Compare the installed version with the tested range, from the declared minimum to the lock's.

    Builds of one version (2.13.0+cpu) count as that version.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    name, installed = requirement.name, metadata.version(requirement.name)
    lowest = next((spec.version for spec in requirement.specifier if spec.operator == ">="), None)
    newest = newest_tested().get(canonicalize_name(name))
    if lowest and Version(installed) < Version(lowest):
        return Deviation(name, installed, lowest, is_newer=False)
    if newest and Version(Version(installed).public) > Version(newest):
        return Deviation(name, installed, newest, is_newer=True)
    return None


def imported_deviations() -> list[Deviation]:
    """Return the deviations of direct dependencies that this process has imported."""
    found: dict[str, Deviation] = {}
    for extra in (None, *extras()):
        for requirement in requirements(extra):
            with suppress(metadata.PackageNotFoundError):
                deviation = deviation_of(requirement)
                if deviation is not None and _is_imported(deviation.name):
                    found[deviation.name] = deviation
    return list(found.values())


def environment() -> dict[str, str]:
    """Return the versions that results depend on; no names or paths of the machine."""
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in (DISTRIBUTION, "torch", "transformers", "accelerate", "pillow", "pycocoevalcap"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if java := java_version():
        found["java"] = java
    return found


def cache_dir() -> Path:
    """Return `$VLM_BRIDGE_CACHE`, else `vlm-bridge` in `$XDG_CACHE_HOME` or ~/.cache."""
    if explicit := os.environ.get("VLM_BRIDGE_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlm-bridge"


def java_version() -> str | None:
    """Return the first line of `java -version`; None without a working Java."""
    executable = shutil.which("java")
    if executable is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = [executable, "-version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        lines = (answer.stderr or answer.stdout).splitlines()
        return lines[0].strip() if lines else None
    return None


def _is_imported(name: str) -> bool:
    """Return whether a module of a distribution is imported, if only in part."""
    files = metadata.files(name) or ()
    own = {file.parts[0].removesuffix(".py") for file in files} | {name.replace("-", "_")}
    return any(module.partition(".")[0] in own for module in sys.modules)
