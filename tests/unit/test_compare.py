"""Scores side by side: shares of a reference, and no comparison of different data."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.evaluation.compare import compare
from vlm_bridge.evaluation.run import references_digest
from vlm_bridge.evaluation.run_folder import read_scores

DATA = {"name": "flickr8k", "split": "val", "fingerprint": "sha256:f", "references": "sha256:r"}
BLIP = {
    "BLEU-4": 0.4, "METEOR": None, "CIDEr": 1.0, "perplexity": 8.0, "visual_gain": 1.5,
    "num_images": 1000, "num_failures": 0, "decode": {"num_beams": 3, "max_new_tokens": 40},
    "tokenizer": "ptb", "skipped": {}, "model": {"name": "Salesforce/blip"}, "data": DATA,
}  # fmt: skip
NOTHING = {"CIDEr": 0.0, "BLEU-4": 3.1e-9, "model": {"name": "none"}}
"""Without a matching four-gram, pycocoevalcap's BLEU-4 is tiny instead of 0."""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(file: str, data: dict[str, Any] | None = None, **changes: Any) -> Path:
        """Write BLIP's scores with changes; ``data`` changes single keys."""
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**BLIP, "data": {**DATA, **(data or {})}, **changes}))
        return path

    return write


@pytest.fixture
def pair(write: Write) -> list[Path]:
    ours = {"CIDEr": 0.75, "BLEU-4": 0.3, "perplexity": 12.0, "model": {"name": "lite"}}
    return [write("blip.json"), write("lite/val/metrics.json", **ours).parent]


def test_shares_are_of_the_first_or_the_reference(pair: list[Path], write: Write) -> None:
    comparison = compare(pair)
    blip, lite = comparison.runs
    assert comparison.reference is blip and comparison.share(blip, "CIDEr") == 1
    shares = [comparison.share(lite, metric) for metric in ("CIDEr", "BLEU-4")]
    assert shares == pytest.approx([0.75, 0.75])
    for reference in ("lite", str(pair[1]), str(pair[1] / "metrics.json")):
        assert compare(pair, reference=reference).share(blip, "CIDEr") == pytest.approx(4 / 3)
    with pytest.raises(UsageError, match="none of: Salesforce/blip, lite"):
        compare(pair, reference="git")


def test_equal_names_are_told_apart_without_paths(write: Write) -> None:
    paths = [write(f"runs/{seed}/val/metrics.json") for seed in (1, 2)]
    names = [run.name for run in compare(paths).runs]
    assert names == ["Salesforce/blip (1)", "Salesforce/blip (2)"]
    assert len({run.name for run in compare(paths[:1] * 2).runs}) == 2


def test_no_share_without_meaning(pair: list[Path], write: Write) -> None:
    comparison = compare([write("zero.json", **NOTHING), *pair])
    assert not any(run.shares_of(comparison.reference) for run in comparison.runs)
    assert "METEOR" not in comparison.metrics
    assert comparison.metrics[-2:] == ["perplexity", "visual_gain"]
    assert any("only between models of one tokenizer" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"num_images": 500, "data": {"references": "x", "name": "coco", "split": "test"}},
            r"lite was scored on 500 images of coco test \(x\), Sales.* on 1000 .* flickr8k val",
        ),
        ({"tokenizer": "regex"}, "lite has scores by the tokenizer regex, Salesforce/blip by ptb"),
    ],
)
def test_scores_of_other_data_are_refused(changes: dict, reason: str, write: Write) -> None:
    paths = [write("blip.json"), write("lite.json", **{"model": {"name": "lite"}, **changes})]
    with pytest.raises(DataError, match=reason) as refusal:
        compare(paths)
    assert "\n" not in str(refusal.value) and "--force" in str(refusal.value)
    assert any(re.search(reason, note) for note in compare(paths, force=True).notes)


def test_other_settings_are_noted(write: Write) -> None:
    decode = {"num_beams": 5, "max_new_tokens": 40}
    lite = {"model": {"name": "lite"}, "decode": decode, "num_failures": 2}
    lite["data"] = {"fingerprint": "sha256:g", "split": "test"}  # the references are the same
    notes = compare([write("a.json"), write("b.json", **lite)]).notes
    assert "lite and Salesforce/blip were decoded differently: num_beams 5 and 3" in notes
    for words in ("caption folders of lite and Salesforce/blip differ", "lite: 2 image(s)"):
        assert any(words in note for note in notes)


def test_the_latest_scores_count_and_other_files_are_refused(write: Write, tmp_path: Path) -> None:
    path = write("runs/lite/val/metrics.json")
    assert read_scores(path.parent.parent).path == path
    other = write("runs/lite/test/metrics.json")
    os.utime(path, (0, 0))
    latest = read_scores(path.parent.parent)
    assert latest.path == other and "the latest of 2 evaluations" in latest.notes[0]
    with pytest.raises(DataError, match="no scores at"):
        read_scores(tmp_path / "other.json")
    for text in ("{", "[]", '{"loss": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other.json"):
            read_scores(tmp_path / "other.json")
    with pytest.raises(UsageError, match="two evaluations or more"):
        compare([path])


def test_the_digest_is_of_ids_and_references_alone() -> None:
    a = CaptionedImage(Path("x/a.jpg"), ("one", "two"), "a")
    b = CaptionedImage(Path("x/b.jpg"), ("three",), "b")
    moved = CaptionedImage(Path("y/a.jpg"), ("two", "one"), "a")
    other = CaptionedImage(a.path, ("one", "three"), "a")
    assert references_digest([a, b]) == references_digest([b, moved])
    assert len({references_digest(images) for images in ([a, b], [a], [other])}) == 3


def test_runs_that_differ_in_their_seed_alone_are_averaged(
    write: Write, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, folders = {}, []
    for name, cider, changes in (
        ("lite-s0", 0.40, {"checkpoint_dir": "a"}),
        ("lite-s1", 0.42, {"seed": 1}),
        ("lite-s2", 0.44, {"seed": 2, "log_dir": "b"}),
        ("deep_2", 0.60, {"seed": 3, "bridge": {"depth": 4}}),
        ("lite-s1-again", 0.42, {"seed": 1}),  # the same run twice is not two seeds
    ):
        model = {"model": {"name": name}}
        folders.append(write(f"{name}/val/metrics.json", CIDEr=cider, **model).parent.parent)
        (folders[-1] / "checkpoints").mkdir()
        recipes[name] = recipe_from_dict(changes)
    monkeypatch.setattr(
        "vlm_bridge.evaluation.compare.read_recipe", lambda root: recipes[root.name]
    )
    lines = run_here("compare", *folders).stdout.splitlines()
    assert lines[0].split("\t")[:4] == ["metric", "lite (n=3)", "deep_2", "% of lite (n=3)"]
    assert "CIDEr\t0.420 ± 0.020\t0.6000\t142.9\t0.4200\t100.0" in lines

    def table(layout: str) -> list[str]:
        return run_here("compare", *folders[:4], "--format", layout).stdout.splitlines()

    assert table("md") == [
        "| run | BLEU-4 | CIDEr | perplexity | visual_gain |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| lite (n=3) | 0.400 ± 0.000 | 0.420 ± 0.020 | 8.000 ± 0.000 | 1.500 ± 0.000 |",
        "| deep_2 | 0.4000 | 0.6000 | 8.0000 | 1.5000 |",
    ]
    assert r"lite (n=3) & 0.400 $\pm$ 0.000 & 0.420 $\pm$ 0.020 &" in table("latex")[4]
    assert table("latex")[5].startswith(r"deep\_2 & 0.4000 &")
    rows = list(csv.DictReader(table("csv")))
    assert (rows[0]["n"], rows[1]["n"], rows[1]["CIDEr std"]) == ("3", "1", "")
    assert float(rows[0]["CIDEr"]) == pytest.approx(0.42)
    assert float(rows[0]["CIDEr std"]) == pytest.approx(0.02)
    (mean,) = json.loads(run_here("compare", *folders, "--json").stdout)["averages"]
    assert mean["runs"] == ["lite-s0", "lite-s1", "lite-s2"]
    assert mean["standard_deviation"]["CIDEr"] == pytest.approx(0.02)


def test_options_that_named_a_file_say_what_they_are_now(tmp_path: Path, run_here) -> None:
    for command, mentions in (
        ("compare a b --html c.html", "--html is now --output-dir FOLDER"),
        ("report a -o b.html", "--output is now --output-dir FOLDER"),
        ("evaluate --checkpoint a --data-dir b --json c.json", "--json prints the scores"),
    ):
        done = run_here(*command.split())
        assert done.returncode == 2 and mentions in done.stderr, command


def test_command(pair: list[Path], write: Write, run_here) -> None:
    done = run_here("compare", *pair)
    lines = done.stdout.splitlines()
    assert lines[0] == "metric\tSalesforce/blip\tlite\t% of Salesforce/blip"
    assert {"CIDEr\t1.0000\t0.7500\t75.0", "perplexity\t8.0000\t12.0000\t-"} <= set(lines)
    assert "note: perplexity" in done.stderr
    lines = run_here("compare", write("n.json", **NOTHING), *pair).stdout.splitlines()
    assert "BLEU-4\t0.0000\t0.4000\t-\t0.3000\t-" in lines
    content = json.loads(run_here("compare", *pair, "--json", "--reference", "lite").stdout)
    blip, lite = content["runs"]
    assert content["reference"] == "lite" and content["notes"]
    assert blip["scores"]["CIDEr"] == 1.0 and blip["share_of_reference"]["perplexity"] is None
    assert lite["share_of_reference"]["CIDEr"] == 1.0
