"""SIGKILL at random moments: a resumed training ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each life of a training is a fork")
def test_killed_trainings_end_as_if_nothing_had_been(repository: Path, tmp_path: Path) -> None:
    script = repository / "tests" / "kill_and_resume.py"
    result = subprocess.run(
        [sys.executable, str(script), "--kills", str(KILLS), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{KILLS} kills in " in result.stdout
    assert "none left a trace" in result.stdout
