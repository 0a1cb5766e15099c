"""What `info` says about a recipe: exact counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from captioners import SYSTEMS, tiny_recipe
from vlm_bridge.configuration import (
    load_recipe,
    override_recipe,
    shipped_recipe,
)
from vlm_bridge.model_architecture.budget import budget_of
from vlm_bridge.model_architecture.captioner import build_captioner


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
