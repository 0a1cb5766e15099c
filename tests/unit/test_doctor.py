"""What the doctor finds on this machine, on one that lacks things, and what it must never print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from vlm_bridge import doctor
from vlm_bridge.doctor import Check, run_checks
from vlm_bridge.metrics.coco import java_version

SECRET = "hf_averysecrettoken"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_findings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    checks = by_name(run_checks())
    for name in ("python", "vlm-bridge", "cpu", "disk here"):
        assert checks[name].status == "ok", checks[name]
    for name in ("torch", "transformers", "pycocoevalcap"):
        assert checks[name].status == "ok", checks[name]
    assert checks["torch"].detail == metadata.version("torch")
    assert checks["hub token"] == Check("hub token", "ok", "there is one")
    assert SECRET not in repr(checks)
    assert all(check.fix for check in checks.values() if check.status != "ok")


def test_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = doctor._java()
    assert check.status == "warn" and "METEOR" in check.detail and check.fix
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    assert java_version() is None


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _disk() -> Iterator[Check]:
        raise OSError("stale handle")
        yield

    monkeypatch.setattr(doctor, "_disk", _disk)
    check = by_name(run_checks())["disk"]
    assert check.status == "warn" and "stale handle" in check.detail


@pytest.mark.parametrize("failing", [False, True])
def test_command(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_bridge.cli.tools import doctor as command

    checks = [Check("python", "ok", "3.11"), Check("java", "warn", "none", "install it")]
    if failing:
        checks.append(Check("torch", "fail", "not installed", "pip install torch"))
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    app = typer.Typer()
    app.command()(command)
    plain = CliRunner().invoke(app, [])
    assert plain.exit_code == failing
    assert "mend: install it" in plain.stdout
    assert ("torch" in plain.stderr) == failing
    machine = CliRunner().invoke(app, ["--json"])
    assert machine.exit_code == failing
    java = {"name": "java", "status": "warn", "detail": "none", "fix": "install it"}
    assert json.loads(machine.stdout)[1] == java


@pytest.mark.parametrize(
    ("declared", "installed", "status", "detail"),
    [
        ("transformers>=5.3", "5.1", "fail", "5.1 is older or newer than allowed, >=5.3"),
        ("torch>=2.8", "2.13.0+cu126", "ok", "2.13.0+cu126"),
    ],
)
def test_versions_outside_the_allowed_range(
    declared: str, installed: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    check = doctor.check_installed(Requirement(declared))
    assert (check.status, check.detail) == (status, detail)


def test_a_package_that_is_required_and_missing() -> None:
    check = doctor.check_installed(Requirement("no-such-package-here>=1"))
    assert check.status == "fail" and check.fix and "no-such-package-here>=1" in check.fix
