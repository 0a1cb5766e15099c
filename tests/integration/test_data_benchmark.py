"""The benchmark of the data side runs on a few captions and reports what it promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("source", ["drawn", "folder"])
def test_growth_and_pads_are_reported(
    source: str,
    repository: Path,
    drawn_caption_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks import data, harness

    def peak_here(module: str, arguments: Sequence[str]) -> harness.Peak:
        assert module == "benchmarks.data"
        return data.own_peak(data.parse_arguments(arguments), torch.device("cpu"))

    monkeypatch.setattr(harness, "peak_in_child", peak_here)
    monkeypatch.setattr(data, "TINY_SIZES", (20, 60))
    file = tmp_path / "data.json"
    options = ["--data-dir", str(drawn_caption_folder)] if source == "folder" else []
    data.main(["--tiny", "--repeats", "1", "--json", str(file), *options])

    content = json.loads(file.read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    for size in (20, 60):
        assert rows[f"epoch of {size} captions"]["peak_bytes"] > 0
        assert rows[f"plan and pack {size} captions"]["tokens_per_second"] > 0
    pads = {
        name.removeprefix("share of pads: "): share
        for name, share in content["ratios"].items()
        if name.startswith("share of pads")
    }
    assert pads.keys() <= rows.keys()
    assert len(pads) == 4
    assert all(0 <= share < 1 for share in pads.values())
    if source == "drawn":  # captions of the drawn folder are nearly of one length
        assert pads["an image a row, by positions"] < pads["an image a row, by captions"]
        assert (
            pads["a caption a row, by positions"] < pads["a caption a row, padded to the longest"]
        )


def test_many_captions_are_opened(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks import harness, many_captions

    def peak_here(module: str, arguments: Sequence[str]) -> harness.Peak:
        many_captions.open_and_read(Path(arguments[-1]))
        return harness.Peak(2, 1)

    monkeypatch.setattr(many_captions, "peak_in_child", peak_here)
    monkeypatch.setattr(many_captions, "LINKS_PER_FILE", 3)
    file = tmp_path / "captions.json"
    assert many_captions.main(["--tiny", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["lines"] for row in rows] == list(many_captions.TINY_LINES)
    assert all(row["file_bytes"] > 50 * row["lines"] for row in rows)
