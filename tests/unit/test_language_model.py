"""The adapter splits a causal LM into embed | body | head without changing what it computes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from captioners import (
    LANGUAGE_MODELS,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
)
from tiny_models import seeded
from vlm_bridge.configuration import DecodeSettings, LanguageModelConfig
from vlm_bridge.data_pipeline.loader import CaptionFormat
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import ImageInputs
from vlm_bridge.model_architecture.language_model import (
    LanguageModel,
    causal_block_mask,
    packed_positions,
)
from vlm_bridge.model_architecture.weights import build_language_model


def load(name: object, **options) -> LanguageModel:
    return build_language_model(
        LanguageModelConfig(name=str(name), **{"dtype": "float32", **options})
    )


def packed_states(model: LanguageModel, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    mask, positions = model.packed_mask(segments, 0), packed_positions(segments, 0)
    return model.hidden_states(ids, attention_mask=mask, position_ids=positions)


@pytest.fixture(params=LANGUAGE_MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@torch.no_grad()
def test_the_parts_make_the_whole(folder: Path) -> None:
    model = load(folder)
    ids = torch.randint(3, 300, (2, 12))
    expected = model.causal_lm(ids).logits
    torch.testing.assert_close(model.head(model.hidden_states(ids)), expected)
    assert model.embed(ids).shape[-1] == model.embed_dim
    assert expected.shape[-1] == model.vocab_size


def test_softcaps_are_applied(tiny_gemma2_dir: Path) -> None:
    model = load(tiny_gemma2_dir)
    logits = model.head(100 * torch.randn(5, model.embed_dim))
    assert logits.abs().max() <= 2.0
    assert logits.abs().max() > 1.9


def test_encoding_adds_nothing_and_loses_nothing(folder: Path) -> None:
    model = load(folder)
    for text in ("A small red square.", " leading space", "Ünïcode 🐶", ""):
        ids = model.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert model.tokenizer.decode(ids) == text
    assert (model.start_id, model.eos_id) == (1, 2)


def test_captions_need_an_end_token_and_can_start_with_it(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2_dir, tmp_path / "tokenizer")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "bos_token"}))
    model = load(folder)
    assert (model.start_id, model.eos_id) == (2, 2)
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ModelError, match="has no EOS token"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_as_asked(tiny_llama_dir: Path, dtype: str) -> None:
    model = load(tiny_llama_dir, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def small_causal_lm(family: str) -> Any:
    """Build a small causal language model of a family of transformers."""
    config = AutoConfig.for_model(family)
    twos = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_layers")
    twos += ("decoder_layers", "encoder_layers", "decoder_attention_heads", "attention_heads")
    widths = ("hidden_size", "intermediate_size", "d_model", "decoder_ffn_dim", "ffn_dim")
    sizes = {"vocab_size": 40, "head_dim": 16, "max_position_embeddings": 64}
    sizes |= dict.fromkeys(twos, 2) | dict.fromkeys(widths, 32)
    text = config.get_text_config(decoder=True)
    for name, size in sizes.items():
        if hasattr(text, name):
            setattr(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "layer_types"):
        if hasattr(text, name):
            setattr(text, name, ["full_attention"] * 2 if name == "layer_types" else 1)
    if hasattr(text, "scale_embedding"):
        text.scale_embedding = True
    return AutoModelForCausalLM.from_config(text)


@pytest.mark.parametrize(
    ("family", "scale"),
    [
        ("gemma", 32**0.5), ("gemma2", 32**0.5), ("gemma3_text", 32**0.5), ("biogpt", 32**0.5),
        ("xglm", 32**0.5), ("trocr", 32**0.5), ("bart", 32**0.5), ("llama", 1), ("qwen3", 1),
        ("granite", 1), ("mistral", 1), ("phi3", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_scale_of_embeddings_is_found_in_every_family(
    family: str, scale: float, dtype: torch.dtype
) -> None:
    with seeded():
        model = LanguageModel(small_causal_lm(family).to(dtype).eval(), None)
    ids = torch.arange(40)
    assert float(model.embedding_scale) == pytest.approx(scale, rel=1e-2)
    assert torch.equal(model.token_vectors(ids) * model.embedding_scale, model.embed(ids))
    # What the identity leaves is the model's own, to the last bit: it is rounded once.
    model.open_layer(0)
    with attach(model, ImageInputs(1, edit=lambda text: text.float())):
        assert torch.equal(model.causal_lm.get_input_embeddings()(ids[None])[0], model.embed(ids))


class TestGemma2:
    """Differences of Gemma 2 from a Llama."""

    @torch.no_grad()
    def test_embeddings_are_scaled_by_the_root_of_their_width(self, tiny_gemma2_dir: Path) -> None:
        model = load(tiny_gemma2_dir)
        ids = torch.tensor([[5, 6]])
        weight = model.causal_lm.get_input_embeddings().weight
        torch.testing.assert_close(model.embed(ids), weight[ids] * model.embed_dim**0.5)
        assert torch.equal(model.token_vectors(ids), weight[ids])
        assert model.embedding_std() == pytest.approx(
            model.embed(torch.arange(320)).std().item(), rel=1e-2
        )

    @torch.no_grad()
    def test_attention_scores_are_soft_capped(self, tiny_gemma2_dir: Path) -> None:
        model = load(tiny_gemma2_dir)
        ids = torch.randint(3, 300, (1, 12))
        capped = model.hidden_states(ids)
        for layer in model.causal_lm.base_model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(model.hidden_states(ids), capped, atol=1e-3)

    def test_attention_without_a_softcap_is_refused(self, tiny_gemma2_dir: Path) -> None:
        with pytest.raises(ModelError, match=r"attention=sdpa .* softcap .* use auto or eager"):
            load(tiny_gemma2_dir, attention="sdpa")

    @torch.no_grad()
    def test_packed_captions_longer_than_the_window_are_those_of_gemma_itself(
        self, tiny_gemma2_dir: Path
    ) -> None:
        model = load(tiny_gemma2_dir)  # its window is 8
        captions = [torch.randint(3, 300, (1, length)) for length in (13, 11)]
        segments = torch.tensor([[1] * 13 + [2] * 11])
        ids = torch.cat(captions, dim=1)
        packed = model.head(packed_states(model, ids, segments))
        alone = torch.cat([model.causal_lm(ids).logits for ids in captions], dim=1)
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)

    def test_its_tokenizer_adds_a_start_token_and_captions_have_one_all_the_same(
        self, tiny_gemma2_dir: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(
            tiny_gemma2_dir, tmp_path / "gemma", ignore=shutil.ignore_patterns("*token*")
        )
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        pieces += [f"<0x{byte:02X}>" for byte in range(256)]
        pieces += ["\u2581", *"adgo.", "do", "dog", "\u2581dog"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = [("d", "o"), ("do", "g"), ("\u2581", "dog")]
        tokenizer: Any = GemmaTokenizer
        tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
        model = load(folder)
        assert type(model.tokenizer).__name__ == "GemmaTokenizer"
        assert (model.start_id, model.eos_id) == (2, 1)
        assert 2 not in model.encode("a dog.")
        assert model.tokenizer.decode(model.encode("a dog.")) == "a dog."

        caption = CaptionFormat(model.encode_all, start_id=2, eos_id=1).tokenize("a dog.")
        assert caption.input_ids[0] == 2
        assert caption.input_ids.count(2) == 1
        assert caption.labels == (*caption.input_ids[1:], 1)


@torch.no_grad()
def test_checkpointed_layers_give_the_same_captions(
    tiny_vit_dir: Path, tiny_gemma2_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_gemma2_dir, "cross_attention"))
    features, decode = random_features(model, 2), DecodeSettings(num_beams=2, max_new_tokens=12)
    plain = generated(model, features, [1], decode)
    model.language_model.checkpoint_activations()
    assert generated(model, features, [1], decode) == plain


class TestQuantization:
    @pytest.mark.parametrize("choice", ["int8", "nf4"])
    def test_without_a_gpu_it_is_refused(
        self, tiny_llama_dir: Path, choice: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        config = LanguageModelConfig.build({"name": str(tiny_llama_dir), "dtype": choice})
        with pytest.raises(
            ModelError, match=f"language_model.dtype={choice} needs an NVIDIA GPU"
        ) as caught:
            build_language_model(config)
        assert "\n" not in str(caught.value)
        # `info` counts a quantised recipe anywhere.
        assert build_language_model(config, meta=True).vocab_size > 256

    def test_without_its_package_the_command_that_installs_it_is_told(
        self, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: None if name == "bitsandbytes" else find_spec(name),
        )
        with pytest.raises(ModelError, match=r"pip install 'vlm-bridge\[gpu\]'"):
            build_language_model(LanguageModelConfig(name=str(tiny_llama_dir), dtype="nf4"))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    @pytest.mark.parametrize("choice", ["int8", "nf4"])
    def test_on_a_gpu_gradients_pass_through_quantised_layers(
        self, tiny_vit_dir: Path, tiny_gemma2_dir: Path, choice: str
    ) -> None:
        pytest.importorskip("bitsandbytes")
        recipe = tiny_recipe(tiny_vit_dir, tiny_gemma2_dir, "cross_attention", choice)
        model = tiny_captioner(recipe).to("cuda")
        ids = torch.randint(3, 300, (2, 9), device="cuda")
        image = model.image_inputs(random_features(model, 2))
        with torch.autocast("cuda", torch.bfloat16):
            model.caption_loss(ids, ids, torch.ones_like(ids), image).total.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in model.bridge.parameters()
        )


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
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=3,
        attn_implementation="eager",
    )  # fmt: skip
    model = LanguageModel(MistralForCausalLM(config), None).eval()
    ids = torch.randint(0, 30, (1, 9))
    segments = torch.tensor([[1] * 9])
    alone = model.hidden_states(ids)
    packed = packed_states(model, ids, segments)
    torch.testing.assert_close(packed, alone)


class TestPackedRows:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])

    def allowed(self, num_soft: int, window: int | None = None) -> list[list[int]]:
        """Which positions each position sees."""
        mask = causal_block_mask(self.segments, num_soft, torch.float32, window)[0, 0]
        assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
        return [row.nonzero().flatten().tolist() for row in mask == 0]

    def test_captions_see_soft_tokens_and_their_own_past(self) -> None:
        first, second = [[0, 1, 2], [0, 1, 2, 3]], [[0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
        assert self.allowed(num_soft=2) == [[0], [0, 1], *first, *second, [7]]
        assert self.allowed(num_soft=0) == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]

    def test_a_window_counts_within_the_caption(self) -> None:
        # The second caption follows the soft tokens 0 and 1, as if the first were not there.
        seen = self.allowed(num_soft=2, window=2)
        assert seen == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [5, 6], [7]]

    def test_every_caption_has_the_positions_it_has_alone(self) -> None:
        assert packed_positions(self.segments, 2)[0, :-1].tolist() == [0, 1, 2, 3, 2, 3, 4]
        assert packed_positions(self.segments, 0)[0, :-1].tolist() == [0, 1, 0, 1, 2]

    def test_pads_take_up_no_positions(self) -> None:
        """A short row beside a long one may have more pads than a model has positions."""
        segments = torch.tensor([[1, 1, *[0] * 98]])
        assert packed_positions(segments, 2).max() == 3
