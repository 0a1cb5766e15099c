"""`python -m benchmarks.caption`: every variant does the same work, and the file has what tables are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("system", ["lite", "dinov2-gemma", "pvt-blip"])
def test_all_variants_find_the_same_captions(system: str, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "caption.json"
    options = ["--tiny", "--system", system, "--repeats", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.caption", *options],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for other in ("published loop", "plain generate"):
        assert f"same captions: 3/3 (float32, ours and {other})" in done.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    names = [row["variant"] for row in found["rows"]]
    assert {"ours", "batch 1", "no KV cache", "plain generate", "published loop"} < set(names)
    for row in found["rows"]:
        assert row.keys() == {
            "variant",
            "samples_per_second",
            "tokens_per_second",
            "peak_bytes",
            "spread",
        }
        assert row["samples_per_second"] > 0
        assert row["tokens_per_second"] > row["samples_per_second"]
    assert found["ratios"].keys() == {
        f"ours / {name}: samples/s" for name in names if name != "ours"
    }
