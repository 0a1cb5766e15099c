"""Words in an image's prompt: of its captions in training, of the encoder's classifier later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioners import (
    BRIDGES,
    TOY_START,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
    toy_captioner,
)
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import DecodeSettings, VisionEncoderConfig, recipe_from_dict
from vlm_bridge.data_pipeline.hints import (
    SHARE_WITHOUT,
    draw_words,
    shared_words,
    swap_words,
    swapped_back,
    with_swapped,
)
from vlm_bridge.data_pipeline.loader import (
    IGNORE_INDEX,
    CaptionFormat,
    TokenizedImages,
    whole_rows,
)
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.generation import ObjectNamer, imagenet_objects
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.wheels import packaged_file
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import prompted

PLAIN = DecodeSettings(num_beams=3, max_new_tokens=10)
needs_lite = pytest.mark.skipif(
    packaged_file("efficientnet-lite0") is None, reason="needs pip install 'vlm-bridge[lite]'"
)


def test_words_are_those_that_two_captions_share() -> None:
    captions = ["A brown dog runs with the ball.", "The dog is running.", "Dogs, a ball, running!"]
    assert shared_words(captions) == ["ball", "dog"]
    assert shared_words([*captions, "A cat."]) == ["ball", "dog"]
    assert shared_words(captions[:1]) == ["ball", "dog"]


def test_draws_follow_from_the_seed_and_are_often_empty() -> None:
    words = ["ball", "dog", "grass"]
    draws = [draw_words(words, 2, [0, number]) for number in range(1000)]
    assert draws == [draw_words(words, 2, [0, number]) for number in range(1000)]
    assert {len(draw) for draw in draws} == {0, 1, 2}
    assert all(len(set(draw)) == len(draw) and set(draw) <= set(words) for draw in draws)
    empty = sum(not draw for draw in draws) / len(draws)
    assert empty == pytest.approx(SHARE_WITHOUT, abs=0.05)
    assert draw_words(words, 0, [0]) == draw_words([], 2, [0]) == []


def test_a_swapped_word_is_another_object_in_prompt_and_caption() -> None:
    names = ["dog", "elephant", "cup of coffee"]
    draws = [swap_words(["dog", "grass"], names, [0, number]) for number in range(600)]
    assert {tuple(draw.items()) for draw in draws} == {
        (), (("elephant", "dog"),), (("cup of coffee", "dog"),)
    }  # fmt: skip
    swapped = {"elephant": "dog"}
    assert with_swapped("A dog and a dogged dog.", swapped) == (
        "An elephant and a dogged elephant."
    )
    assert with_swapped("Dog on grass.", swapped) == "Elephant on grass."
    assert with_swapped("An owl by an oar.", {"cup of coffee": "owl"}) == (
        "A cup of coffee by an oar."
    )
    # Rewards compare with captions of people, which name the dog; what is shown is no dog now.
    assert swapped_back("an elephant chases a dog", swapped) == "an dog chases a _"
    assert swapped_back("a dog runs", {}) == "a dog runs"


def test_words_of_a_training_are_in_the_caption_itself() -> None:
    captions = ("A dog runs on grass.", "The dog is on the grass.", "A brown dog plays.", "Grass.")
    images = [CaptionedImage(Path("x.jpg"), captions, "x")] * 200
    recipe = recipe_from_dict({"prompt_words": 2})
    changed, prompts = prompted(images, recipe)
    texts = [caption for image in changed for caption in image.captions]
    assert len(texts) == len(prompts) == 800
    for text, words in zip(texts, prompts, strict=True):
        assert all(word in text.lower() for word in words)
    assert {w for words in prompts[3::4] for w in words} == {"grass"}
    assert any("dog" not in text for text in texts[::4]) and ["dog", "grass"] in prompts
    assert prompted(images, recipe) == (changed, prompts)


def test_words_stand_before_their_caption_and_are_not_supervised() -> None:
    def encode_all(texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    format = CaptionFormat(encode_all, start_id=1, eos_id=2, prompt="P:")
    image = CaptionedImage(Path("x.jpg"), ("ab", "cd"), "x")
    data = TokenizedImages([image], format, [["dog", "ball"], []])
    named, plain = data.caption(0, 0), data.caption(0, 1)
    assert list(named.input_ids) == [1, *b"dog, ball\nP: ab"]
    assert list(named.labels) == [IGNORE_INDEX] * len(b"dog, ball\nP:") + [*b" ab", 2]
    assert plain == format.with_targets([*b" cd", 2])
    assert data.caption_lengths.tolist() == [len(named.input_ids), len(plain.input_ids)]
    packed = data.pack(whole_rows(data.captions_per_image))
    assert packed.input_ids[0].tolist() == [*named.input_ids, *plain.input_ids]


@pytest.mark.parametrize("bridge", BRIDGES)
def test_captions_with_and_without_words_in_one_batch_are_those_of_each_alone(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, 5)
    hints = [[4, 5], [], [6], [4, 5], []]
    together = model.generate(features, [TOY_START, 3], PLAIN, hints=hints)
    for index, (ids, score) in enumerate(together):
        (alone,) = model.generate(
            features[index : index + 1], [TOY_START, *hints[index], 3], PLAIN, hints=[[]]
        )
        assert (ids, score) == (alone.ids, pytest.approx(alone.score, abs=1e-4))


def test_draws_of_an_image_do_not_depend_on_the_words_of_others() -> None:
    model = toy_captioner("deep_prefix")
    features = random_features(model, 3)
    decode = DecodeSettings(do_sample=True, max_new_tokens=6, seed=3)
    first, second = (
        model.generate(features, [TOY_START], decode, 2, [10, 11, 12], hints=hints)[2:4]
        for hints in ([[4], [], []], [[], [], [5, 6]])
    )
    assert [caption.ids for caption in first] == [caption.ids for caption in second]


@pytest.mark.parametrize("bridge", BRIDGES)
def test_images_with_words_have_weights_of_their_own(
    bridge: str, tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path, tiny_bert_dir: Path
) -> None:
    language_model = tiny_bert_dir if bridge == "projection" else tiny_llama_dir
    recipe = tiny_recipe(tiny_vit_dir, language_model, bridge)
    plain, named = tiny_captioner(recipe), tiny_captioner(recipe)
    with torch.no_grad():
        for parameter in named.bridge.parameters():
            parameter.mul_(1.5)
    paths = {name: tmp_path / f"{name}.pth" for name in ("plain", "named", "both")}
    checkpoints.save_checkpoint(paths["plain"], recipe, plain.trained_state_dict())
    checkpoints.save_checkpoint(paths["named"], recipe, named.trained_state_dict())
    checkpoints.save_average(paths["both"], [paths["named"]], paths["plain"])
    both = Captioner.from_pretrained(paths["both"])
    assert both.recipe.prompt_delta
    features, start = random_features(plain, 2), both.format.prompt_ids
    hints = [[], [7, 8]]
    found = both.model.generate(features, start, PLAIN, hints=hints)
    for index, model in enumerate((plain, named)):
        (alone,) = model.generate(
            features[index : index + 1], start, PLAIN, hints=hints[index : index + 1]
        )
        assert found[index].ids == alone.ids
        assert found[index].score == pytest.approx(alone.score, abs=1e-4)
    # A run that starts from it trains the plain weights, and may leave the difference out.
    content = checkpoints.load_checkpoint(paths["both"])
    checkpoints.restore(plain, content, paths["both"], is_start=True)
    with pytest.raises(checkpoints.CheckpointError, match="prompt_delta"):
        checkpoints.restore(plain, content, paths["both"])


def test_objects_of_the_classifier_are_named_in_the_prompt() -> None:
    model = toy_captioner("deep_prefix")
    features = random_features(model, 2)
    model.object_namer = lambda *_: [["cat"], []]  # type: ignore[assignment]
    model.language_model.encode_all = lambda texts: [
        [4] if text == "cat\n" else [] for text in texts
    ]
    decode = PLAIN.replace(object_threshold=0.5)
    assert model.hints(features, decode) == [[4], []]
    assert model.hints(features, PLAIN) == [[], []]
    named = model.generate(features, [TOY_START], decode)
    assert named == model.generate(features, [TOY_START], PLAIN, hints=[[4], []])


def test_of_an_unlike_image_less_sure_objects_are_named(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    options = {"remembered_images": 2, "unlike_below": 0.9}
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, confidence=options))
    features = random_features(model, 2)
    assert model.familiarity is not None
    model.familiarity.remember(model.bridge_features(features[:1]))
    asked: list[list[float]] = []
    model.object_namer = lambda _, thresholds, __: (  # type: ignore[assignment]
        asked.append(thresholds) or [[], []]
    )
    model.hints(features, PLAIN.replace(object_threshold=0.5, unlike_object_threshold=0.25))
    assert asked == [[0.5, 0.25]]


def test_an_encoder_that_does_not_classify_is_refused(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir))
    needs = r"decode\.object_threshold needs a vision encoder that classif.* set it to 0"
    with pytest.raises(ConfigurationError, match=needs):
        generated(model, random_features(model, 1), [1], PLAIN.replace(object_threshold=0.5))
    with pytest.raises(ConfigurationError, match=needs):
        tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"object_threshold": 0.5}))
    with pytest.raises(ConfigurationError, match=r"decode\.object_threshold"):
        PLAIN.replace(object_threshold=1.5)


def test_recipes_with_the_earlier_bonus_are_read() -> None:
    decode = recipe_from_dict({"decode": {"object_bonus": 12.0, "known_objects": ["dog"]}}).decode
    assert decode == DecodeSettings(known_objects=("dog",))


@needs_lite
def test_classes_are_those_of_the_encoder() -> None:
    encoder: Any = build_vision_encoder(VisionEncoderConfig(name="efficientnet-lite0"))
    namer = ObjectNamer(encoder)
    published = torch.load(Path(packaged_file("efficientnet-lite0") or ""), weights_only=True)
    weight = published["_fc.weight"]
    assert torch.equal(encoder.classifier().weight, weight)
    # An image whose features are those that the classifier looks for, and one without any.
    tabby = weight[281].expand(1, encoder.num_tokens, -1)
    features = torch.cat((tabby * 20, tabby * 0))
    assert namer(features, [0.5, 0.5]) == [["cat"], []]
    assert len(namer(features, [0.0, 0.0])[1]) == 1
    assert namer(features, [0.5, 0.5], known=["cat"]) == [[], []]
    # Side by side, the mean of both counts.
    pair: Any = build_vision_encoder(
        VisionEncoderConfig(name="efficientnet-lite0 + efficientnet-lite0")
    )
    halves = torch.cat((features, features.flip(0)), dim=-1)
    probabilities = ObjectNamer(pair).probabilities(halves)
    of_one = namer.probabilities(features)
    np.testing.assert_allclose(probabilities[0], (of_one[0] + of_one[1]) / 2, atol=1e-5)
    headless = build_vision_encoder(VisionEncoderConfig(name="efficientnet-lite0", layers=[3]))
    with pytest.raises(ConfigurationError, match="last layer"):
        ObjectNamer(headless)


def test_names_of_classes() -> None:
    names = imagenet_objects()
    assert set(names) <= set(range(1000))
    assert names[285] == "cat"
    assert names[151] == names[268] == "dog"
    assert 834 not in names  # a suit
