"""Attention of words: maps over the image's grid, for every bridge and language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captioners import SYSTEMS, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.captioning.explain import (
    Explanation,
    WordAttention,
    attention_panels,
    explain,
    group_words,
    image_attention,
    word_overlays,
)
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.model_architecture.weights import build_language_model

CAPTION = "a small red square, on a white background."
WORDS = ["a", "small", "red", "square", "on", "a", "white", "background"]
ATTENTION = "vlm_bridge.captioning.explain.image_attention"


def tiny(*parts: Any, **changes: Any) -> Captioner:
    recipe = tiny_recipe(*parts, decode={"max_new_tokens": 6}, **changes)
    return Captioner(tiny_captioner(recipe), recipe)


@pytest.fixture(params=SYSTEMS, ids="-".join)
def captioner(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Captioner:
    bridge, language_model = request.param
    return tiny(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def test_each_word_has_a_map_of_the_grid(captioner: Captioner, image: Image.Image) -> None:
    explanation = explain(captioner, image, caption=CAPTION)
    assert [word.word for word in explanation.words] == WORDS
    for word in explanation.words:
        assert word.map.shape == (3, 3) and (word.map >= 0).all()
        assert word.map.sum() == pytest.approx(1)
    assert not np.allclose(explanation.words[1].map, explanation.words[7].map, atol=1e-4)
    explanation = explain(captioner, image)
    assert explanation.caption == captioner.caption([image])[0].caption
    assert explanation.area == (0, 0, 60, 40)


@torch.no_grad()
def test_attention_depends_on_the_own_image_and_earlier_tokens(captioner: Captioner) -> None:
    model, features = captioner.model, random_features(captioner.model, 3)
    ids = torch.randint(5, 100, (3, 8))
    before = model(ids, model.image_inputs(features))
    together = image_attention(model, features, ids)
    assert together.shape == (3, 8, features.shape[1])
    for b in range(3):
        alone = image_attention(model, features[b : b + 1], ids[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-6, rtol=1e-4)
    changed = ids.clone()
    changed[:, 5:] = torch.randint(5, 100, (3, 3))
    other = image_attention(model, features, changed)
    torch.testing.assert_close(together[:, :5], other[:, :5], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(together[:, 5:], other[:, 5:], atol=1e-6)
    assert torch.equal(model(ids, model.image_inputs(features)), before)  # left as it was


@torch.no_grad()
def test_attention_looks_where_its_keys_point(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    """Keys are the features themselves, and queries each token's normalized embedding."""
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention"))
    bridge = model.bridge
    bridge.num_heads = 1
    for layer in (bridge.vision_projection, bridge.key, bridge.query):
        layer.weight.copy_(torch.eye(32))
        layer.bias.zero_()
    model.feature_scale = None
    ids, wanted = torch.tensor([[5, 9, 40]]), [7, 2, 4]
    features = torch.zeros(1, 10, 32)
    features[0, wanted] = 20 * bridge.attention_norm(model.language_model.embed(ids))[0]
    attention = image_attention(model, features, ids)[0]
    assert attention.argmax(-1).tolist() == wanted
    assert (attention.max(-1).values > 0.95).all()


def test_a_token_is_placed_by_the_position_that_predicts_it(
    tiny_vit_dir: Path, tiny_bert_dir: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = tiny(tiny_vit_dir, tiny_bert_dir, "projection")
    # Position t looks at the class token, and at patch t alone behind it.
    attention = torch.eye(10)[1:]
    attention[:, 0] = 1000
    monkeypatch.setattr(ATTENTION, lambda _, __, ids, **___: attention[: ids.shape[1]][None])
    words = explain(captioner, image, caption="a small red square").words
    assert [int(word.map.argmax()) for word in words] == [0, 1, 2, 3]
    assert all(word.map.max() == 1 for word in words)


def test_the_area_of_a_center_crop_is_what_the_encoder_sees(
    tiny_dinov2_dir: Path, tiny_llama_dir: Path, image: Image.Image
) -> None:
    captioner = tiny(tiny_dinov2_dir, tiny_llama_dir)
    area = explain(captioner, image).area  # the middle 56 of 64 pixels
    assert area == pytest.approx((12.5, 2.5, 47.5, 37.5))
    preprocess = captioner.model.vision_encoder.preprocess
    outside = np.asarray(image).copy()
    outside[:, :8] = outside[:, -8:] = 255 - outside[:, :8]
    assert torch.equal(preprocess([image]), preprocess([Image.fromarray(outside)]))


@pytest.mark.parametrize(
    ("language_model", "text"),
    [("llama", "two zebras don't run, near a café."), ("bert", "two cables run, near a pool.")],
)
def test_words_are_joined(language_model: str, text: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = build_language_model(LanguageModelConfig(name=str(folder), dtype="float32"))
    ids = model.encode(text)
    words = group_words(ids, model.decode)
    indices = [index for _, of_word in words for index in of_word]
    assert indices == sorted(set(indices)) and len(words[1][1]) > 1  # a word of several pieces
    expected = text.replace(",", "").rstrip(".").split()
    for (word, of_word), wanted in zip(words, expected, strict=True):
        assert model.decode([ids[i] for i in of_word]).replace(" ", "") == word == wanted
    assert {model.decode([ids[i]]) for i in range(len(ids)) if i not in indices} == {",", "."}


def test_marks_inside_a_word_belong_to_it() -> None:
    """Decoded text may grow shorter with another token: pieces are joined as English is written."""
    pieces = ["the", "dog", "'", "s", "tail", "."]

    def decode(ids: list[int]) -> str:
        return " ".join(pieces[i] for i in ids).replace(" ' s", "'s").replace(" .", ".")

    assert group_words(range(6), decode) == [("the", [0]), ("dog's", [1, 2, 3]), ("tail", [4])]
    assert group_words([], lambda ids: "") == []


def test_overlays_are_bright_where_the_word_looked() -> None:
    grid = np.zeros((2, 4))
    grid[0, 3] = 1
    words = [WordAttention("sun", grid), WordAttention("everywhere", np.full((2, 4), 1 / 8))]
    image = Image.new("RGB", (400, 200), (90, 90, 90))
    explanation = Explanation("sun, everywhere", words, (0, 0, 400, 200))
    sun, even = (np.asarray(x) for x in word_overlays(explanation, image, side=200))
    assert sun.shape == (100, 200, 3)
    rows, columns = np.nonzero((sun.min(-1) < 120) & (sun[..., :2].min(-1) > 150))  # yellow
    assert len(rows) > 100 and rows.max() < 50 and columns.min() > 100
    assert (even == even[0, 0]).all() and even.max() < 150


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (10, 3000), (64, 48)])
def test_any_image_and_caption_can_be_drawn(size: tuple[int, int]) -> None:
    area = (size[0] * 0.25, 0.0, size[0] * 0.75, float(size[1]))
    for caption in ("", "a " * 20, "Wort" * 100, "$x_1 café"):
        words = [WordAttention(word, np.full((7, 7), 1 / 49)) for word in caption.split()]
        sheet = attention_panels(Explanation(caption, words, area), Image.new("RGB", size))
        assert sheet.mode == "RGB"
