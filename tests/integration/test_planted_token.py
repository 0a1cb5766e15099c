"""A token of the hub is planted wherever people put one; then all files and output are searched."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from captioners import places_of_run, tiny_captioner, tiny_recipe
from vlm_bridge.cli.main import run_program
from vlm_bridge.configuration import load_recipe
from vlm_bridge.credentials import holds_credential, redact
from vlm_bridge.training_strategy.checkpoint import FORMAT, FORMAT_VERSION, save_checkpoint

TOKEN = "hf_" + "PlantedForTheTest" * 2
PASSWORD = "open-sesame-1234"
ADDRESSES = (
    f"https://user:{TOKEN}@huggingface.co/me/model",
    f"https://{TOKEN}@hub.example/me/model",
)
Run = Callable[..., CompletedProcess[str]]


def assert_clean(what: str, content: bytes) -> None:
    """Search for the secrets, plain and as base64 at each of its three alignments."""
    for plain in (TOKEN.encode(), PASSWORD.encode()):
        shifted = [base64.b64encode(b"x" * n + plain)[4 * (n > 0) : -4] for n in range(3)]
        assert not any(form in content for form in (plain, *shifted)), f"the token is in {what}"


@pytest.fixture
def run_clean(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with the token in the environment, and search its output."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PATH", "")  # no Java: it takes longer than all the rest

    def run(*arguments: object) -> CompletedProcess[str]:
        result = run_here(*arguments)
        assert_clean(f"the output of {arguments[0]}", (result.stdout + result.stderr).encode())
        return result

    return run


@pytest.fixture
def recipe_path(
    drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> Path:
    recipe = tiny_recipe(
        tiny_vit_dir, tiny_llama_dir, **places_of_run(tmp_path, "run", drawn_caption_folder),
        max_steps=2, save_every="1 step", batch_size=8,
        decode={"num_beams": 1, "max_new_tokens": 4},
    )  # fmt: skip
    (path := tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return path


def test_no_output_has_it(
    run_clean: Run, recipe_path: Path, drawn_caption_folder: Path, tmp_path: Path
) -> None:
    run, scores, exported = tmp_path / "run/checkpoints", tmp_path / "scores", tmp_path / "exported"
    image = drawn_caption_folder / "val" / "images" / "val-00.jpg"
    for command in (
        ("train", "--config", recipe_path),
        ("caption", image, "--checkpoint", run, "--json"),
        ("evaluate", "--checkpoint", run, "--data-dir", drawn_caption_folder, "--output-dir", scores, "--limit", 2),
        ("report", scores),
        ("export", run, "--output-dir", exported, "--dataset", ADDRESSES[0], "--license", "mit"),
        ("info", "--config", recipe_path, "--json"),
    ):  # fmt: skip
        result = run_clean(*command)
        assert result.returncode == 0, result.stderr

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files} | {path.name.split(".")[0] for path in files}
    assert {".pth", ".html", ".jsonl", ".safetensors", ".md", "events", "metrics"} <= kinds
    for path in files:
        assert_clean(path.name, path.read_bytes())


def test_no_error_repeats_it(
    run_clean: Run, recipe_path: Path, drawn_caption_folder: Path, tmp_path: Path
) -> None:
    checkpoint, recipe = tmp_path / "model.pth", load_recipe(recipe_path)
    save_checkpoint(checkpoint, recipe, tiny_captioner(recipe).trained_state_dict())
    image = drawn_caption_folder / "val" / "images" / "val-00.jpg"
    train = ("train", "--config", recipe_path)
    export = ("export", checkpoint, "--output-dir", tmp_path / "exported", "--overwrite")
    keys = ("vision_encoder.name", "data_dir", "nonsense")
    for command in (
        *((*train, f"{key}={address}") for address in ADDRESSES for key in keys),
        ("caption", image, "--checkpoint", ADDRESSES[0]),
        ("caption", ADDRESSES[0], "--checkpoint", checkpoint),
        ("caption", ADDRESSES[1], "--checkpoint", checkpoint, "--json"),
        ("evaluate", "--model", ADDRESSES[1], "--data-dir", drawn_caption_folder),
        (*export, "--push-to-hub", ADDRESSES[0]),
        (*export, "--push-to-hub", "me/model"),
        ("info", "--config", ADDRESSES[0]),
    ):
        assert run_clean(*command).returncode != 0, command


def test_no_traceback_has_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-bridge", "--debug"])

    def command() -> None:
        raise RuntimeError(f"401 for {ADDRESSES[0]}")

    with pytest.raises(SystemExit, match="1"):
        run_program(command)
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "401 for https://***@huggingface.co/me/model" in printed
    assert_clean("a traceback", printed.encode())


def test_recipes_and_checkpoints_that_bring_one_are_refused(run_clean: Run, tmp_path: Path) -> None:
    for value in (*ADDRESSES, f"https://user:{PASSWORD}@example.com/model", TOKEN):
        refused = run_clean("train", f"language_model.name={value}")
        assert refused.returncode == 2 and "HF_TOKEN" in refused.stderr
        assert "language_model.name holds a token or a password" in refused.stderr
    recipe = load_recipe(None).to_dict()
    recipe["language_model"]["name"] = ADDRESSES[0]
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "weights": {}}
    torch.save({**content, "recipe": recipe}, tmp_path / "model.pth")
    refused = run_clean("export", tmp_path / "model.pth", "--output-dir", tmp_path / "exported")
    assert refused.returncode != 0 and not (tmp_path / "exported").exists()


def test_redaction_leaves_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-shaped-like-one")
    text = f"GET https://a:b@host/x?token={TOKEN} and not-shaped-like-one: 401; mail me@example.com"
    assert redact(text) == "GET https://***@host/x?token=*** and ***: 401; mail me@example.com"
    assert holds_credential(text)
    monkeypatch.setenv("HF_TOKEN", "")
    for harmless in ("google/gemma-2-2b", "https://huggingface.co/me/model", "runs/a@b", ""):
        assert redact(harmless) == harmless
    assert redact('{"name": "https://u:p@host/"}') == '{"name": "https://***@host/"}'
