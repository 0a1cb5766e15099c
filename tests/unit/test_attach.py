"""Attached images: blocks nest, threads do not meet, recomputation sees them, nothing is left."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from captioners import (
    ENTERING_ABOVE,
    LANGUAGE_MODELS,
    SYSTEMS,
    random_features,
    tiny_captioner,
    tiny_recipe,
)
from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.attach import Attached, attach
from vlm_bridge.model_architecture.bridges import (
    ImageInputs,
    KeyValuePrefix,
)
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.weights import build_language_model

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
SEGMENTS = torch.tensor([[1] * 3 + [2] * 3])


@pytest.fixture(params=SYSTEMS, ids="/".join)
def model(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> CaptionModel:
    bridge, language_model = request.param
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    return tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))


def attached_to(model: CaptionModel, image: int):
    inputs = model.image_inputs(random_features(model, 4)[image : image + 1])
    return attach(model.language_model, inputs)


def logits_of(model: CaptionModel, attached: Attached) -> torch.Tensor:
    """Return the logits of the language model's own forward pass."""
    output = model.language_model.causal_lm(**attached.inputs(IDS), use_cache=False)
    return output.logits[:, -IDS.shape[1] :]


@torch.no_grad()
def test_the_models_own_forward_sees_the_image_in_blocks_that_nest(model: CaptionModel) -> None:
    language_model = model.language_model
    bare = language_model.causal_lm(IDS, **language_model.decoder_options).logits
    with attached_to(model, 0) as outer:
        before = logits_of(model, outer)
        with attached_to(model, 1) as inner:
            assert not torch.allclose(logits_of(model, inner), before, atol=1e-3)
        assert torch.equal(logits_of(model, outer), before)
        with pytest.raises(RuntimeError, match="of the user's"), attached_to(model, 1):
            raise RuntimeError("of the user's")
        assert torch.equal(logits_of(model, outer), before)
    assert torch.equal(language_model.causal_lm(IDS, **language_model.decoder_options).logits, bare)
    expected = model(IDS, model.image_inputs(random_features(model, 4)[:1]))
    torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)

    copied = copy.deepcopy(model)
    with attached_to(copied, 0) as attached:
        torch.testing.assert_close(logits_of(copied, attached), before)
        if not model.bridge.num_soft_tokens and not language_model.shape.cross_attention_width:
            # Another language model does not see the image.
            assert torch.equal(language_model.causal_lm(IDS).logits, bare)


@torch.no_grad()
def test_threads_attach_different_images(model: CaptionModel) -> None:
    # Drawn before the threads start: they share torch's generator.
    inputs = [model.image_inputs(one) for one in random_features(model, 4).split(1)]
    expected = []
    for image in inputs:
        with attach(model.language_model, image) as attached:
            expected.append(logits_of(model, attached))
    all_inside = threading.Barrier(len(inputs), timeout=60)

    def forward(image: ImageInputs) -> list[torch.Tensor]:
        with torch.no_grad(), attach(model.language_model, image) as attached:
            all_inside.wait()
            return [logits_of(model, attached) for _ in range(5)]

    with ThreadPoolExecutor(len(inputs)) as threads:
        for found, logits in zip(threads.map(forward, inputs), expected, strict=True):
            assert all(torch.equal(one, logits) for one in found)


def gradients(model: CaptionModel, *, in_a_thread: bool = False) -> list[torch.Tensor]:
    """Return the bridge's gradients, back-propagated after the block, as CUDA in a thread."""
    model.zero_grad(set_to_none=True)
    image = model.image_inputs(random_features(model, 1))
    loss = model.caption_loss(IDS, IDS, SEGMENTS, image).total
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loss.backward).result() if in_a_thread else loss.backward()
    return [p.grad for p in model.bridge.parameters() if p.grad is not None]


def test_checkpointing_changes_no_gradient(model: CaptionModel) -> None:
    expected = gradients(model)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected)
    runs: list[object] = []
    part = next(model.language_model.layers()[-1].children())
    part.register_forward_pre_hook(lambda layer, _: runs.append(layer))
    model.language_model.checkpoint_activations()
    for in_a_thread in (False, True):
        runs.clear()
        found = gradients(model, in_a_thread=in_a_thread)
        assert len(runs) == 2, "the last layer was not computed again"
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# Key-value prefixes.


def load(folder: Path, attention: str = "eager") -> LanguageModel:
    options = {"name": str(folder), "dtype": "float32", "attention": attention}
    return build_language_model(LanguageModelConfig.build(options))


def random_prefix(model: LanguageModel, batch: int, first_layer: int = 0) -> KeyValuePrefix:
    shape = model.shape
    layers = shape.num_layers - first_layer
    states = torch.randn(batch, layers, 2, shape.num_key_value_heads, 3, shape.head_dim)
    return KeyValuePrefix(states, first_layer)


@torch.no_grad()
@pytest.mark.parametrize(
    ("language_model", "attention"),
    [(name, "eager") for name in LANGUAGE_MODELS] + [("llama", "sdpa"), ("gpt2", "sdpa")],
)
def test_a_prefix_is_read_from_its_first_layer_on_and_without_one_nothing_changes(
    language_model: str, attention: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(f"tiny_{language_model}_dir"), attention)
    ids = torch.randint(3, 300, (2, 9))
    mask = model.packed_mask(torch.tensor([[1] * 5 + [2] * 4, [1] * 3 + [2] * 3 + [0] * 3]), 0)
    plain, packed = model.hidden_states(ids), model.hidden_states(ids, attention_mask=mask)
    model.accept_prefix()
    torch.testing.assert_close(model.hidden_states(ids), plain, atol=1e-5, rtol=1e-5)
    again = model.hidden_states(ids, attention_mask=mask)
    torch.testing.assert_close(again, packed, atol=1e-5, rtol=1e-5)

    states = []
    for _ in range(2):
        image = ImageInputs(2, key_value_prefix=random_prefix(model, 2, first_layer=1))
        with attach(model, image):
            states.append(model.causal_lm.base_model(ids, output_hidden_states=True).hidden_states)
    assert torch.equal(states[0][1], states[1][1])  # behind layer 0
    assert not torch.allclose(states[0][2], states[1][2], atol=1e-4)


@torch.no_grad()
def test_eager_and_sdpa_agree_and_rows_share_the_prefix_of_their_image(
    tiny_llama_dir: Path,
) -> None:
    eager, sdpa = load(tiny_llama_dir), load(tiny_llama_dir, "sdpa")
    prefix, ids, states = random_prefix(eager, 2), torch.randint(3, 300, (6, 7)), []
    repeated = KeyValuePrefix(prefix.states.repeat_interleave(3, 0), 0)
    for model in (eager, sdpa):
        model.accept_prefix()
        for image in (prefix, repeated):
            inputs = ImageInputs(len(image.states), key_value_prefix=image)
            with attach(model, inputs):
                states.append(model.hidden_states(ids))
    for other in states[1:]:
        torch.testing.assert_close(states[0], other, atol=1e-5, rtol=1e-5)


def test_a_language_model_that_drops_the_prefix_is_refused(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)  # its attention does not read prefixes before `accept_prefix`
    image = ImageInputs(1, key_value_prefix=random_prefix(model, 1))
    with pytest.raises(ModelError, match="do not read a key-value pref"), attach(model, image):
        model.hidden_states(torch.tensor([[5, 6]]))


# Images that enter above the first layers.


@pytest.fixture(params=[(b, lm) for b in ENTERING_ABOVE for lm in LANGUAGE_MODELS], ids="-".join)
def above(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> CaptionModel:
    bridge, language_model = request.param
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    return tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))


def test_layers_below_run_without_a_graph(above: CaptionModel) -> None:
    needs_gradient = []
    for layer in above.language_model.layers():
        layer.register_forward_hook(lambda *args: needs_gradient.append(args[2].requires_grad))
    above.text_states(IDS, above.image_inputs(random_features(above, 1)))
    assert needs_gradient == [False, True]


@pytest.mark.parametrize(
    "above", [("cross_attention_above", "llama"), ("deep_prefix_above", "gemma2")], indirect=True
)
def test_a_compiled_body_reads_every_image_anew(
    above: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # it compiles a function so many times, for all models together
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    def all_gradients() -> list[torch.Tensor]:
        found = []
        for length in (12, 9, 7):
            segments = torch.tensor([[1] * 5 + [2] * 7, [1] * 4 + [2] * 3 + [0] * 5])[:, :length]
            ids = torch.arange(3, 3 + 2 * length).reshape(2, length)
            above.zero_grad(set_to_none=True)
            image = above.image_inputs(random_features(above, 2) + length)
            loss = above.caption_loss(ids, ids, segments, image).total
            loss.backward()
            found += [loss.detach(), *(p.grad for p in above.bridge.parameters())]
        return found

    expected = all_gradients()
    above.language_model.compile_body()
    torch.testing.assert_close(all_gradients(), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1, "another length or image compiled the body anew"


@torch.no_grad()
def test_layer_0_is_the_published_bridge(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    model, above = (
        tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, bridge))
        for bridge in ("cross_attention", "cross_attention_above")
    )
    # The same parameters under the same names, wherever it enters: checkpoints are laid out alike.
    assert model.trained_state_dict().keys() == above.trained_state_dict().keys()
    ids, image = torch.randint(3, 300, (1, 6)), model.image_inputs(random_features(model, 1))
    edited = image.edit(model.language_model.embed(ids))
    states = model.text_states(ids, image)
    assert torch.equal(states, model.language_model.hidden_states(inputs_embeds=edited))
    assert not torch.allclose(above.text_states(ids, image), states, atol=1e-3)


def test_a_layer_that_is_not_there_is_named(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    model = tiny_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention"))
    model.language_model.text_config.num_hidden_layers = 5  # it has two
    with pytest.raises(ModelError, match=r"bridge\.enter_at_layer=0"):
        model.language_model.open_layer(1)
    with pytest.raises(ModelError, match="gradient_checkpointing=false"):
        model.language_model.checkpoint_activations()
