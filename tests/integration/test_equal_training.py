"""Training is quick by leaving work out, never by changing a result: each step is the plain one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from captioners import SYSTEMS, random_features, tiny_captioner, tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import TokenizedImages, whole_rows
from vlm_bridge.evaluation.run_folder import read_curves
from vlm_bridge.model_architecture.captioner import CaptionModel, caption_format
from vlm_bridge.training_strategy.trainer import train

CAPTIONS = (
    "A small red square on a white background.",
    "Two dogs.",
    "A boy and a girl are playing in a pool of water near a fence.",
)
STEPS, LONG = 2, 100


@pytest.fixture(params=SYSTEMS, ids="-".join)
def recipe(request: pytest.FixtureRequest, tiny_vit_dir: Path) -> Recipe:
    bridge, language_model = request.param
    return tiny_recipe(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)


def plain_loss(model: CaptionModel, data: TokenizedImages, features: torch.Tensor) -> torch.Tensor:
    """As users write it: a row a caption, padded to the longest, with all logits in float32."""
    captions = [
        (image, data.caption(image, number)) for image in range(len(data)) for number in range(3)
    ]
    length = max(len(caption.labels) for _, caption in captions)
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (_, caption) in enumerate(captions):
        ids[row, : len(caption.input_ids)] = torch.tensor(caption.input_ids)
        labels[row, : len(caption.labels)] = torch.tensor(caption.labels)
    image = model.image_inputs(features[torch.tensor([image for image, _ in captions])])
    logits = model(ids, image).float()
    return nn.CrossEntropyLoss(ignore_index=-100)(logits.flatten(0, 1), labels.flatten())


def our_loss(model: CaptionModel, data: TokenizedImages, features: torch.Tensor) -> torch.Tensor:
    """As the trainer does: a row an image, supervised positions alone, in chunks."""
    batch = data.pack(whole_rows(data.captions_per_image))
    ids, labels, segments, supervised = map(
        torch.from_numpy, (batch.input_ids, batch.labels, batch.segments, batch.supervised)
    )
    loss = model.caption_loss(
        ids, labels, segments, model.image_inputs(features), supervised_v=supervised
    )
    return loss.total / batch.num_supervised


def captioned(model: CaptionModel, recipe: Recipe) -> tuple[TokenizedImages, torch.Tensor]:
    """Two images with three captions each, and their features."""
    images = [CaptionedImage(Path(f"{n}.jpg"), CAPTIONS, str(n)) for n in range(2)]
    data = TokenizedImages(images, caption_format(model.language_model, recipe))
    return data, random_features(model, len(data))


def loss_and_gradient(
    loss_of: Any, model: CaptionModel, data: TokenizedImages, features: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradients of all trained parameters as one vector."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, data, features)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.bridge.parameters()])


def distance(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return ((gradient - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_every_step_is_the_plain_one(recipe: Recipe, dtype: str, within: float) -> None:
    model = tiny_captioner(override_recipe(recipe, [f"language_model.dtype={dtype}"]))
    exact = tiny_captioner(recipe)
    data, features = captioned(model, recipe)
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=1e-3)
    for _ in range(STEPS):
        exact.bridge.load_state_dict(model.bridge.state_dict())
        _, exact_gradient = loss_and_gradient(plain_loss, exact, data, features)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            plain, plain_gradient = loss_and_gradient(plain_loss, model, data, features)
            ours, gradient = loss_and_gradient(our_loss, model, data, features)
        assert ours == pytest.approx(plain, rel=within)
        # No step can be nearer to the plain one than the dtype allows.
        allowed = max(within, distance(plain_gradient, exact_gradient))
        assert distance(gradient, plain_gradient) < allowed
        optimizer.step()


def test_100_steps_from_cached_features_are_those_without(
    make_recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    llama = shutil.copytree(tiny_llama_dir, tmp_path / "llama")
    causal_lm = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():  # weights so large that an image matters
        for parameter in causal_lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    causal_lm.save_pretrained(llama)
    losses = {}
    for name, cache in (("plain", "off"), ("cached", tmp_path / "cache")):
        recipe = make_recipe(
            name, f"language_model.name={llama}", f"feature_cache={cache}", f"max_steps={LONG}",
            "num_epochs=99", "learning_rate=5e-3", "validate_every=99 epochs",
            "save_every=99 epochs", bridge="deep_prefix_above",
        )  # fmt: skip
        train(recipe)
        losses[name] = [loss for _, loss in read_curves(Path(recipe.log_dir))["train/loss"]]
    assert len(losses["plain"]) == LONG
    assert losses["plain"][-1] < losses["plain"][0] - 0.5, "nothing was learnt to be spoiled"
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-2)
