"""Versions that results depend on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata

DISTRIBUTION = "vlm-bridge"


def environment() -> dict[str, str]:
    """Return installed versions and the system; no names or paths of the machine."""
    system = f"{platform.system()} {platform.machine()}"
    found = {"python": platform.python_version(), "platform": system}
    for name in (DISTRIBUTION, "torch", "transformers", "accelerate", "pillow", "pycocoevalcap"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | ({"java": java} if (java := java_version()) else {})


def java_version() -> str | None:
    """Return the first line of `java -version`; None without a working Java."""
    command = [shutil.which("java") or "java", "-version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (answer.stderr or answer.stdout).strip().partition("\n")[0] or None
