"""What `info` says about a recipe: exact counts, and memory that grows with what needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioners import SYSTEMS, tiny_recipe
from vlm_bridge.configuration import (
    LanguageModelConfig,
    load_recipe,
    override_recipe,
    shipped_recipe,
)
from vlm_bridge.model_architecture.budget import activation_bytes, budget_of
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.decoder_loading import build_language_model


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_counts_are_those_of_the_real_captioner(
    tiny_vit_dir: Path, bridge: str, language_model: str, request: pytest.FixtureRequest
) -> None:
    recipe = tiny_recipe(
        tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge
    )
    budget, model = budget_of(recipe), build_captioner(recipe)
    by_role = {component.role: component for component in budget.components}
    for role, part in (
        ("vision_encoder", model.vision_encoder),
        ("bridge", model.bridge),
        ("language_model", model.language_model),
    ):
        assert by_role[role].parameters == sum(p.numel() for p in part.parameters())
        assert by_role[role].trainable == sum(
            p.numel() for p in part.parameters() if p.requires_grad
        )
    assert by_role["bridge"].trainable == by_role["bridge"].parameters
    total = sum(p.numel() for p in model.parameters())
    assert budget.trainable_share == pytest.approx(by_role["bridge"].parameters / total)
    assert budget.features_shape == [10, 32]
    assert budget.soft_tokens == (3 if bridge == "prefix" else 0)


def test_the_packaged_language_model_is_counted_without_its_weights(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    # SmolLM2-135M (Ben Allal et al. 2025) without its weights.
    recipe = override_recipe(
        tiny_recipe(tiny_vit_dir, tiny_llama_dir), ["language_model.name=smollm2-135m-instruct"]
    )
    (language_model,) = (c for c in budget_of(recipe).components if c.role == "language_model")
    assert (language_model.parameters, language_model.trainable) == (134_515_008, 0)


@pytest.mark.parametrize(
    ("override", "estimate"),
    [
        ("batch_size=64", "training_gib"),
        ("bridge.width=256", "training_gib"),
        ("language_model.dtype=float32", "captioning_gib"),
        ("decode.num_beams=8", "captioning_gib"),
    ],
)
def test_memory_grows_with_what_needs_it(tiny_vit_dir: Path, override: str, estimate: str) -> None:
    base = override_recipe(
        load_recipe(None),
        [f"vision_encoder.name={tiny_vit_dir}", "language_model.dtype=bfloat16", "bridge.width=64"],
    )
    before, after = budget_of(base).memory, budget_of(override_recipe(base, [override])).memory
    assert all(0.5 < value < 64 for value in (*before.values(), *after.values()))
    assert after[estimate] > before[estimate]


def test_the_published_system_is_counted_without_hub_or_weights() -> None:
    budget = budget_of(load_recipe(shipped_recipe("training-default")))
    assert {component.role: component.parameters for component in budget.components} == {
        "vision_encoder": 304_368_640,
        "bridge": 66_092_544,
        "language_model": 2_614_341_888,
    }
    assert [component.trainable for component in budget.components] == [0, 66_092_544, 0]
    assert f"{budget.trainable_share:.2%}" == "2.21%"
    assert budget.features_shape == [257, 1024]
    assert [(t.batch_size, t.published_gb) for t in budget.training] == [(8, 21), (16, 31)]
    # No logits of a whole batch: less than published, yet the frozen weights alone are 6 GiB.
    assert all(6 < t.gib < t.published_gb for t in budget.training if t.published_gb)
    assert budget.memory["training_gib"] == budget.training[0].gib < budget.training[1].gib


@pytest.mark.parametrize("language_model", ["llama", "gemma2"])
def test_activations_are_what_autograd_saves(
    language_model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    model = build_language_model(LanguageModelConfig(name=str(folder), dtype="bfloat16"))
    rows, tokens = 2, 48
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = torch.randn(rows, tokens, model.embed_dim).bfloat16().requires_grad_()
    mask = model.packed_mask(torch.ones(rows, tokens, dtype=torch.long), 0)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        states = model.hidden_states(inputs_embeds=embedded, attention_mask=mask)
    assert states.requires_grad  # and holds the graph, or storages could be used twice
    estimate = rows * tokens * activation_bytes(model.text_config, tokens, element=2)
    assert sum(saved.values()) == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize(
    "override", ["gradient_checkpointing=true", "quantize_language_model=int8", "batch_size=4"]
)
def test_memory_shrinks_with_every_remedy(override: str) -> None:
    base = load_recipe(shipped_recipe("training-default"))
    before, after = budget_of(base), budget_of(override_recipe(base, [override]))
    assert after.memory["training_gib"] < before.memory["training_gib"] - 1
    assert after.components == before.components
