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
    CROSS_ATTENDING,
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


def load(name: object, **options: Any) -> LanguageModel:
    config = LanguageModelConfig(name=str(name), **{"dtype": "float32", **options})
    return build_language_model(config)


def packed_states(model: LanguageModel, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    mask, positions = model.packed_mask(segments, 0), packed_positions(segments, 0)
    return model.hidden_states(ids, attention_mask=mask, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, *CROSS_ATTENDING])
def test_the_parts_make_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(f"tiny_{kind}_dir"))
    ids, options = torch.randint(3, 300, (2, 12)), {}
    if kind in CROSS_ATTENDING:
        states = torch.randn(2, 5, model.shape.cross_attention_width or 0)
        options = {"encoder_hidden_states": states}
        other = model.causal_lm(ids, encoder_hidden_states=states + 1).logits
        found = model.head(model.hidden_states(ids, encoder_hidden_states=states))
        assert not torch.allclose(found, other, atol=1e-2), "it must look"
    expected = model.causal_lm(ids, **options).logits
    torch.testing.assert_close(model.head(model.hidden_states(ids, **options)), expected)
    assert model.embed(ids).shape[-1] == model.embed_dim
    assert expected.shape[-1] == model.vocab_size


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_encoding_adds_nothing_and_loses_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(f"tiny_{kind}_dir"))
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
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    sizes |= {"layer_types": ["full_attention"] * 2, "scale_embedding": True}
    text = config.get_text_config(decoder=True)
    for name, size in sizes.items():
        if hasattr(text, name):
            setattr(text, name, size)
    return AutoModelForCausalLM.from_config(text)


@pytest.mark.parametrize(
    ("family", "scale"),
    [
        ("gemma", 32**0.5), ("gemma2", 32**0.5), ("gemma3_text", 32**0.5), ("biogpt", 32**0.5),
        ("xglm", 32**0.5), ("bart", 32**0.5), ("llama", 1), ("qwen3", 1), ("granite", 1),
        ("mistral", 1), ("phi3", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_embeddings_are_edited_before_every_family_scales_them(
    family: str, scale: float, dtype: torch.dtype
) -> None:
    with seeded():
        model = LanguageModel(small_causal_lm(family).to(dtype).eval(), None)
    ids = torch.arange(40)
    assert float(model.embedding_scale) == pytest.approx(scale, rel=1e-2)
    assert model.embedding_std() == pytest.approx(model.embed(ids).float().std().item(), rel=2e-2)
    assert torch.equal(model.token_vectors(ids) * model.embedding_scale, model.embed(ids))
    # What the identity leaves is the model's own, to the last bit: it is rounded once.
    model.open_layer(0)
    with attach(model, ImageInputs(1, edit=lambda text: text.float())):
        assert torch.equal(model.causal_lm.get_input_embeddings()(ids[None])[0], model.embed(ids))


class TestGemma2:
    """Differences of Gemma 2 from a Llama."""

    @torch.no_grad()
    def test_logits_and_attention_scores_are_soft_capped(self, tiny_gemma2_dir: Path) -> None:
        with pytest.raises(ModelError, match=r"attention=sdpa .* softcap .* use auto or eager"):
            load(tiny_gemma2_dir, attention="sdpa")
        model = load(tiny_gemma2_dir)
        logits = model.head(100 * torch.randn(5, model.embed_dim))
        assert 1.9 < logits.abs().max() <= 2.0
        ids = torch.randint(3, 300, (1, 12))
        capped = model.hidden_states(ids)
        for layer in model.causal_lm.base_model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(model.hidden_states(ids), capped, atol=1e-3)

    @torch.no_grad()
    def test_packed_captions_longer_than_the_window_are_those_of_gemma_itself(
        self, tiny_gemma2_dir: Path
    ) -> None:
        model = load(tiny_gemma2_dir)  # its window is 8
        captions = [torch.randint(3, 300, (1, length)) for length in (13, 11)]
        segments = torch.tensor([[1] * 13 + [2] * 11])
        packed = model.head(packed_states(model, torch.cat(captions, dim=1), segments))
        alone = torch.cat([model.causal_lm(ids).logits for ids in captions], dim=1)
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)

    def test_its_tokenizer_adds_a_start_token_and_captions_have_one_all_the_same(
        self, tiny_gemma2_dir: Path, tmp_path: Path
    ) -> None:
        without = shutil.ignore_patterns("*token*")
        folder = shutil.copytree(tiny_gemma2_dir, tmp_path / "gemma", ignore=without)
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
        assert model.tokenizer.decode(model.encode("a dog.")) == "a dog."
        format = CaptionFormat(model.encode_all, start_id=2, eos_id=1)
        caption = format.with_targets(*format.targets(["a dog."]))
        assert caption.input_ids == (2, *model.encode("a dog."))
        assert 2 not in caption.labels
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


@pytest.mark.parametrize("choice", ["int8", "nf4"])
def test_quantization_needs_a_gpu_and_its_package(
    tiny_llama_dir: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LanguageModelConfig.build({"name": str(tiny_llama_dir), "dtype": choice})
    with pytest.raises(ModelError, match=f"language_model.dtype={choice} needs an NVIDIA GPU"):
        build_language_model(config)
    # `info` counts a quantized recipe anywhere.
    assert build_language_model(config, meta=True).vocab_size > 256
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    with pytest.raises(ModelError, match=r"pip install 'vlm-bridge\[gpu\]'"):
        build_language_model(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("choice", ["int8", "nf4"])
def test_on_a_gpu_gradients_pass_through_quantized_layers(
    tiny_vit_dir: Path, tiny_gemma2_dir: Path, choice: str
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = tiny_recipe(tiny_vit_dir, tiny_gemma2_dir, "cross_attention", choice)
    model = tiny_captioner(recipe).to("cuda")
    ids = torch.randint(3, 300, (2, 9), device="cuda")
    image = model.image_inputs(random_features(model, 2))
    with torch.autocast("cuda", torch.bfloat16):
        model.caption_loss(ids, ids, torch.ones_like(ids), image).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.bridge.parameters())


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


@torch.no_grad()
def test_a_window_that_holds_for_every_layer_holds_in_packed_rows() -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32}
    config = MistralConfig(**sizes, num_key_value_heads=2, sliding_window=3)
    model = LanguageModel(MistralForCausalLM(config), None).eval()
    ids, segments = torch.randint(0, 30, (1, 9)), torch.tensor([[1] * 9])
    torch.testing.assert_close(packed_states(model, ids, segments), model.hidden_states(ids))
    other = LlamaConfig(**sizes)
    other.layer_types = ["linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        LanguageModel(LlamaForCausalLM(other), None).packed_mask(segments, 0)


def allowed(num_soft: int, window: int | None = None) -> list[list[int]]:
    """Return which positions each position of a packed row sees."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    mask = causal_block_mask(segments, num_soft, torch.float32, window)[0, 0]
    assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
    return [row.nonzero().flatten().tolist() for row in mask == 0]


def test_packed_captions_see_soft_tokens_and_their_own_past() -> None:
    first, second = [[0, 1, 2], [0, 1, 2, 3]], [[0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert allowed(num_soft=2) == [[0], [0, 1], *first, *second, [7]]
    assert allowed(num_soft=0) == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]
    # A window counts within the caption, as if the first were not there.
    seen = allowed(num_soft=2, window=2)
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [5, 6], [7]]


def test_packed_captions_have_the_positions_they_have_alone() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert packed_positions(segments, 2)[0, :-1].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert packed_positions(segments, 0)[0, :-1].tolist() == [0, 1, 0, 1, 2]
    # A short row beside a long one may have more pads than a model has positions.
    assert packed_positions(torch.tensor([[1, 1, *[0] * 98]]), 2).max() == 3
