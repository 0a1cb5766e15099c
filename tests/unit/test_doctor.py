"""The doctor: what it finds on this machine, on one that lacks things, and what it must never print."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from vlm_bridge import doctor, environment
from vlm_bridge.doctor import Check, run_checks

SECRET = "hf_averysecrettoken"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_finds_what_tests_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    checks = by_name(run_checks())
    for name in ("python", "vlm-bridge", "cpu", "disk here"):
        assert checks[name].status == "ok", checks[name]
    for name in ("torch", "transformers", "pycocoevalcap"):  # newer than tested, if anything
        assert checks[name].status != "fail", checks[name]
    assert "GiB" in checks["memory"].detail
    assert checks["torch"].detail.startswith(metadata.version("torch"))
    assert checks["hub token"] == Check("hub token", "ok", "there is one")
    assert SECRET not in repr(checks)


def test_everything_missing_names_its_remedy() -> None:
    for check in run_checks():
        if check.status != "ok":
            assert check.fix, check


def test_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = doctor._java()
    assert check.status == "warn" and "METEOR" in check.detail and check.fix


@pytest.mark.parametrize(
    ("line", "status"),
    [("numpy>=1", "ok"), ("numpy>=999", "fail"), ("no-such-package-here>=1", "fail")],
)
def test_required_packages(line: str, status: str) -> None:
    check = doctor._installed(Requirement(line), missing="fail")
    assert check.status == status
    assert check.fix is None if status == "ok" else check.fix and line in check.fix


def test_versions_that_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "newest_tested", lambda: {"transformers": "5.24.0", "timm": "1.0.2"}
    )
    version = metadata.version
    installed = {"transformers": "5.30.0", "timm": "1.1"}
    monkeypatch.setattr(metadata, "version", lambda name: installed.get(name) or version(name))
    checks = by_name(run_checks())
    assert checks["transformers"].status == "warn"
    assert checks["transformers"].detail == "5.30.0 is newer than tested, 5.24.0"
    assert str(checks["transformers"].fix).endswith("-m pip install 'transformers==5.24.0'")
    assert checks["extra timm"].status == "warn"
    assert checks["extra timm"].detail == "timm 1.1 is newer than tested, 1.0.2"
    assert str(checks["extra timm"].fix).endswith("-m pip install 'timm==1.0.2'")

    installed["transformers"] = "4.9"
    older = by_name(run_checks())["transformers"]
    assert older.status == "fail" and older.detail.startswith(
        "4.9 is older than the lowest tested, 5"
    )
    assert ">=" in str(older.fix) and "transformers" in str(older.fix)


def test_hub_that_never_answers_costs_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"https://user:{SECRET}@mirror.example"
    )
    monkeypatch.setattr(doctor, "HUB_TIMEOUT", 0.05)
    monkeypatch.setattr(doctor, "_ask_hub", lambda: time.sleep(2))
    started = time.monotonic()
    (check,) = doctor._hub()
    assert time.monotonic() - started < 1
    assert check.status == "warn" and check.detail == "mirror.example does not answer"
    assert SECRET not in repr(check)


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _disk() -> Iterator[Check]:
        raise OSError("stale handle")
        yield

    monkeypatch.setattr(doctor, "_disk", _disk)
    check = by_name(run_checks())["disk"]
    assert check.status == "warn" and "stale handle" in check.detail


@pytest.mark.parametrize("failing", [False, True])
def test_command(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_bridge.cli.doctor import doctor as command

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
    assert json.loads(machine.stdout)[1] == {
        "name": "java",
        "status": "warn",
        "detail": "none",
        "fix": "install it",
    }
