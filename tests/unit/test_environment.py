"""Tested versions, installed ones that are not, and what an unexpected error adds then."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vlm_bridge import environment
from vlm_bridge.environment import deviation_of, java_version, newest_tested

LOCKED = {"transformers": "5.24.0", "torch": "2.13.0", "scikit-image": "0.26.0"}


@pytest.mark.parametrize(
    ("declared", "installed", "said"),
    [
        ("transformers>=5.3", "5.3", None),
        ("transformers>=5.3", "5.24.0", None),
        ("transformers>=5.3", "5.30.0", "transformers 5.30.0 is newer than tested (5.24.0)"),
        ("transformers>=5.3", "5.1", "transformers 5.1 is older than the lowest tested (5.3)"),
        ("torch>=2.8", "2.13.0+cpu", None),
        ("torch>=2.8", "2.13.0+cu126", None),
        ("torch>=2.8", "2.14.0.dev7+cpu", "torch 2.14.0.dev7+cpu is newer than tested (2.13.0)"),
        ("Scikit_Image>=0.25", "0.27", "Scikit_Image 0.27 is newer than tested (0.26.0)"),
        ("not-locked>=1", "7", None),
        ("transformers", "1.0", None),
    ],
)
def test_versions_outside_the_tested_range_are_named(
    declared: str, installed: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "newest_tested", lambda: LOCKED)
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    deviation = deviation_of(Requirement(declared))
    assert (deviation and str(deviation)) == said


def test_the_lock_of_a_checkout_is_read() -> None:
    lock = Path(__file__).parents[2] / "constraints.txt"
    assert f"torch=={newest_tested()['torch']}" in lock.read_text(encoding="utf-8")


def test_the_lock_in_a_wheel_is_read_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "vlm_bridge"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert newest_tested() == {}
    (package / "constraints.txt").write_text(
        "# What tests ran with.\nTorch==2.13.0\n\n"
        "numpy==1.9 ; python_version < '3'\nnumpy==2.4.6 ; python_version >= '3'\n"
    )
    assert newest_tested() == {"torch": "2.13.0", "numpy": "2.4.6"}


UNEXPECTED = """
import sys
from importlib import metadata

import PIL
from vlm_bridge import environment
from vlm_bridge.cli.main import run_program

version = metadata.version
metadata.version = lambda name: NEW.get(name) or version(name)
environment.newest_tested = lambda: {"pillow": "11.0", "torch": "2.8", "typer": "0.20"}
sys.argv = ["vlm-bridge", *sys.argv[1:]]

def command():
    raise RuntimeError("it broke")

run_program(command)
"""


def errors_of(new: dict[str, object], *arguments: str) -> list[str]:
    """What an unexpected error writes to stderr where these versions are installed."""
    ended = subprocess.run(
        [sys.executable, "-c", f"NEW = {new!r}\n{UNEXPECTED}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"VLM_BRIDGE_DEBUG": "0"},
    )
    assert ended.returncode == 1 and ended.stdout == ""
    return ended.stderr.splitlines()


def test_an_unexpected_error_names_imported_packages_outside_the_tested_range() -> None:
    line = "error: unexpected RuntimeError: it broke (run again with --debug for the traceback)"
    tested = {"pillow": "11.0", "typer": "0.20", "torch": "2.8"}
    assert errors_of(tested) == [line]
    newer = tested | {"pillow": "99.1", "typer": "99.2", "torch": "99.3"}  # torch is not imported
    note = (
        "note: pillow 99.1 is newer than tested (11.0), typer 99.2 is newer than tested (0.20), which may be the "
        "cause: vlm-bridge doctor"
    )
    assert errors_of(newer) == [line, note]
    traceback = errors_of(newer, "--debug")
    assert "Traceback" in traceback[0] and traceback[-2:] == ["RuntimeError: it broke", note]
    assert errors_of(tested | {"pillow": "no version"}) == [line]


def test_environment_names_versions() -> None:
    found = environment.environment()
    assert found["torch"] == metadata.version("torch")
    assert {"python", "vlm-bridge", "transformers", "pycocoevalcap"} <= set(found)


def test_java_that_does_not_work_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_version() is None
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    assert java_version() is None
