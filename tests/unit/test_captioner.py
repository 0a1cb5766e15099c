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


@pytest.fixture
def data(model: CaptionModel, recipe: Recipe) -> TokenizedImages:
    images = [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS, str(n)) for n in range(2)]
    return TokenizedImages(images, caption_format(model.language_model, recipe))


def losses_of_each_caption(
    model: CaptionModel, data: TokenizedImages, batch: PackedBatch
) -> list[torch.Tensor]:
    """Token losses, split by row and caption."""
    losses = caption_loss(model, batch, random_features(model, len(data))).token_losses
    supervised = batch.labels != -100
    rows, positions = np.nonzero(supervised)
    owner = list(zip(rows.tolist(), batch.segments[rows, positions].tolist(), strict=True))
    captions = dict.fromkeys(owner)
    return [losses[torch.tensor([o == caption for o in owner])] for caption in captions]


@torch.no_grad()
def test_later_caption_tokens_change_nothing_before_them(model: CaptionModel) -> None:
    ids = torch.randint(3, 300, (2, 14))
    image = model.image_inputs(random_features(model, 2))
    logits = model(ids, image)
    for t in (0, 5, 12):
        changed = ids.clone()
        changed[:, t + 1 :] = torch.randint(3, 300, (2, 13 - t))
        assert torch.equal(model(changed, image)[:, : t + 1], logits[:, : t + 1])
        assert not torch.equal(model(changed, image), logits)


@torch.no_grad()
def test_later_tokens_change_nothing_in_packed_rows(model: CaptionModel) -> None:
    ids = torch.randint(3, 300, (1, 14))
    segments = torch.tensor([[1] * 6 + [2] * 6 + [0] * 2])
    image = model.image_inputs(random_features(model, 1))
    logits = model(ids, image, segments)
    for t in (2, 8):
        changed = ids.clone()
        changed[:, t + 1 :] = torch.randint(3, 300, (1, 13 - t))
        assert torch.equal(model(changed, image, segments)[:, : t + 1], logits[:, : t + 1])


@torch.no_grad()
def test_the_image_changes_the_logits(model: CaptionModel) -> None:
    ids = torch.randint(3, 300, (1, 6)).expand(2, -1)
    one, other = model(ids, model.image_inputs(random_features(model, 2)))
    assert not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
def test_a_row_of_several_captions_is_worth_as_many_rows(
    model: CaptionModel, data: TokenizedImages
) -> None:
    packed = data.pack([Row(0, (0, 1, 2)), Row(1, (2, 0))])
    alone = [data.pack([Row(0, (c,))]) for c in (0, 1, 2)] + [
        data.pack([Row(1, (c,))]) for c in (2, 0)
    ]
    expected = [losses_of_each_caption(model, data, batch)[0] for batch in alone]
    found = losses_of_each_caption(model, data, packed)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_training_sees_what_generation_sees(model: CaptionModel, data: TokenizedImages) -> None:
    found = losses_of_each_caption(model, data, data.pack([Row(0, (0, 1, 2))]))
    image = model.image_inputs(random_features(model, 2)[:1])
    captions = [data.caption(0, number) for number in range(len(CAPTIONS))]
    for losses, caption in zip(found, captions, strict=True):
        log_probs = model(torch.tensor([caption.input_ids]), image)[0].log_softmax(-1)
        expected = -log_probs[torch.arange(len(caption.labels)), torch.tensor(caption.labels)]
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_captions_of_a_row_do_not_see_each_other(
    model: CaptionModel, data: TokenizedImages
) -> None:
    batch = data.pack([Row(0, (0, 1, 2))])
    before = losses_of_each_caption(model, data, batch)
    first = batch.segments[0] == 1
    batch.input_ids[0, first] = 7
    after = losses_of_each_caption(model, data, batch)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


@torch.no_grad()
def test_pads_change_nothing(model: CaptionModel, data: TokenizedImages) -> None:
    short = data.pack([Row(0, (1,))])
    padded = data.pack([Row(0, (1,)), Row(1, (2,))])
    one, other = (
        losses_of_each_caption(model, data, short)[0],
        losses_of_each_caption(model, data, padded)[0],
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    filled = data.pack([Row(0, (1,)), Row(1, (2,))])
    filled.input_ids[filled.segments == 0] = 9
    assert torch.equal(losses_of_each_caption(model, data, filled)[0], other)


def test_only_the_bridge_learns(model: CaptionModel, data: TokenizedImages) -> None:
    model.train()
    caption_loss(model, data.pack([Row(0, (0, 1))]), random_features(model, 2)).total.backward()
    for name, parameter in model.named_parameters():
        learns = name.startswith("bridge.")
        assert parameter.requires_grad == learns
        assert (
            parameter.grad is not None and parameter.grad.abs().sum() > 0
        ) == learns or "key.bias" in name, name
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
    torch.testing.assert_close(
        logits, model.language_model.causal_lm(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("use_amp", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
    model = tiny_captioner(recipe)
    images = [CaptionedImage(Path("0.jpg"), CAPTIONS, "0")]
    data = TokenizedImages(images, caption_format(model.language_model, recipe))
    with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        loss = caption_loss(model, data.pack([Row(0, (0, 1, 2))]), random_features(model, 1))
    loss.total.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.bridge.parameters())
    exact = tiny_captioner(tiny_recipe(tiny_vit_dir, folder, bridge))
    reference = caption_loss(exact, data.pack([Row(0, (0, 1, 2))]), random_features(exact, 1))
    assert loss.total.item() == pytest.approx(reference.total.item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        captions, _ = generated(model, random_features(model, 1), [1], recipe.decode)
    assert len(captions) == 1


def test_features_are_standardised_by_what_was_measured(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    model = build_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir))
    scale = model.feature_scale
    assert scale is not None
    features = 3 * random_features(model, 8) + 5
    scale.measure(features)
    standardised = scale(features).flatten(0, 1)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(0), torch.ones(32), atol=1e-5, rtol=0)
    assert {"feature_scale.mean", "feature_scale.std"} < model.trained_state_dict().keys()


def test_the_seed_decides_the_bridge(tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_captioner(tiny_recipe(tiny_vit_dir, tiny_llama_dir, seed=seed))
        return model.bridge.resampler.vision_projection.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
