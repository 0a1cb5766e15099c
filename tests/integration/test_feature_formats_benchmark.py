"""What storing features costs in captions: every format is scored, and features that were not stored change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_every_format_is_compared_with_features_that_were_not_stored(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.setenv("PATH", str(tmp_path))  # Java takes seconds
    from benchmarks import feature_formats

    file = tmp_path / "formats.json"
    assert feature_formats.main(["--tiny", "--json", str(file)]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["environment"]["seed"] == 0
    exact, *others = content["rows"]
    assert [row["format"] for row in others] == ["float16", "bfloat16", "int8", "float32"]
    assert exact["captions_changed"] == 0
    # The tiny system's features are made in float16, which that format then keeps as they are.
    assert others[0] == {**exact, "format": "float16"}
    for row in content["rows"]:
        assert row.keys() == {"format", "CIDEr", "BLEU-4", "loss", "captions_changed"}
        assert row["loss"] == pytest.approx(exact["loss"], rel=0.05) and row["loss"] > 0
    assert "| not stored |" in capsys.readouterr().out


def test_either_a_checkpoint_or_tiny(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks import feature_formats

    for arguments in ([], ["--tiny", "--checkpoint", "best.pth"]):
        with pytest.raises(SystemExit) as refusal:
            feature_formats.main(arguments)
        assert refusal.value.code == 2
