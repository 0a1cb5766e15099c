"""`vlm-bridge new-decoder`: a folder that loads as a language model."""

from __future__ import annotations

from pathlib import Path

import torch

from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.weights import (
    MAX_POSITIONS,
    DecoderSize,
    build_language_model,
    write_new_decoder,
)

TINY = ("--layers", 2, "--width", 16, "--heads", 2, "--vocabulary", 120)


def load(folder: Path) -> LanguageModel:
    return build_language_model(LanguageModelConfig(name=str(folder)))


def test_the_command_writes_a_decoder_of_the_captions(
    drawn_caption_folder: Path, tmp_path: Path, run_here
) -> None:
    folder = tmp_path / "decoder"
    result = run_here(
        "new-decoder", "--data-dir", drawn_caption_folder, "--output-dir", folder, *TINY
    )
    assert result.returncode == 0, result.stderr
    model = load(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pieces = len(model.tokenizer)
    assert f"{folder}: 2 layers of width 16, {pieces} word pieces" in result.stdout
    assert f", {parameters:,} parameters" in result.stdout
    assert f"language_model.name={folder}" in result.stdout
    shape = model.shape
    assert (shape.width, shape.num_layers, shape.cross_attention_width) == (16, 2, 16)
    assert model.max_positions == MAX_POSITIONS
    assert model.text_config.vocab_size == len(model.tokenizer) <= 120
    assert not model.fresh_parameters
    for image in CaptionFolder.open(drawn_caption_folder).split("train"):
        for caption in image.captions:
            ids = model.encode(caption)
            assert model.tokenizer.unk_token_id not in ids
            assert model.decode(ids) == caption.lower()
    assert len(model.encode("red")) == 1, "words of the captions are whole pieces"


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    size = DecoderSize(layers=1, width=8, heads=2, vocabulary=100)

    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        write_new_decoder(["a red square", "a blue circle"], tmp_path / name, size, seed=seed)
        return load(tmp_path / name).state_dict()

    before = torch.get_rng_state()
    one, same, other = weights("one", 0), weights("same", 0), weights("other", 1)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_text_comes_back_in_lower_case_without_accents(tmp_path: Path) -> None:
    text = "A Man's dog,   isn't it? Ünïcode café."
    plain = "a man's dog, isn't it? unicode cafe."
    write_new_decoder([text, "abcdefghijklmnopqrstuvwxyz"], tmp_path, DecoderSize(1, 8, 2, 200))
    model = load(tmp_path)
    assert model.decode(model.encode(text)) == plain


def test_mistakes_are_one_line(drawn_caption_folder: Path, tmp_path: Path, run_here) -> None:
    folder, other = tmp_path / "decoder", tmp_path / "other"

    def run(folder: Path, *arguments: object) -> tuple[int, str]:
        paths = ("--data-dir", drawn_caption_folder, "--output-dir", folder)
        result = run_here("new-decoder", *paths, *TINY, *arguments)
        return result.returncode, result.stderr

    assert run(folder)[0] == 0
    first = (folder / "model.safetensors").read_bytes()
    code, line = run(folder, "--seed", 1)
    assert code == 2 and "exists: choose another --output-dir, or give --overwrite" in line
    assert (folder / "model.safetensors").read_bytes() == first
    assert run(folder, "--seed", 1, "--overwrite")[0] == 0
    assert (folder / "model.safetensors").read_bytes() != first
    assert run(other, "--heads", 5) == (2, "error: heads=5 does not divide width=16\n")
    assert run(other, "--layers", 0)[0] == 2
    assert not other.exists()
