"""The benchmarks of data and stored features run on a few captions and report what they promise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def benchmarks_are_found(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))


def test_growth_and_pads_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import data, harness

    def peak_here(module: str, arguments: Sequence[str]) -> harness.Peak:
        assert module == "benchmarks.data"
        return data.own_peak(data.parse_arguments(arguments), torch.device("cpu"))

    monkeypatch.setattr(harness, "peak_in_child", peak_here)
    monkeypatch.setattr(data, "TINY_SIZES", (20, 60))
    file = tmp_path / "data.json"
    data.main(["--tiny", "--repeats", "1", "--json", str(file)])
    content = json.loads(file.read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    for size in (20, 60):
        assert rows[f"epoch of {size} captions"]["peak_bytes"] > 0
        assert rows[f"plan and pack {size} captions"]["tokens_per_second"] > 0
    start = "share of pads: "
    pads = {n.removeprefix(start): v for n, v in content["ratios"].items() if n.startswith(start)}
    assert pads.keys() <= rows.keys() and len(pads) == 4
    assert pads["an image a row, by positions"] < pads["an image a row, by captions"]
    assert pads["a caption a row, by positions"] < pads["a caption a row, padded to the longest"]


def test_every_format_is_compared_with_features_that_were_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # Java takes seconds
    from benchmarks import feature_formats

    file = tmp_path / "formats.json"
    assert feature_formats.main(["--tiny", "--json", str(file)]) == 0
    exact, *others = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["format"] for row in others] == ["float16", "bfloat16", "int8", "float32"]
    # The tiny system's features are made in float16, which that format then keeps as they are.
    assert others[0] == {**exact, "format": "float16"} and exact["captions_changed"] == 0
    for row in others:
        assert row.keys() == {"format", "CIDEr", "BLEU-4", "loss", "captions_changed"}
        assert row["loss"] == pytest.approx(exact["loss"], rel=0.05) and row["loss"] > 0
