"""What `info` says about a recipe: exact counts, and memory that grows with what needs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from captioners import BRIDGES, tiny_recipe
from vlm_bridge.configuration import load_recipe, override_recipe
from vlm_bridge.model_architecture.budget import budget_of
from vlm_bridge.model_architecture.captioner import build_captioner


@pytest.mark.parametrize("language_model", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("bridge", BRIDGES)
def test_counts_are_those_of_the_real_captioner(
    tiny_vit_dir: Path, bridge: str, language_model: str, request: pytest.FixtureRequest
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge)
    budget, model = budget_of(recipe), build_captioner(recipe)
    by_role = {component.role: component for component in budget.components}
    for role, part in (
        ("vision_encoder", model.vision_encoder),
        ("bridge", model.bridge),
        ("language_model", model.language_model),
    ):
        assert by_role[role].parameters == sum(p.numel() for p in part.parameters())
        assert by_role[role].trainable == sum(p.numel() for p in part.parameters() if p.requires_grad)
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
