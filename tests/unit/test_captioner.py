"""Invariants of the one forward path of training and captioning, for every bridge and LM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from captioners import (
    LANGUAGE_MODELS,
    SYSTEMS,
    caption_loss,
    generated,
    random_features,
    tiny_captioner,
    tiny_recipe,
)
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import PackedBatch, Row, TokenizedImages
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner, caption_format

CAPTIONS = (
    "A small red square on a white background.",
    "Two dogs.",
    "A boy and a girl are playing in a pool of water near a fence.",
)


@pytest.fixture(params=SYSTEMS, ids="-".join)
def recipe(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Recipe:
    bridge, language_model = request.param
    return tiny_recipe(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)


@pytest.fixture
def model(recipe: Recipe) -> CaptionModel:
    return tiny_captioner(recipe)


def data_of(model: CaptionModel, recipe: Recipe) -> TokenizedImages:
    images = [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS, str(n)) for n in range(2)]
    return TokenizedImages(images, caption_format(model.language_model, recipe))


@pytest.fixture
def data(model: CaptionModel, recipe: Recipe) -> TokenizedImages:
    return data_of(model, recipe)


def losses_of_each_caption(
    model: CaptionModel, data: TokenizedImages, batch: PackedBatch
) -> list[torch.Tensor]:
    """Return token losses, split by row and caption."""
    losses = caption_loss(model, batch, random_features(model, len(data))).token_losses
    rows, positions = np.nonzero(batch.labels != -100)
    owner = list(zip(rows.tolist(), batch.segments[rows, positions].tolist(), strict=True))
    captions = dict.fromkeys(owner)
    return [losses[torch.tensor([o == caption for o in owner])] for caption in captions]


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_change_nothing_before_them_and_the_image_does(
    model: CaptionModel, packed: bool
) -> None:
    segments = torch.tensor([[1] * 6 + [2] * 6 + [0] * 2] * 2) if packed else None
    ids = torch.randint(3, 300, (1, 14)).expand(2, -1)
    image = model.image_inputs(random_features(model, 2))
    logits = model(ids, image, segments)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    for t in (0, 2, 5, 8, 12):
        changed = ids.clone()
        changed[:, t + 1 :] = torch.randint(3, 300, (2, 13 - t))
        found = model(changed, image, segments)
        assert torch.equal(found[:, : t + 1], logits[:, : t + 1])
        assert not torch.equal(found, logits)


@torch.no_grad()
def test_a_row_of_several_captions_is_worth_as_many_rows(
    model: CaptionModel, data: TokenizedImages
) -> None:
    places = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0)]
    alone = [data.pack([Row(image, (caption,))]) for image, caption in places]
    expected = [losses_of_each_caption(model, data, batch)[0] for batch in alone]
    # The second row has pads, and rows of one image are alike.
    batch = data.pack([Row(0, (0, 1, 2)), Row(1, (2, 0))])
    found = losses_of_each_caption(model, data, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    batch.input_ids[batch.segments == 0] = 9  # pads
    for one, other in zip(losses_of_each_caption(model, data, batch), found, strict=True):
        assert torch.equal(one, other)
    batch.input_ids[0, batch.segments[0] == 1] = 7
    changed = losses_of_each_caption(model, data, batch)
    assert not torch.allclose(changed[0], found[0])
    assert all(torch.equal(one, other) for one, other in zip(changed[1:], found[1:], strict=True))


@torch.no_grad()
def test_training_sees_what_generation_sees(model: CaptionModel, data: TokenizedImages) -> None:
    found = losses_of_each_caption(model, data, data.pack([Row(0, (0, 1, 2))]))
    image = model.image_inputs(random_features(model, 2)[:1])
    for number, losses in enumerate(found):
        caption = data.caption(0, number)
        log_probs = model(torch.tensor([caption.input_ids]), image)[0].log_softmax(-1)
        expected = -log_probs[torch.arange(len(caption.labels)), torch.tensor(caption.labels)]
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_only_the_bridge_learns(model: CaptionModel, data: TokenizedImages) -> None:
    model.train()
    caption_loss(model, data.pack([Row(0, (0, 1))]), random_features(model, 2)).total.backward()
    for name, parameter in model.named_parameters():
        learns = name.startswith("bridge.")
        assert parameter.requires_grad == learns
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == learns or "key.bias" in name, name
    assert model.bridge.training
    assert not model.vision_encoder.training
    assert not model.language_model.training


def test_builds_on_the_meta_device(recipe: Recipe, model: CaptionModel) -> None:
    meta = build_captioner(recipe, meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    shapes = {name: tensor.shape for name, tensor in meta.trained_state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.trained_state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("bridge", ["cross_attention", "cross_attention_above"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_untrained_cross_attention_is_the_bare_language_model(
    tiny_vit_dir: Path, language_model: str, bridge: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = build_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    ids = torch.randint(3, 300, (2, 12))
    logits = model(ids, model.image_inputs(random_features(model, 2)))
    bare = model.language_model.causal_lm(ids).logits
    torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "use_amp"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize(
    ("bridge", "language_model"), [system for system in SYSTEMS if system[1] in ("llama", "bert")]
)
def test_trains_and_captions_in_every_precision(
    tiny_vit_dir: Path,
    bridge: str,
    language_model: str,
    dtype: str,
    use_amp: bool,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    recipe = tiny_recipe(tiny_vit_dir, folder, bridge, dtype)
    model, exact = tiny_captioner(recipe), tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    batch = data_of(model, recipe).pack([Row(0, (0, 1, 2))])
    with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        loss = caption_loss(model, batch, random_features(model, 1))
        captions, _ = generated(model, random_features(model, 1), [1], recipe.decode)
    loss.total.backward()
    assert len(captions) == 1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.bridge.parameters())
    reference = caption_loss(exact, batch, random_features(exact, 1))
    assert loss.total.item() == pytest.approx(reference.total.item(), rel=0.02)


def test_features_are_standardized_and_the_seed_decides_the_bridge(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    one, same, other = (
        build_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, seed=seed)) for seed in (0, 0, 1)
    )
    weight, again, different = (
        model.bridge.resampler.vision_projection.weight for model in (one, same, other)
    )
    assert torch.equal(weight, again)
    assert not torch.equal(weight, different)
    scale = one.feature_scale
    assert scale is not None
    features = 3 * random_features(one, 8) + 5
    scale.measure(features)
    flat = scale(features).flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(32), atol=1e-5, rtol=0)
    assert {"feature_scale.mean", "feature_scale.std"} < one.trained_state_dict().keys()
