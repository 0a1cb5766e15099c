"""An image that enters the language model above its first layers: what lies below is text alone, and runs once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from captioners import (
    BRIDGES,
    ENTERING_ABOVE,
    LANGUAGE_MODELS,
    random_features,
    tiny_captioner,
    tiny_recipe,
)
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.bridges import ImageInputs, TextShape
from vlm_bridge.model_architecture.captioner import CaptionModel, build_bridge, build_captioner

SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 4 + [2] * 4 + [3] * 2 + [0] * 2])


@pytest.fixture(params=[(b, lm) for b in ENTERING_ABOVE for lm in LANGUAGE_MODELS], ids="-".join)
def model(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> CaptionModel:
    bridge, language_model = request.param
    return tiny_captioner(
        tiny_recipe(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)
    )


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 300, SEGMENTS.shape)
    labels = torch.randint(3, 300, SEGMENTS.shape)
    labels[SEGMENTS == 0] = -100
    return ids, labels


def loss_and_gradients(
    model: CaptionModel, loss: Callable[[ImageInputs], torch.Tensor], seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Loss by image, and the gradient of every parameter of the bridge."""
    model.zero_grad(set_to_none=True)
    total = loss(model.image_inputs(random_features(model, 2) + seed))
    total.backward()
    return total.detach(), [p.grad for p in model.bridge.parameters()]


def test_layers_below_run_without_a_graph(model: CaptionModel) -> None:
    needs_gradient = []
    layers = model.language_model.layers("")
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _i, output: needs_gradient.append(output.requires_grad)
        )
    model.text_states(torch.randint(3, 300, (1, 5)), model.image_inputs(random_features(model, 1)))
    assert needs_gradient == [False, True]


def test_checkpointed_activations_change_no_gradient(model: CaptionModel) -> None:
    ids, labels = packed_rows()

    def loss(image: ImageInputs) -> torch.Tensor:
        return model.caption_loss(ids, labels, SEGMENTS, image).total

    whole, gradients = loss_and_gradients(model, loss)
    model.language_model.checkpoint_activations()
    again, same = loss_and_gradients(model, loss)
    torch.testing.assert_close(again, whole)
    for one, other in zip(same, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_compiled_body_reads_every_image_anew(
    model: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # it compiles a function so many times, for all models together
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    def all_gradients() -> list[torch.Tensor]:
        found = []
        for length in (12, 9, 7):
            segments = SEGMENTS[:, :length]
            ids = torch.arange(3, 3 + 2 * length).reshape(2, length)

            def loss(image: ImageInputs) -> torch.Tensor:
                return model.caption_loss(ids, ids, segments, image).total  # noqa: B023

            total, gradients = loss_and_gradients(model, loss, seed=length)
            found += [total, *gradients]
        return found

    expected = all_gradients()
    model.language_model.compile_body()
    for one, other in zip(all_gradients(), expected, strict=True):
        # Its norms are transformers' own.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1, "another length or image compiled the body anew"


@torch.no_grad()
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_untrained_it_is_the_bare_language_model(
    tiny_vit_dir: Path, language_model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = build_captioner(tiny_recipe(tiny_vit_dir, folder, "cross_attention_above"))
    ids = torch.randint(3, 300, (2, 12))
    logits = model(ids, model.image_inputs(random_features(model, 2)))
    torch.testing.assert_close(
        logits, model.language_model.causal_lm(ids).logits, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_layer_0_is_the_published_bridge(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention")
    assert recipe.bridge.enter_at_layer == 0
    model, above = (
        tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, bridge))
        for bridge in ("cross_attention", "cross_attention_above")
    )
    # The same parameters under the same names, wherever it enters: checkpoints are laid out alike.
    assert model.trained_state_dict().keys() == above.trained_state_dict().keys()
    ids, image = torch.randint(3, 300, (1, 6)), model.image_inputs(random_features(model, 1))
    edited = image.edit(model.language_model.embed(ids))
    torch.testing.assert_close(
        model.text_states(ids, image),
        model.language_model.hidden_states(inputs_embeds=edited),
        atol=0,
        rtol=0,
    )
    assert not torch.allclose(
        above.text_states(ids, image), model.text_states(ids, image), atol=1e-3
    )


def test_a_layer_that_is_not_there_is_named() -> None:
    recipe = recipe_from_dict({"bridge": {**BRIDGES["cross_attention"], "enter_at_layer": 6}})
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer=6 is beyond .* 5"):
        build_bridge(recipe.bridge, 12, TextShape(32, 6, 2, 8), 6, meta=True)
    with pytest.raises(ConfigurationError, match=r"bridge\.enter_at_layer"):
        recipe_from_dict({"bridge": {"kind": "cross_attention", "enter_at_layer": -1}})


def test_a_language_model_without_layers_in_sight_is_refused(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention"))
    model.language_model.text_config.num_hidden_layers = 5  # it has two
    with pytest.raises(ModelError, match=r"bridge\.enter_at_layer=0"):
        model.language_model.open_layer(1)
