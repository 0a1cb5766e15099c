"""Attention over [a prefix; the text]: the same numbers as transformers' own, and an image only from its layer on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioners import LANGUAGE_MODELS, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import LanguageModelConfig, recipe_from_dict
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import build_bridge
from vlm_bridge.model_architecture.decoder_loading import build_language_model
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.prefix_attention import KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape


def load(folder: Path, attention: str = "eager") -> LanguageModel:
    config = LanguageModelConfig(name=str(folder), dtype="float32", attention=attention)  # type: ignore[arg-type]
    return build_language_model(config)


def random_prefix(model: LanguageModel, batch: int, first_layer: int = 0, length: int = 3) -> KeyValuePrefix:
    shape = model.shape
    layers = shape.num_layers - first_layer
    states = torch.randn(batch, layers, 2, shape.num_key_value_heads, length, shape.head_dim)
    return KeyValuePrefix(states, first_layer)


@pytest.fixture(params=LANGUAGE_MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_a_prefix_nothing_changes(folder: Path, attention: str) -> None:
    if attention == "sdpa" and "gemma2" in folder.name:
        pytest.skip("transformers has no sdpa for soft-capped attention")
    model = load(folder, attention)
    embedded = model.embed(torch.randint(3, 300, (2, 9)))
    segments = torch.tensor([[1] * 5 + [2] * 4, [1] * 3 + [2] * 3 + [0] * 3])
    inputs = (embedded, model.packed_mask(segments, 0))
    plain, packed = model.hidden_states(embedded), model.hidden_states(*inputs)
    model.accept_prefix()
    torch.testing.assert_close(model.hidden_states(embedded), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.hidden_states(*inputs), packed, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_agree(tiny_llama_dir: Path) -> None:
    prefix = None
    states = []
    ids = torch.randint(3, 300, (2, 7))
    for attention in ("eager", "sdpa"):
        model = load(tiny_llama_dir, attention)
        model.accept_prefix()
        prefix = prefix or random_prefix(model, 2)
        states.append(model.hidden_states(model.embed(ids), prefix=prefix))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_below_the_first_do_not_see_the_image(folder: Path) -> None:
    model = load(folder)
    model.accept_prefix()
    ids = torch.randint(3, 300, (1, 6))

    def states_after_each_layer(prefix: KeyValuePrefix) -> tuple[torch.Tensor, ...]:
        return model.causal_lm.base_model(
            inputs_embeds=model.embed(ids), image_prefix=prefix, output_hidden_states=True
        ).hidden_states

    one, other = (states_after_each_layer(random_prefix(model, 1, first_layer=1)) for _ in range(2))
    assert torch.equal(one[1], other[1])  # behind layer 0
    assert not torch.allclose(one[2], other[2], atol=1e-4)


def test_nothing_is_back_propagated_below_the_first_layer(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix")
    model = tiny_captioner(recipe)
    model.bridge.first_layer = 1
    needs_gradient = []
    for layer in model.language_model.causal_lm.base_model.layers:
        layer.register_forward_hook(
            lambda _m, _i, output: needs_gradient.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    state = model.image_state(random_features(model, 1))
    model.text_states(torch.randint(3, 300, (1, 5)), state[:, 1:])
    assert needs_gradient == [False, True]


@torch.no_grad()
def test_an_untrained_bridge_adds_no_values(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)
    bridge = build_bridge(
        recipe_from_dict({"bridge": {"kind": "deep_prefix", "width": 16}}).bridge, 12, model.shape, 6
    )
    one, other = bridge.encode_image(torch.randn(2, 6, 12))
    assert not torch.allclose(one[:, 0], other[:, 0])  # keys differ, or no gradient would tell queries apart
    assert not one[:, 1].any()


def test_a_layer_that_is_not_there_is_named() -> None:
    recipe = recipe_from_dict({"bridge": {"kind": "deep_prefix", "enter_at_layer": 6}})
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer=6 is beyond .* 5"):
        build_bridge(recipe.bridge, 12, TextShape(32, 6, 2, 8), 6, meta=True)
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer"):
        recipe_from_dict({"bridge": {"kind": "deep_prefix", "enter_at_layer": -1}})


def test_a_language_model_that_drops_the_prefix_is_refused(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)  # its attention does not read prefixes before `accept_prefix`
    with pytest.raises(ModelError, match="does not hand a key-value prefix"):
        model.hidden_states(model.embed(torch.tensor([[5, 6]])), prefix=random_prefix(model, 1))
