"""Decoders that cross-attend: loaded from any folder, split without a change; BLIP is BLIP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, RobertaConfig, RobertaForCausalLM

from captioners import CROSS_ATTENDING, generated, random_features, tiny_captioner, tiny_recipe
from tiny_models import save_tiny_bert, save_tiny_blip
from vlm_bridge.configuration import DecodeSettings, LanguageModelConfig, recipe_from_dict
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import build_captioner, caption_format
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.weights import build_language_model, word_piece_tokenizer

PROMPT = "a picture of"


def load(name: object, **options: Any) -> LanguageModel:
    config = LanguageModelConfig(name=str(name), **{"dtype": "float32", **options})
    return build_language_model(config)


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
    assert blip.vocab_size == 30524
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
    beyond = [model.vocab_size - 1] if decoder == "blip" else []
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


def test_a_bert_without_cross_attention_is_a_language_model(tmp_path: Path) -> None:
    plain = load(save_tiny_bert(tmp_path, cross_attention=False))
    assert plain.shape.cross_attention_width is None
    ids = torch.randint(5, 300, (1, 8))
    changed = ids.clone()
    changed[0, 5:] = 7
    states, other = (plain.hidden_states(x) for x in (ids, changed))
    assert torch.equal(states[:, :5], other[:, :5]), "it must read from left to right"


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("decoder", CROSS_ATTENDING)
def test_an_image_gets_its_keys_once_per_caption(
    decoder: str, num_beams: int, tiny_vit_dir: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{decoder}_dir")
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, "projection"))
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, module in model.language_model.named_modules():
        if name.endswith(("crossattention.self.key", "crossattention.c_attn")):
            module.register_forward_hook(lambda *_, name=name: count(name))
    decode = DecodeSettings(num_beams=num_beams, max_new_tokens=9, min_new_tokens=9)
    start = [model.language_model.start_id]
    captions, _ = generated(model, random_features(model, 2), start, decode)
    assert min(map(len, captions)) == 9
    assert list(calls.values()) == [1, 1]


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
