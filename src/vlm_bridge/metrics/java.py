"""Run the Java programs of pycocoevalcap.

Its own wrappers write into the installed package, print to the terminal, and wait forever for a
Java that has died.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

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
    arguments: Sequence[str], text: str = "", *, timeout_s: float, cwd: Path | None = None
) -> str:
    """Run a Java program on a text and return its output; JavaError as `java`."""
    with java(arguments, timeout_s=timeout_s, cwd=cwd) as process:
        output, _ = process.communicate(text)
        if process.returncode:
            raise EOFError(f"it ended with code {process.returncode}")
        return output


@contextmanager
def java(
    arguments: Sequence[str], *, timeout_s: float, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a Java process with text pipes; kill it and its children at the end of the block.

    Raises:
        JavaError: Java is missing, failed, or gave no answer within `timeout_s` seconds.
    """
    command = [find_java(), *TEXT_OPTIONS, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    # A file for stderr: a full pipe that nobody reads would block Java.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(command, stderr=stderr, cwd=cwd, **pipes) as process,
    ):
        timer = threading.Timer(timeout_s, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            yield process
        except (EOFError, OSError, ValueError) as error:
            timer.join(0.1)  # if it fired, let it finish
            if timer.finished.is_set():
                reason = f"Java gave no answer within {timeout_s:g} s and was stopped"
                raise JavaError(reason) from error
            stderr.seek(0)
            lines = [line.strip() for line in stderr if line.strip()]
            named = [line for line in lines if "Exception" in line or "Error" in line]
            raise JavaError(f"Java failed: {(named or lines or [error])[0]}") from error
        finally:
            timer.cancel()
            _kill(process)
            with suppress(OSError):  # unread input of a dead process cannot be flushed
                if process.stdin:
                    process.stdin.close()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for one in (*parent.children(recursive=True), parent):
                one.kill()
