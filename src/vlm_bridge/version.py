"""Installed versions, and the range that is tested."""

from __future__ import annotations

import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DISTRIBUTION = "vlm-bridge"
PACKAGE = Path(__file__).parent


def requirements(extra: str = "") -> list[Requirement]:
    """Return the direct dependencies of the core, or those that an extra adds."""
    declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    core = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    others = [r for r in declared if r not in core]
    return [r for r in others if r.marker and r.marker.evaluate({"extra": extra})]


def newest_tested() -> dict[str, str]:
    """Return the locked versions for this Python and system by canonical name."""
    # In the installed package, or at the root of a checkout.
    locks = [folder / "constraints.txt" for folder in (PACKAGE, PACKAGE.parents[1])]
    text = next((path.read_text("utf-8") for path in locks if path.is_file()), "")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in map(Requirement, filter(None, lines))
        if pin.marker is None or pin.marker.evaluate()
    }


def untested(requirement: Requirement) -> str | None:
    """Describe an installed version outside the tested range; None within it.

    Builds of one version (2.13.0+cpu) count as that version.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    installed = metadata.version(requirement.name)
    lowest = next((spec.version for spec in requirement.specifier if spec.operator == ">="), None)
    newest = newest_tested().get(canonicalize_name(requirement.name))
    if lowest and Version(installed) < Version(lowest):
        return f"{installed} is older than the lowest tested, {lowest}"
    if newest and Version(Version(installed).public) > Version(newest):
        return f"{installed} is newer than tested, {newest}"
    return None


def untested_packages() -> list[str]:
    """Describe the installed dependencies of the core that are outside the tested range."""
    found = []
    for requirement in requirements():
        with suppress(metadata.PackageNotFoundError):
            if finding := untested(requirement):
                found.append(f"{requirement.name} {finding}")
    return found


def environment() -> dict[str, str]:
    """Return the versions that results depend on; no names or paths of the machine."""
    system = f"{platform.system()} {platform.machine()}"
    found = {"python": platform.python_version(), "platform": system}
    for name in (DISTRIBUTION, "torch", "transformers", "accelerate", "pillow", "pycocoevalcap"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | ({"java": java} if (java := java_version()) else {})


def java_version() -> str | None:
    """Return the first line of `java -version`; None without a working Java."""
    executable = shutil.which("java")
    if executable is None:
        return None
    try:
        answer = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (answer.stderr or answer.stdout).strip().partition("\n")[0] or None
