"""The adapter splits a causal LM into embed | body | head without changing what it computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from captioners import LANGUAGE_MODELS
from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.language_model import (
    LanguageModel,
    build_language_model,
    causal_block_mask,
    packed_positions,
)


def load(name: object, **options) -> LanguageModel:
    return build_language_model(LanguageModelConfig(name=str(name), **{"dtype": "float32", **options}))


@pytest.fixture(params=LANGUAGE_MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@torch.no_grad()
def test_the_parts_make_the_whole(folder: Path) -> None:
    model = load(folder)
    ids = torch.randint(3, 300, (2, 12))
    expected = model.causal_lm(ids).logits
    torch.testing.assert_close(model.head(model.hidden_states(model.embed(ids))), expected)
    assert model.embed(ids).shape[-1] == model.embed_dim
    assert expected.shape[-1] == model.vocab_size


def test_softcaps_are_applied(tiny_gemma2_dir: Path) -> None:
    model = load(tiny_gemma2_dir)
    logits = model.head(100 * torch.randn(5, model.embed_dim))
    assert logits.abs().max() <= 2.0
    assert logits.abs().max() > 1.9


def test_frozen_and_in_evaluation(folder: Path) -> None:
    model = load(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_encoding_adds_nothing_and_loses_nothing(folder: Path) -> None:
    model = load(folder)
    for text in ("A small red square.", " leading space", "Ünïcode 🐶", ""):
        ids = model.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert model.tokenizer.decode(ids) == text
    assert (model.start_id, model.eos_id) == (1, 2)


def test_without_a_start_token_captions_start_with_the_end_token(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2_dir, tmp_path / "no-bos")
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "bos_token"}
    path.write_text(json.dumps(settings))
    model = load(folder)
    assert (model.start_id, model.eos_id) == (2, 2)


def test_without_an_end_token_captions_could_not_end(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2_dir, tmp_path / "no-eos")
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="has no EOS token"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_as_asked(tiny_llama_dir: Path, dtype: str) -> None:
    model = load(tiny_llama_dir, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_soft_capped_attention_is_never_left_to_a_kernel_without_it(tiny_gemma2_dir: Path) -> None:
    assert load(tiny_gemma2_dir).causal_lm.config._attn_implementation == "eager"


def test_architecture_without_weights(folder: Path) -> None:
    real = load(folder)
    meta = build_language_model(LanguageModelConfig(name=str(folder)), meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in real.parameters())


def test_what_cannot_be_loaded_is_one_clear_line(
    tmp_path: Path, tiny_llama_dir: Path, tiny_vit_dir: Path
) -> None:
    damaged = shutil.copytree(tiny_llama_dir, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    truncated = shutil.copytree(tiny_llama_dir, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    silent = shutil.copytree(tiny_llama_dir, tmp_path / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (silent / name).unlink()
    for name in (tmp_path / "nothing", damaged, truncated, silent, tiny_vit_dir, "no/such-model"):
        with pytest.raises(ModelError) as caught:
            load(name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_masked_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config.layer_types = ["linear_attention"]
    model = LanguageModel(LlamaForCausalLM(config), None)
    with pytest.raises(ModelError, match="linear_attention"):
        model.packed_mask(torch.ones(1, 3, dtype=torch.long), 0)


@torch.no_grad()
def test_a_window_that_holds_for_every_layer_holds_in_packed_rows() -> None:
    config = MistralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=3,
        attn_implementation="eager",
    )
    model = LanguageModel(MistralForCausalLM(config), None).eval()
    ids = torch.randint(0, 30, (1, 9))
    segments = torch.tensor([[1] * 9])
    alone = model.hidden_states(model.embed(ids))
    packed = model.hidden_states(
        model.embed(ids), model.packed_mask(segments, 0), packed_positions(segments, 0)
    )
    torch.testing.assert_close(packed, alone)


class TestPackedRows:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])

    def allowed(self, num_soft: int, window: int | None = None) -> list[list[int]]:
        """Which positions each position sees."""
        mask = causal_block_mask(self.segments, num_soft, torch.float32, window)[0, 0]
        assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
        return [row.nonzero().flatten().tolist() for row in mask == 0]

    def test_captions_see_soft_tokens_and_their_own_past(self) -> None:
        seen = self.allowed(num_soft=2)
        assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6], [7]]

    def test_without_soft_tokens(self) -> None:
        assert self.allowed(num_soft=0) == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]

    def test_a_window_counts_within_the_caption(self) -> None:
        # The second caption follows the soft tokens 0 and 1, as if the first were not there.
        seen = self.allowed(num_soft=2, window=2)
        assert seen == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [5, 6], [7]]

    def test_every_caption_has_the_positions_it_has_alone(self) -> None:
        assert packed_positions(self.segments, 2)[0, :-1].tolist() == [0, 1, 2, 3, 2, 3, 4]
        assert packed_positions(self.segments, 0)[0, :-1].tolist() == [0, 1, 0, 1, 2]
