"""Run the Java programs of pycocoevalcap, whose own wrappers wait forever for a Java that died."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Otherwise the jars read and write text in the locale's encoding and decimal mark.
TEXT_OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
INSTALL = {
    "darwin": "brew install openjdk",
    "win32": "winget install EclipseAdoptium.Temurin.21.JRE",
}


class JavaError(Exception):
    """A Java program cannot run; the message has the reason and how to mend it."""


def install_java_command() -> str:
    """Return the command that installs a Java runtime on this system."""
    return INSTALL.get(sys.platform, "sudo apt-get install default-jre-headless")


def find_java() -> str:
    """Return the path of `java`. Raises JavaError if there is none."""
    if executable := shutil.which("java"):
        return executable
    raise JavaError(f"no Java found; install it with: {install_java_command()}")


def java_version() -> str | None:
    """Return the first line of `java -version`; None without a working Java."""
    try:
        command = [find_java(), "-version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (JavaError, OSError, subprocess.SubprocessError):
        return None
    return answer.stderr.partition("\n")[0]


def run_java(
    arguments: Sequence[str | Path],
    text: str = "",
    *,
    timeout_s: float,
    cwd: Path | None = None,
) -> str:
    """Run a Java program on a text and return its output.

    Raises:
        JavaError: Java is missing, failed, or did not end within `timeout_s` seconds.
    """
    command = [find_java(), *TEXT_OPTIONS, *arguments]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", timeout=timeout_s, cwd=cwd
        )
    except subprocess.TimeoutExpired:
        reason = f"Java gave no answer within {timeout_s:g} s and was stopped"
        raise JavaError(reason) from None
    except (OSError, ValueError) as error:
        raise JavaError(f"Java failed: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        named = [line for line in lines if "Exception" in line or "Error" in line]
        reason = (named or lines or [f"it ended with code {done.returncode}"])[0]
        raise JavaError(f"Java failed: {reason}")
    return done.stdout
