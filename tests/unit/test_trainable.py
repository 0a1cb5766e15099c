"""Trained parameters: chosen by patterns, at their own rates, with dropout, and all saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from captioners import tiny_recipe
from tiny_models import save_tiny_bert
from vlm_bridge.configuration import Recipe, override_recipe, recipe_from_dict
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.captioner import (
    CaptionModel,
    build_captioner,
    trained_parameters,
)
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.step import adamw

BRIDGE, WHOLE = "bridge.*", "language_model.*"
CROSS_ATTENTION = "language_model.*crossattention*"
HEAD = "language_model.causal_lm.cls.*"
EMBEDDINGS = "language_model.causal_lm.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def recipe(tiny_vit_dir: Path, tiny_bert_dir: Path) -> Recipe:
    return tiny_recipe(tiny_vit_dir, tiny_bert_dir, "projection")


def trained(recipe: Recipe, *patterns: str, **more: Any) -> CaptionModel:
    """Build a captioner whose bridge and patterns are trained, or those of `trainable`."""
    trainable = {"trainable": dict.fromkeys((BRIDGE, *patterns))}
    return build_captioner(recipe_from_dict({**recipe.to_dict(), **trainable, **more}))


def learning(model: CaptionModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def everything_in(model: CaptionModel, part: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if part in name}


def test_patterns_choose_what_learns(recipe: Recipe) -> None:
    bridge_alone = build_captioner(recipe)
    bridge = everything_in(bridge_alone, "bridge.")
    assert learning(bridge_alone) == bridge
    for pattern, part in ((CROSS_ATTENTION, "crossattention"), (WHOLE, "language_model.")):
        model = trained(recipe, pattern)
        assert learning(model) == bridge | everything_in(model, part)


def test_the_first_pattern_that_matches_decides(recipe: Recipe) -> None:
    patterns = {BRIDGE: None, CROSS_ATTENTION: 1e-3, WHOLE: 1e-4}
    found = trained_parameters(trained(recipe, trainable=patterns), patterns)
    assert {pattern for _, _, pattern in found} == patterns.keys()
    for name, _, pattern in found:
        in_decoder = CROSS_ATTENTION if "crossatt" in name else WHOLE
        assert pattern == (BRIDGE if "bridge" in name else in_decoder)
    with pytest.raises(ConfigurationError, match=r"no parameter is left for .*crossattention"):
        trained(recipe, WHOLE, CROSS_ATTENTION)


def test_a_tied_weight_is_known_by_all_its_names(recipe: Recipe) -> None:
    by_head, by_embeddings = trained(recipe, HEAD), trained(recipe, EMBEDDINGS)
    head: Any = by_head.language_model.head_module
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert EMBEDDINGS in learning(by_head) & learning(by_embeddings)
    assert learning(by_embeddings) - everything_in(by_head, "bridge.") == {EMBEDDINGS}


def test_rates_are_relative_to_the_schedule(recipe: Recipe) -> None:
    patterns = {BRIDGE: None, CROSS_ATTENTION: 5e-4, WHOLE: 0.0}
    changed = recipe_from_dict({**recipe.to_dict(), "trainable": patterns, "learning_rate": 1e-3})
    model = build_captioner(changed)
    optimizer, relative = adamw(trained_parameters(model, patterns), changed)
    of_name = {
        name: (rate, group["weight_decay"])
        for group, rate in zip(optimizer.param_groups, relative, strict=True)
        for name in group["param_names"]
    }
    assert of_name.keys() == learning(model)
    parameters = dict(model.named_parameters())
    for name, (rate, decay) in of_name.items():
        expected = 1.0 if "bridge" in name else 0.5 if "crossattention" in name else 0.0
        assert rate == pytest.approx(expected), name
        assert decay == (changed.weight_decay if parameters[name].ndim >= 2 else 0.0), name


@pytest.mark.parametrize(
    ("patterns", "dtype", "message"),
    [
        ([BRIDGE, "language_model.*lora*"], "float32", "no parameter is left for"),
        ([BRIDGE, "vision_encoder.*"], "float32", "reaches into the vision encoder"),
        (["*"], "float32", r"'\*' reaches into the vision encoder"),
        ([BRIDGE, WHOLE], "bfloat16", "small updates are lost: use language_model.dtype=float32"),
        ([WHOLE], "float32", r"start at random and would stay so \(first: bridge\."),
    ],
)
def test_patterns_that_cannot_be_trained_are_refused(
    recipe: Recipe, patterns: list[str], dtype: str, message: str
) -> None:
    recipe = override_recipe(recipe, [f"language_model.dtype={dtype}"])
    with pytest.raises(ConfigurationError, match=message) as refusal:
        trained(recipe, trainable=dict.fromkeys(patterns))
    assert "\n" not in str(refusal.value)


def test_patterns_may_be_given_on_the_command_line(recipe: Recipe) -> None:
    changed = override_recipe(
        recipe, ("trainable.language_model.*=2e-5", "trainable.bridge.*=1e-3")
    )
    assert changed.trainable == {BRIDGE: 1e-3, WHOLE: 2e-5}
    whole = override_recipe(recipe, ("trainable={bridge.*: null}",))
    assert whole.trainable == {BRIDGE: None}
    assert recipe_from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_new_cross_attention_must_be_trained(
    family: str, tiny_vit_dir: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    folder = tiny_gpt2_dir
    if family == "bert":
        folder = save_tiny_bert(tmp_path / "bert", cross_attention=False)
    plain = tiny_recipe(tiny_vit_dir, folder, "projection")
    recipe = override_recipe(plain, ["language_model.add_cross_attention=true"])
    with pytest.raises(ConfigurationError, match=r"would stay so \(first: language_model\..*cross"):
        build_captioner(recipe)
    model, again = (trained(recipe, "language_model.*cross*") for _ in range(2))
    # Parameters that no checkpoint held are in ours.
    fresh = {f"language_model.causal_lm.{name}" for name in model.language_model.fresh_parameters}
    assert fresh and fresh <= model.trained_state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name} does not follow the seed"


@pytest.mark.parametrize(
    ("pattern", "where"), [(BRIDGE, "no"), (CROSS_ATTENTION, "crossattention"), (WHOLE, "")]
)
def test_dropout_acts_where_it_is_trained_and_nowhere_else(
    recipe: Recipe, pattern: str, where: str
) -> None:
    model = trained(recipe, pattern).train()
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    active = {name for name, module in dropouts.items() if module.training}
    assert active == {n for n in dropouts if n.startswith("language_model.") and where in n}
    assert model.bridge.training
    assert not any(module.training for module in model.vision_encoder.modules())
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("pattern", [CROSS_ATTENTION, WHOLE, HEAD])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
    recipe: Recipe, pattern: str, tmp_path: Path
) -> None:
    model, path = trained(recipe, pattern), tmp_path / "checkpoint.pth"
    state = model.trained_state_dict()
    assert state.keys() == learning(model) | {"feature_scale.mean", "feature_scale.std"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.add_(torch.randn_like(parameter))
    checkpoints.save_checkpoint(path, recipe, model.trained_state_dict())
    fresh = trained(recipe, pattern)
    checkpoints.load_weights(fresh, checkpoints.load_checkpoint(path)["weights"], path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    head: Any = fresh.language_model.causal_lm.get_output_embeddings()
    assert head.weight is fresh.language_model.causal_lm.get_input_embeddings().weight
