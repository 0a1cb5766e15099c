"""`vlm-bridge evaluate --model` and `compare`: published captioners beside a bridge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captioners import tiny_captioner, tiny_recipe
from tiny_captioners import SAVE
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.evaluation.run_folder import SHOWN_AS_ZERO
from vlm_bridge.training_strategy import checkpoint as checkpoints

DECODING = ("--num-beams", 2, "--max-new-tokens", 6, "--min-new-tokens", 2)


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Java takes seconds and is tested with the metrics."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> Path:
    path = tmp_path_factory.mktemp("run") / "ours" / "checkpoints" / checkpoints.BEST_WEIGHTS
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"max_new_tokens": 5})
    checkpoints.save_checkpoint(path, recipe, tiny_captioner(recipe).trained_state_dict())
    return path


def test_a_published_captioner_is_scored_like_our_own(
    checkpoint: Path, drawn_caption_folder: Path, tmp_path: Path, run_here
) -> None:
    subjects = {"ours": ("--checkpoint", checkpoint)}
    subjects |= {name: ("--model", save(tmp_path / f"tiny-{name}")) for name, save in SAVE.items()}
    records, predictions = {}, {}
    options = ("--data-dir", drawn_caption_folder, *DECODING, "--batch-size", 3, "--device", "cpu")
    for name, subject in subjects.items():
        out = tmp_path / "out" / name
        result = run_here("evaluate", *subject, *options, "--output-dir", out)
        assert result.returncode == 0, result.stderr
        records[name] = json.loads((out / "metrics.json").read_text())
        lines = (out / "predictions.jsonl").read_text().splitlines()
        predictions[name] = [json.loads(line) for line in lines]
        assert (out / "report.html").is_file() and (out / "contact_sheet.png").is_file()
        assert f"CIDEr\t{records[name]['CIDEr']:.4f}" in result.stdout

    ours = records["ours"]
    assert ours["model"] == {"name": "ours", "checkpoint": checkpoint.name}
    assert ours["data"]["fingerprint"] == CaptionFolder.open(drawn_caption_folder).fingerprint
    assert ours["decode"]["min_new_tokens"] == 2 and ours["data"]["split"] == "val"
    for name, record in records.items():
        assert record.keys() == ours.keys()
        assert record["decode"] == ours["decode"] and record["data"] == ours["data"]
        assert record["num_images"] == 8
        assert (record["perplexity"] is None) == (name != "ours")
        for own, others in zip(predictions[name], predictions["ours"], strict=True):
            assert own["original_id"] == others["original_id"] and own.keys() == others.keys()
    assert records["blip"]["model"] == {
        "name": "tiny-blip", "class": "BlipForConditionalGeneration", "revision": None,
        "prompt": "a picture of",
    }  # fmt: skip

    outs = [tmp_path / "out" / name for name in subjects]
    result = run_here("compare", *outs, "--reference", "tiny-blip", "--json")
    assert result.returncode == 0, result.stderr
    comparison = json.loads(result.stdout)
    names = ["ours", "tiny-blip", "tiny-git", "tiny-vit-gpt2"]
    assert [run["name"] for run in comparison["runs"]] == names
    # Untrained captioners may score nothing, of which there is no share.
    reference = records["blip"]["BLEU-1"]
    share = records["ours"]["BLEU-1"] / reference if reference >= SHOWN_AS_ZERO else None
    assert comparison["runs"][0]["share_of_reference"]["BLEU-1"] == pytest.approx(share)
    assert not any("decoded differently" in note for note in comparison["notes"])


def test_scores_of_other_images_are_refused_in_one_line(
    checkpoint: Path, drawn_caption_folder: Path, tmp_path: Path, run_here
) -> None:
    files = (tmp_path / "some.json", tmp_path / "test.json")
    for file, options in zip(files, (("--limit", 4), ("--split", "test")), strict=True):
        arguments = ("--data-dir", drawn_caption_folder, "--num-beams", 2, *options, "--json")
        result = run_here("evaluate", "--checkpoint", checkpoint, *arguments)
        assert result.returncode == 0, result.stderr
        assert "METEOR skipped: no Java" in result.stderr
        file.write_text(result.stdout)
    # The recipe has the settings that the command line leaves out.
    recipe = checkpoints.load_checkpoint(checkpoint)["recipe"]
    decode = json.loads(files[0].read_text())["decode"]
    assert decode == {**decode, **recipe["decode"], "num_beams": 2}
    result = run_here("compare", *files)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: these scores cannot be compared")
    assert run_here("compare", *files, "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--checkpoint run --model blip", "either --checkpoint"),
        ("--model blip --config recipe.yaml", "--config is the recipe of a --checkpoint"),
        ("--checkpoint run --revision main", "--revision and --prompt are for a --model"),
    ],
)
def test_wrong_usage(arguments: str, words: str, drawn_caption_folder: Path, run_here) -> None:
    result = run_here("evaluate", *arguments.split(), "--data-dir", drawn_caption_folder)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert words in line
