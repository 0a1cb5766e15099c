"""Attaching an image: it nests, threads do not meet, recomputation sees it, and nothing stays behind."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from captioners import SYSTEMS, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.model_architecture.attach import Attached, attach
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.language_model import LanguageModel

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
    """The language model's own forward pass."""
    return model.language_model.causal_lm(**attached.inputs(IDS), use_cache=False).logits[
        :, -IDS.shape[1] :
    ]


@torch.no_grad()
def test_the_language_models_own_forward_sees_the_image(model: CaptionModel) -> None:
    for image in range(2):
        with attached_to(model, image) as attached:
            found = logits_of(model, attached)
        expected = model(IDS, model.image_inputs(random_features(model, 4)[image : image + 1]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_nest_and_leave_the_model_as_it_was(model: CaptionModel) -> None:
    causal_lm = model.language_model.causal_lm
    bare = causal_lm(IDS, **model.language_model.decoder_options).logits
    with attached_to(model, 0) as outer:
        before = logits_of(model, outer)
        with attached_to(model, 1) as inner:
            assert not torch.allclose(logits_of(model, inner), before, atol=1e-3)
        assert torch.equal(logits_of(model, outer), before)
        with pytest.raises(RuntimeError, match="of the user's"), attached_to(model, 1):
            raise RuntimeError("of the user's")
        assert torch.equal(logits_of(model, outer), before)
    assert torch.equal(causal_lm(IDS, **model.language_model.decoder_options).logits, bare)


@torch.no_grad()
def test_another_language_model_sees_nothing(model: CaptionModel) -> None:
    if model.language_model.shape.cross_attention_width or model.bridge.num_soft_tokens:
        pytest.skip("what it reads is an argument")
    other = tiny_captioner_like(model)
    bare = other.language_model.causal_lm(IDS).logits
    with attached_to(model, 0):
        assert torch.equal(other.language_model.causal_lm(IDS).logits, bare)


def tiny_captioner_like(model: CaptionModel) -> CaptionModel:
    """Another captioner of the same kind, with a language model of its own."""
    causal_lm = type(model.language_model.causal_lm)(
        model.language_model.text_config.__class__.from_dict(
            model.language_model.text_config.to_dict()
        )
    ).eval()
    language_model = LanguageModel(causal_lm, model.language_model.tokenizer)
    return CaptionModel(
        model.vision_encoder, language_model, model.bridge, standardize=False
    ).eval()


@torch.no_grad()
def test_a_copy_of_the_captioner_sees_its_own_image(model: CaptionModel) -> None:
    with attached_to(model, 0) as attached:
        expected = logits_of(model, attached)
    copied = copy.deepcopy(model)
    with attached_to(copied, 0) as attached:
        torch.testing.assert_close(logits_of(copied, attached), expected)


@torch.no_grad()
def test_threads_caption_different_images(model: CaptionModel) -> None:
    images = range(4)
    expected = []
    for image in images:
        with attached_to(model, image) as attached:
            expected.append(logits_of(model, attached))
    # Drawn before the threads start: they share torch's generator.
    inputs = [model.image_inputs(one) for one in random_features(model, 4).split(1)]
    all_inside = threading.Barrier(len(images), timeout=60)

    def forward(image: int) -> list[torch.Tensor]:
        with torch.no_grad(), attach(model.language_model, inputs[image]) as attached:
            all_inside.wait()
            return [logits_of(model, attached) for _ in range(5)]

    with ThreadPoolExecutor(len(images)) as threads:
        for image, found in enumerate(threads.map(forward, images)):
            for logits in found:
                assert torch.equal(logits, expected[image])


def test_threads_generate_captions_of_different_images(model: CaptionModel) -> None:
    features, decode = random_features(model, 4), DecodeSettings(num_beams=2, max_new_tokens=6)
    expected = [model.generate(one, [1], decode)[0].ids for one in features.split(1)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda one: model.generate(one, [1], decode)[0].ids, features.split(1))
    assert list(found) == expected


def gradients(model: CaptionModel, *, in_a_thread: bool = False) -> list[torch.Tensor]:
    """Of the bridge; back-propagated after the block has ended, as on CUDA in a thread that it does not know."""
    model.zero_grad(set_to_none=True)
    loss = model.caption_loss(
        IDS, IDS, SEGMENTS, model.image_inputs(random_features(model, 1))
    ).total
    if in_a_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return [p.grad for p in model.bridge.parameters() if p.grad is not None]


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_checkpointing_changes_no_gradient(model: CaptionModel, in_a_thread: bool) -> None:
    expected = gradients(model)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected)
    runs: list[object] = []
    part = next(model.language_model.layers("")[-1].children())
    part.register_forward_pre_hook(lambda layer, _: runs.append(layer))
    model.language_model.checkpoint_activations()
    found = gradients(model, in_a_thread=in_a_thread)
    assert len(runs) == 2, "the last layer was not computed again"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
