"""Language models and decoders are split without a change; captions are plain text to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AddedToken,
    AutoTokenizer,
    BlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
)

from captioners import (
    CROSS_ATTENDING,
    LANGUAGE_MODELS,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
)
from tiny_models import build_tokenizer, save_tiny_blip
from vlm_bridge.configuration import DecodeSettings, LanguageModelConfig, recipe_from_dict
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach, embedding_scale
from vlm_bridge.model_architecture.bridges import ImageInputs
from vlm_bridge.model_architecture.captioner import build_captioner, caption_format
from vlm_bridge.model_architecture.language_model import (
    LanguageModel,
    causal_block_mask,
    encode_as_text,
    packed_positions,
)
from vlm_bridge.model_architecture.weights import build_language_model, word_piece_tokenizer


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
    assert expected.shape[-1] == model.text_config.vocab_size


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


@pytest.mark.parametrize(("kind", "scale"), [("gemma2", 32**0.5), ("llama", 1), ("gpt2", 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_embeddings_are_edited_before_the_model_scales_them(
    kind: str, scale: float, dtype: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{kind}_dir"), dtype=dtype)
    ids = torch.arange(40)
    layer = model.causal_lm.get_input_embeddings()
    assert float(embedding_scale(layer)) == pytest.approx(scale, rel=1e-2)
    assert model.embedding_std() == pytest.approx(model.embed(ids).float().std().item(), rel=0.05)
    assert torch.equal(layer.weight[ids] * embedding_scale(layer), model.embed(ids))
    # What the identity leaves is the model's own, to the last bit: it is rounded once.
    model.open_layer(0)
    with attach(model, ImageInputs(1, edit=lambda text: text.float())):
        edited = layer(ids[None])[0]
    assert torch.equal(edited, model.embed(ids))


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


@pytest.mark.parametrize("choice", ["int8", "nf4"])
def test_quantization_needs_a_gpu_and_its_package(
    tiny_llama_dir: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LanguageModelConfig.build({"name": str(tiny_llama_dir), "dtype": choice})
    with pytest.raises(
        ModelError, match=f"={choice} needs an NVIDIA GPU and bitsandbytes .pip install"
    ):
        build_language_model(config)
    assert build_language_model(config, meta=True).embed_dim == 32  # `info` counts it anywhere


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


PROMPT = "a picture of"


def test_captions_start_and_end_with_the_decoders_own_tokens(
    tiny_blip_dir: Path, tiny_bert_dir: Path, tiny_cross_gpt2_dir: Path
) -> None:
    blip, bert, gpt2 = load(tiny_blip_dir), load(tiny_bert_dir), load(tiny_cross_gpt2_dir)
    # [DEC], no word of BERT's.
    assert blip.start_id == blip.text_config.bos_token_id >= len(blip.tokenizer)
    assert blip.eos_id == blip.tokenizer.sep_token_id
    ends = (bert.tokenizer.cls_token_id, bert.tokenizer.sep_token_id)
    assert (bert.start_id, bert.eos_id) == ends
    assert (gpt2.start_id, gpt2.eos_id) == (1, 2)


def test_published_blip_has_its_size_and_starts_with_dec_and_ends_with_sep() -> None:
    name = "Salesforce/blip-image-captioning-base"
    blip = build_language_model(LanguageModelConfig(name=name), meta=True)
    assert (blip.text_config.bos_token_id, blip.text_config.sep_token_id) == (30522, 102)
    assert blip.text_config.vocab_size == 30524
    assert blip.shape.cross_attention_width == 768
    assert sum(parameter.numel() for parameter in blip.parameters()) == 137_881_148


@pytest.mark.parametrize("decoder", ["blip", "bert"])
def test_captions_are_decoded_as_english_is_written(
    decoder: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{decoder}_dir"))
    texts = ("a man is riding a bike.", "two dogs, a boy and a girl!", "the boy's dog isn't here.")
    # That of the folder was made from other letters.
    model.tokenizer = word_piece_tokenizer(texts, 100)
    for text in texts:
        ids = model.encode(text)
        assert not set(ids) & {model.start_id, *model.tokenizer.all_special_ids}
        assert model.decode([*ids, model.eos_id or 0]) == text
    # [DEC] and [ENC] are ids of the decoder that its tokenizer does not know.
    beyond = [model.text_config.vocab_size - 1] if decoder == "blip" else []
    assert model.decode([*beyond, *model.encode("a boy"), *beyond]) == "a boy"


def test_the_prompt_stands_behind_the_start_token(tiny_blip_dir: Path) -> None:
    model = load(tiny_blip_dir)
    section = {"name": str(tiny_blip_dir), "prompt": f"{PROMPT} "}
    format = caption_format(model, recipe_from_dict({"language_model": section}))
    assert format.prompt_ids == [model.start_id, *model.encode(PROMPT)]
    tokens, words = format.with_targets(*format.targets(["a dog"])), model.encode("a dog")
    assert list(tokens.input_ids) == [*format.prompt_ids, *words]
    assert [label for label in tokens.labels if label != -100] == [*words, model.eos_id]


def test_a_decoder_comes_alone_or_in_a_whole_blip(tiny_blip_dir: Path, tmp_path: Path) -> None:
    whole = BlipForConditionalGeneration.from_pretrained(tiny_blip_dir)
    whole.text_decoder.save_pretrained(tmp_path)
    for path in tiny_blip_dir.glob("token*"):
        shutil.copy(path, tmp_path)
    alone, within = load(tmp_path), load(tiny_blip_dir)
    assert (alone.start_id, alone.shape) == (within.start_id, within.shape)
    for model in (alone, within):
        assert not model.fresh_parameters
        for name, tensor in whole.text_decoder.state_dict().items():
            assert torch.equal(model.causal_lm.state_dict()[name], tensor), name


def test_weights_that_a_blip_lacks_are_no_silent_noise(
    tiny_blip_dir: Path, tiny_vit_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_blip_dir, tmp_path / "blip")
    path = folder / "model.safetensors"
    weights = load_file(path)
    lost = [n for n in weights if n.startswith("text_decoder.") and "crossattention" in n]
    save_file({n: w for n, w in weights.items() if n not in lost}, path, {"format": "pt"})
    assert load(folder).fresh_parameters == {name.removeprefix("text_decoder.") for name in lost}
    with pytest.raises(ConfigurationError, match=f"{len(lost)} parameters start at random"):
        build_captioner(tiny_recipe(tiny_vit_dir, folder, "projection"))


def test_what_cannot_cross_attend_is_refused(
    tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"projection needs a decoder that cross-attends"):
        build_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, "projection"))
    with pytest.raises(ModelError, match="cross-attention of llama decoders is not supported"):
        load(tiny_llama_dir, add_cross_attention=True)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 60, "intermediate_size": 16}
    config = RobertaConfig(**sizes, is_decoder=True, add_cross_attention=True)
    RobertaForCausalLM(config).save_pretrained(tmp_path)
    for meta in (False, True):
        with pytest.raises(ModelError, match="of roberta decoders is not supported: choose BLIP"):
            build_language_model(LanguageModelConfig(name=str(tmp_path)), meta=meta)


@pytest.mark.parametrize(
    ("decoder", "keys"),
    [
        ("blip", "crossattention.self.key"),
        ("bert", "crossattention.self.key"),
        ("cross_gpt2", "crossattention.c_attn"),
    ],
)
def test_an_image_gets_its_keys_once_per_caption(
    decoder: str, keys: str, tiny_vit_dir: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{decoder}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, "projection"))
    calls: list[object] = []
    modules = [m for name, m in model.language_model.named_modules() if name.endswith(keys)]
    for module in modules:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    decode = DecodeSettings(num_beams=3, max_new_tokens=9, min_new_tokens=9)
    start = [model.language_model.start_id]
    captions, _ = generated(model, random_features(model, 2), start, decode)
    assert min(map(len, captions)) == 9
    assert calls == modules


def test_captions_end_where_the_positions_do(tiny_vit_dir: Path, tiny_blip_dir: Path) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_blip_dir, "projection", max_caption_tokens=500)
    model = tiny_captioner(recipe)
    assert model.language_model.max_positions == 64
    format = caption_format(model.language_model, recipe)
    assert len(format.with_targets(*format.targets(["a dog and a girl " * 50])).input_ids) == 64
    start, features = format.prompt_ids, random_features(model, 1)
    generated(model, features, start, DecodeSettings(num_beams=1, max_new_tokens=63))
    with pytest.raises(ConfigurationError, match="than the language model has, 64: ask for fewer"):
        generated(model, features, start, DecodeSettings(num_beams=1, max_new_tokens=64))


def test_the_output_layer_reads_whole_rows(tiny_llama_dir: Path) -> None:
    """Of a strided slice, torch 2.13 takes 800 times as long in bfloat16 on a CPU."""
    model = build_language_model(LanguageModelConfig(name=str(tiny_llama_dir)))
    seen: list[bool] = []
    layer: Any = model.causal_lm.get_output_embeddings()
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    model.causal_lm.generate(torch.tensor([[1, 5, 6]] * 2), max_new_tokens=3)
    assert len(seen) == 3 and all(seen)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_with_its_own_vision_tower_and_the_identity_ours_is_blip(
    tmp_path: Path, drawn_caption_folder: Path, num_beams: int
) -> None:
    folder = str(save_tiny_blip(tmp_path))
    options = {"kind": "projection", "projection": "linear", "standardize_features": False}
    recipe = recipe_from_dict(
        {
            "vision_encoder": {"name": folder},
            "language_model": {"name": folder, "dtype": "float32", "prompt": PROMPT},
            "bridge": options,
            "amp_dtype": "float32",
        }
    )
    model: Any = build_captioner(recipe)
    torch.nn.init.eye_(model.bridge.projection.weight)
    torch.nn.init.zeros_(model.bridge.projection.bias)
    language_model, tokenizer = model.language_model, model.language_model.tokenizer
    format = caption_format(language_model, recipe)
    blip: Any = BlipForConditionalGeneration.from_pretrained(folder).eval()
    images = CaptionFolder.open(drawn_caption_folder).split("test")
    pixels = model.vision_encoder.preprocess([open_image(image.path) for image in images])

    prompt = [tokenizer.cls_token_id, *language_model.encode(PROMPT), tokenizer.sep_token_id]
    rows = blip.generate(
        pixel_values=pixels,
        input_ids=torch.tensor([prompt] * len(images)),
        num_beams=num_beams,
        max_new_tokens=12,
    )
    start, end = len(prompt) - 1, tokenizer.sep_token_id
    assert rows[0, :start].tolist() == format.prompt_ids
    expected = [[*row, end] for row in rows[:, start:].tolist()]
    decode = DecodeSettings(num_beams=num_beams, max_new_tokens=12)
    found, _ = generated(model, model.features(pixels), format.prompt_ids, decode)
    assert found == [row[: row.index(end)] for row in expected]
    assert len(set(map(tuple, found))) > 1, "images that all say the same show nothing"

    tokens, pixels = format.with_targets(*format.targets(["a red square."])), pixels[:1]
    ids = torch.tensor([[*tokens.input_ids, tokens.labels[-1]]])
    labels = torch.tensor([[-100, *tokens.labels]])
    with torch.no_grad():
        expected = blip(pixel_values=pixels, input_ids=ids, labels=labels).loss
        image = model.image_inputs(model.features(pixels))
        ones = torch.ones_like(ids[:, 1:])
        loss = model.caption_loss(ids[:, :-1], torch.tensor([tokens.labels]), ones, image)
    assert loss.total.item() / loss.num_tokens == pytest.approx(expected.item(), rel=1e-5)


TEXTS = [
    "A man </s> sits <s><pad>",
    "two [SEP] dogs [CLS][MASK] [PAD]",
    "<bos>y<eos> <|im_end|><|endoftext|>",
]


def control_ids(tokenizer: Any) -> set[int]:
    roles = ("eos", "bos", "pad", "sep")
    ends = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    return (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}) | (ends - {None})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "blip"])
def test_a_language_model_reads_control_tokens_as_text(
    family: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(f"tiny_{family}_dir"))
    encoded = encode_as_text(tokenizer, TEXTS)
    assert all(ids and control_ids(tokenizer).isdisjoint(ids) for ids in encoded)
    if family in ("llama", "gemma2", "gpt2"):  # BERT's vocabulary of the tests lacks the signs
        assert [tokenizer.decode(ids) for ids in encoded] == TEXTS


def test_tokens_that_were_added_later_are_text_too() -> None:
    tokenizer = build_tokenizer()
    assert encode_as_text(tokenizer, []) == []
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    (ids,) = encode_as_text(tokenizer, ["A dog <|im_end|> runs"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == "A dog <|im_end|> runs"


def test_a_vocabulary_with_control_tokens_as_pieces_gives_none() -> None:
    control = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>")]
    unigram: Any = Tokenizer(
        models.Unigram([*control, *((sign, -5.0) for sign in "Amansit<>/s\u2581")], 0, False)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, **ends)
    marked, plain = encode_as_text(tokenizer, ["A man </s> sits", "A man sits"])
    assert tokenizer.eos_token_id not in marked
    space = tokenizer.convert_tokens_to_ids("\u2581")
    assert [i for i in marked if i != space] == [i for i in plain if i != space]
