"""`vlm-bridge evaluate --model` and `compare`: published captioners beside a bridge, by command only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main

from captioners import tiny_captioner, tiny_recipe
from tiny_captioners import SAVE
from vlm_bridge.cli.main import app
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.evaluation.compare import SHOWN_AS_ZERO
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
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
    checkpoints.save_checkpoint(path, recipe, tiny_captioner(recipe).trained_state_dict())
    return path


def keys(content: Any) -> Any:
    """The keys of a JSON object, nested ones too."""
    return (
        {key: keys(value) for key, value in content.items()} if isinstance(content, dict) else None
    )


def test_a_published_captioner_is_scored_like_our_own(
    checkpoint: Path, drawn_caption_folder: Path, tmp_path: Path, run_here
) -> None:
    subjects = {"ours": ("--checkpoint", checkpoint)}
    subjects |= {name: ("--model", save(tmp_path / f"tiny-{name}")) for name, save in SAVE.items()}
    records, predictions = {}, {}
    for name, subject in subjects.items():
        out = tmp_path / "out" / name
        arguments = (
            "--data-dir",
            drawn_caption_folder,
            *DECODING,
            "--batch-size",
            3,
            "--device",
            "cpu",
        )
        result = run_here("evaluate", *subject, *arguments, "--output-dir", out)
        assert result.returncode == 0, result.stderr
        records[name] = json.loads((out / "metrics.json").read_text())
        lines = (out / "predictions.jsonl").read_text().splitlines()
        predictions[name] = [json.loads(line) for line in lines]
        assert (out / "report.html").is_file() and (out / "contact_sheet.png").is_file()
        assert f"CIDEr\t{records[name]['CIDEr']:.4f}" in result.stdout

    ours = records["ours"]
    assert ours["model"] == {"name": "ours", "checkpoint": checkpoint.name}
    assert ours["data"]["fingerprint"] == CaptionFolder.open(drawn_caption_folder).fingerprint
    for name, record in records.items():
        ignored = {"model": {}, "skipped": {}}
        assert keys(record | ignored) == keys(ours | ignored)
        assert record["decode"] == ours["decode"] and record["decode"]["min_new_tokens"] == 2
        assert record["data"] == ours["data"] and record["data"]["split"] == "val"
        assert record["num_images"] == 8
        assert (record["perplexity"] is None) == (name != "ours")
        assert [p["original_id"] for p in predictions[name]] == [
            p["original_id"] for p in predictions["ours"]
        ]
        assert [p.keys() for p in predictions[name]] == [p.keys() for p in predictions["ours"]]
    assert records["blip"]["model"] == {
        "name": "tiny-blip",
        "class": "BlipForConditionalGeneration",
        "revision": None,
        "prompt": "a picture of",
    }

    outs = [tmp_path / "out" / name for name in subjects]
    result = run_here("compare", *outs, "--reference", "tiny-blip", "--json")
    assert result.returncode == 0, result.stderr
    comparison = json.loads(result.stdout)
    assert [run["name"] for run in comparison["runs"]] == [
        "ours",
        "tiny-blip",
        "tiny-git",
        "tiny-vit-gpt2",
    ]
    # Untrained captioners may score nothing, of which there is no share; test_compare has the shares of others.
    reference = records["blip"]["BLEU-1"]
    share = records["ours"]["BLEU-1"] / reference if reference >= SHOWN_AS_ZERO else None
    assert comparison["runs"][0]["share_of_reference"]["BLEU-1"] == pytest.approx(share)
    assert not any("decoded differently" in note for note in comparison["notes"])


def test_scores_of_other_images_are_refused_in_one_line(
    drawn_caption_folder: Path, tmp_path: Path, run_here
) -> None:
    model = SAVE["git"](tmp_path / "git")
    for name, options in {"some": ("--limit", 4), "test": ("--split", "test")}.items():
        arguments = ("--data-dir", drawn_caption_folder, *DECODING, *options)
        result = run_here(
            "evaluate", "--model", model, *arguments, "--json", tmp_path / f"{name}.json"
        )
        assert result.returncode == 0, result.stderr
    result = run_here("compare", tmp_path / "some.json", tmp_path / "test.json")
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: these scores cannot be compared")
    assert (
        run_here("compare", tmp_path / "some.json", tmp_path / "test.json", "--force").returncode
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either --checkpoint"),
        (("--checkpoint", "run", "--model", "blip"), "either --checkpoint"),
        (
            ("--model", "blip", "--config", "recipe.yaml"),
            "--config is the recipe of a --checkpoint",
        ),
        (
            ("--checkpoint", "run", "--revision", "main"),
            "--revision and --prompt are for a --model",
        ),
    ],
)
def test_wrong_usage(arguments: tuple, said: str, drawn_caption_folder: Path, run_here) -> None:
    result = run_here("evaluate", *arguments, "--data-dir", drawn_caption_folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr


def test_defaults_that_depend_on_the_recipe_are_shown() -> None:
    """Typer takes square brackets for markup and drops them."""
    command = typer.main.get_command(app)
    with command.make_context("vlm-bridge", ["doctor"]) as context:
        evaluate = command.get_command(context, "evaluate")  # type: ignore[attr-defined]
    helps = [str(getattr(parameter, "help", "")) for parameter in evaluate.params]
    assert sum("(default: the recipe's)" in text for text in helps) == 7
    assert not any("[default" in text for text in helps)
