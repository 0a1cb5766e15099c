"""Mutated files by the hundred, and every case that was found once: no crash, no hang, no gigabyte, no way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzzing import READERS

CORPUS = Path(__file__).parent.parent / "corpus"
MAX_CORPUS_BYTES = 1_000_000


@pytest.mark.timeout(7200)  # of `--fuzz 10000`
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_or_refuses_whatever_it_is_given(
    reader: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """``pytest --fuzz 10000 tests/unit/test_hostile_inputs.py`` gives each reader that many inputs."""
    tests = Path(__file__).parent.parent
    finished = subprocess.run(
        [sys.executable, tests / "fuzzing.py", reader, str(request.config.getoption("--fuzz")), "0", tmp_path,
         CORPUS / reader],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        errors="replace",
    )  # fmt: skip
    assert finished.returncode == 0, f"died of {tmp_path / 'current'}: {finished.stderr[-2000:]}"
    report = json.loads(finished.stdout.splitlines()[-1])
    assert report["found"] == []
    assert report["nothing_beside"], "something was written outside the reader's folder"
    assert report["taken"]
    assert report["refused"] or reader == "tags"  # every caption has a plain form


def test_the_corpus_is_small_and_of_known_readers() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= READERS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < MAX_CORPUS_BYTES
