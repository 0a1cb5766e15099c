"""A token of the hub is planted wherever people put one; then everything that was written and said is searched."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from captioners import tiny_captioner, tiny_recipe
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


def forms_of(secret: str) -> list[bytes]:
    """As it is, and as it looks inside base64 at each of its three alignments."""
    plain = secret.encode()
    shifted = (base64.b64encode(b"x" * shift + plain)[4 * (shift > 0) : -4] for shift in range(3))
    return [plain, *shifted]


def assert_clean(what: str, content: bytes) -> None:
    found = [form for secret in (TOKEN, PASSWORD) for form in forms_of(secret) if form in content]
    assert not found, f"the token is in {what}"


@pytest.fixture
def run_clean(
    run_here: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CompletedProcess[str]]:
    """Run a command with the token in the environment, and search what it says."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*arguments: object) -> CompletedProcess[str]:
        result = run_here(*arguments)
        assert_clean(f"the output of {arguments[0]}", (result.stdout + result.stderr).encode())
        return result

    return run


def test_no_output_has_it(
    run_clean: Callable[..., CompletedProcess[str]],
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    run, scores, exported = tmp_path / "run", tmp_path / "scores", tmp_path / "exported"
    recipe = tiny_recipe(
        tiny_vit_dir,
        tiny_llama_dir,
        data_dir=str(drawn_caption_folder),
        feature_cache=str(tmp_path / "features"),
        checkpoint_dir=str(run),
        log_dir=str(run / "logs"),
        max_steps=2,
        save_every="1 step",
        batch_size=8,
        decode={"num_beams": 1, "max_new_tokens": 4},
    )
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml(), encoding="utf-8")
    picture = drawn_caption_folder / "val" / "images" / "val-00.jpg"
    for command in (
        ("train", "--config", config),
        ("caption", picture, "--checkpoint", run, "--json"),
        ("evaluate", "--checkpoint", run, "--data-dir", drawn_caption_folder, "--output-dir", scores, "--limit", 2),
        ("report", scores),
        ("export", run, "--output-dir", exported, "--dataset", ADDRESSES[0], "--license", "mit"),
        ("info", "--config", config, "--json"),
    ):  # fmt: skip
        result = run_clean(*command)
        assert result.returncode == 0, result.stderr

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files} | {path.name.split(".")[0] for path in files}
    assert {".pth", ".html", ".jsonl", ".safetensors", ".md", "events", "metrics"} <= kinds
    for path in files:
        assert_clean(path.name, path.read_bytes())


def test_no_error_repeats_it(
    run_clean: Callable[..., CompletedProcess[str]],
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, data_dir=str(drawn_caption_folder))
    checkpoint, config = tmp_path / "model.pth", tmp_path / "recipe.yaml"
    save_checkpoint(checkpoint, recipe, tiny_captioner(recipe).trained_state_dict())
    config.write_text(recipe.to_yaml(), encoding="utf-8")
    picture = drawn_caption_folder / "val" / "images" / "val-00.jpg"
    export = ("export", checkpoint, "--output-dir", tmp_path / "exported", "--overwrite")
    keys = ("vision_encoder.name", "language_model.name", "data_dir", "nonsense", "learning_rate")
    for command in (
        *(
            ("train", "--config", config, f"{key}={address}")
            for address in ADDRESSES
            for key in keys
        ),
        ("caption", picture, "--checkpoint", ADDRESSES[0]),
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
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def command() -> None:
        raise RuntimeError(f"401 for {ADDRESSES[0]}")

    with pytest.raises(RuntimeError) as error:
        run_program(command)
    sys.excepthook(error.type, error.value, error.tb)  # as Python does when nobody catches
    said = capsys.readouterr().err
    assert "Traceback" in said and "401 for https://***@huggingface.co/me/model" in said
    assert_clean("a traceback", said.encode())


def test_a_recipe_refuses_it_and_names_the_key(
    run_clean: Callable[..., CompletedProcess[str]],
) -> None:
    for value in (*ADDRESSES, f"https://user:{PASSWORD}@example.com/model", TOKEN):
        refused = run_clean("train", f"language_model.name={value}")
        assert refused.returncode == 2
        assert "language_model.name holds a token or a password" in refused.stderr
    assert "HF_TOKEN" in refused.stderr


def test_a_checkpoint_that_brings_one_is_refused(
    run_clean: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    recipe = load_recipe(None).to_dict()
    recipe["language_model"]["name"] = ADDRESSES[0]
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sizes": {},
        "weights": {},
        "recipe": recipe,
    }
    torch.save(content, tmp_path / "model.pth")
    refused = run_clean("export", tmp_path / "model.pth", "--output-dir", tmp_path / "exported")
    assert refused.returncode != 0 and not (tmp_path / "exported").exists()


def test_redaction_leaves_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-shaped-like-one")
    said = f"GET https://a:b@host/x?token={TOKEN} and not-shaped-like-one: 401; mail me@example.com"
    assert redact(said) == "GET https://***@host/x?token=*** and ***: 401; mail me@example.com"
    assert holds_credential(said)
    monkeypatch.setenv("HF_TOKEN", "")
    for harmless in (
        "google/gemma-2-2b",
        "https://huggingface.co/me/model",
        "runs/a@b",
        "hf_models/x",
        "",
    ):
        assert redact(harmless) == harmless
    assert json.loads(redact(json.dumps({"name": "https://u:p@host/"}))) == {
        "name": "https://***@host/"
    }
