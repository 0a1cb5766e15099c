"""Run the Java programs of pycocoevalcap.

Its own wrappers write into the installed package, print to the terminal, and wait forever for a
Java that has died.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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
    executable = shutil.which("java")
    if executable is None:
        raise JavaError(f"no Java found; install it with: {install_java_command()}")
    # A file for stderr: a full pipe that nobody reads would block Java.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [executable, *TEXT_OPTIONS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=cwd,
            encoding="utf-8",
            start_new_session=True,
        )
        timer = threading.Timer(timeout_s, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            yield process
        except (EOFError, OSError, ValueError) as error:
            timer.join(0.1)  # if it fired, let it finish
            if timer.finished.is_set():
                reason = f"Java gave no answer within {timeout_s:g} s and was stopped"
            else:
                reason = f"Java failed: {_complaint(stderr) or error}"
            raise JavaError(reason) from error
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # unread input of a dead process cannot be flushed
                    if pipe:
                        pipe.close()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)


def _complaint(stderr: IO[str]) -> str:
    """Return the line that names the exception, or else the last line."""
    stderr.seek(0)
    lines = [line.strip() for line in stderr if line.strip()]
    return next(
        (line for line in lines if "Exception" in line or "Error" in line), "".join(lines[-1:])
    )
