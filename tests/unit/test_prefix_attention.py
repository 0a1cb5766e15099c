"""Attention over [a prefix; the text]: the same numbers as transformers' own, and an image only from its layer on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioners import LANGUAGE_MODELS, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import LanguageModelConfig, recipe_from_dict
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import ImageInputs, KeyValuePrefix, TextShape
from vlm_bridge.model_architecture.captioner import build_bridge
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.weights import build_language_model


def load(folder: Path, attention: str = "eager") -> LanguageModel:
    config = LanguageModelConfig(name=str(folder), dtype="float32", attention=attention)  # type: ignore[arg-type]
    return build_language_model(config)


def random_prefix(
    model: LanguageModel, batch: int, first_layer: int = 0, length: int = 3
) -> KeyValuePrefix:
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
    ids = torch.randint(3, 300, (2, 9))
    segments = torch.tensor([[1] * 5 + [2] * 4, [1] * 3 + [2] * 3 + [0] * 3])
    inputs = (ids, model.packed_mask(segments, 0))
    plain, packed = model.hidden_states(ids), model.hidden_states(*inputs)
    model.accept_prefix()
    torch.testing.assert_close(model.hidden_states(ids), plain, atol=1e-5, rtol=1e-5)
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
        with attach(model, ImageInputs(2, key_value_prefix=prefix)):
            states.append(model.hidden_states(ids))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_below_the_first_do_not_see_the_image(folder: Path) -> None:
    model = load(folder)
    model.accept_prefix()
    ids = torch.randint(3, 300, (1, 6))

    def states_after_each_layer(prefix: KeyValuePrefix) -> tuple[torch.Tensor, ...]:
        with attach(model, ImageInputs(1, key_value_prefix=prefix)):
            return model.causal_lm.base_model(ids, output_hidden_states=True).hidden_states

    one, other = (states_after_each_layer(random_prefix(model, 1, first_layer=1)) for _ in range(2))
    assert torch.equal(one[1], other[1])  # behind layer 0
    assert not torch.allclose(one[2], other[2], atol=1e-4)


def test_nothing_is_back_propagated_below_the_first_layer(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix_above"))
    needs_gradient = []
    for layer in model.language_model.causal_lm.base_model.layers:
        layer.register_forward_hook(
            lambda _m, _i, output: needs_gradient.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    model.text_states(torch.randint(3, 300, (1, 5)), model.image_inputs(random_features(model, 1)))
    assert needs_gradient == [False, True]


@torch.no_grad()
def test_an_untrained_bridge_adds_no_values(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)
    bridge = build_bridge(
        recipe_from_dict({"bridge": {"kind": "deep_prefix", "width": 16}}).bridge,
        12,
        model.shape,
        6,
    )
    one, other = bridge.encode(torch.randn(2, 6, 12)).key_value_prefix.states
    assert not torch.allclose(
        one[:, 0], other[:, 0]
    )  # keys differ, or no gradient would tell queries apart
    assert not one[:, 1].any()


def test_a_layer_that_is_not_there_is_named() -> None:
    recipe = recipe_from_dict({"bridge": {"kind": "deep_prefix", "enter_at_layer": 6}})
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer=6 is beyond .* 5"):
        build_bridge(recipe.bridge, 12, TextShape(32, 6, 2, 8), 6, meta=True)
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer"):
        recipe_from_dict({"bridge": {"kind": "deep_prefix", "enter_at_layer": -1}})


def test_a_language_model_that_drops_the_prefix_is_refused(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)  # its attention does not read prefixes before `accept_prefix`
    with attach(model, ImageInputs(1, key_value_prefix=random_prefix(model, 1))) as attached:
        model.hidden_states(torch.tensor([[5, 6]]))
        with pytest.raises(ModelError, match="do not read a key-value prefix"):
            attached.check_it_was_read()
