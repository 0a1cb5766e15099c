"""Every recipe that ships trains what it names and nothing else, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_bridge.configuration import load_recipe
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy import trainer

RECIPES = sorted((Path(__file__).resolve().parents[2] / "config").glob("*.yaml"))
TINY_ENCODERS = {
    "facebook/dinov2-large": ("tiny_dinov2_dir", 56),
    "OpenGVLab/pvt_v2_b0": ("tiny_pvt_v2_dir", 64),
    "OpenGVLab/pvt_v2_b1": ("tiny_pvt_v2_dir", 64),
    "efficientnet-lite0": (None, 64),  # the real one: its batch norms must not learn
}
TINY_LANGUAGE_MODELS = {
    "google/gemma-2-2b": "tiny_gemma2_dir",
    "Salesforce/blip-image-captioning-base": "tiny_blip_dir",
    "smollm2-135m-instruct": "tiny_llama_dir",
    "models/bert-6x256": "tiny_bert_dir",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_freezes_stays_as_it_is(
    path: Path,
    request: pytest.FixtureRequest,
    drawn_caption_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = load_recipe(path)
    *_, last_encoder = published.vision_encoder.names
    encoder, image_size = TINY_ENCODERS[last_encoder]
    language_model = TINY_LANGUAGE_MODELS[published.language_model.name]
    changes = [
        f"vision_encoder.name={request.getfixturevalue(encoder) if encoder else last_encoder}",
        f"vision_encoder.image_size={image_size}",
        f"language_model.name={request.getfixturevalue(language_model)}",
        f"data_dir={drawn_caption_folder}", f"feature_cache={tmp_path / 'features'}",
        f"checkpoint_dir={tmp_path / 'checkpoints'}", f"log_dir={tmp_path / 'logs'}",
        "captions_per_image=2", "batch_size=8", "gradient_accumulation_steps=1", "max_steps=2",
        "num_epochs=1", "warmup_steps=0", "num_workers=0", "device=cpu", "monitor=loss",
        "decode.num_beams=1", "decode.max_new_tokens=4", "max_validation_images=4",
        "num_validation_samples=1", "scst_samples=4", "start_from=null",
    ]  # fmt: skip
    if getattr(published.bridge, "enter_at_layer", None):  # tiny models have two layers
        changes += ["bridge.enter_at_layer=1", "bridge.num_heads=4"]
    recipe = load_recipe(path, changes)
    assert recipe.trainable == published.trainable

    models = []

    def kept(*arguments: Any) -> CaptionModel:
        models.append(prepare_model(*arguments))
        everything.update([*models[0].named_parameters(), *models[0].named_buffers()])
        before.update({name: tensor.detach().clone() for name, tensor in everything.items()})
        return models[0]

    everything: dict[str, torch.Tensor] = {}
    before: dict[str, torch.Tensor] = {}
    prepare_model = trainer.prepare_model
    monkeypatch.setattr(trainer, "prepare_model", kept)
    assert trainer.train(recipe).steps == 2
    (model,) = models

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name for name, tensor in everything.items() if not torch.equal(tensor, before[name])}
    measured = {name for name in everything if name.startswith(("feature_scale.", "familiarity."))}
    assert changed <= trained | measured
    assert any(name.startswith("bridge.") for name in changed)
    assert any(name.startswith("language_model.") for name in trained) == (
        len(recipe.trainable) > 1
    )
