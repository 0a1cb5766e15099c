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

CROSS_ATTENTION = "language_model.*crossattention*"
HEAD = "language_model.causal_lm.cls.*"
EMBEDDINGS = "language_model.causal_lm.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def recipe(tiny_vit_dir: Path, tiny_bert_dir: Path) -> Recipe:
    return tiny_recipe(tiny_vit_dir, tiny_bert_dir, "projection")


def trained(recipe: Recipe, trainable: dict[str, float | None], *overrides: str) -> CaptionModel:
    changed = recipe_from_dict({**recipe.to_dict(), "trainable": trainable})
    return build_captioner(override_recipe(changed, overrides))


def learning(model: CaptionModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def everything_in(model: CaptionModel, part: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if part in name}


def test_patterns_choose_what_learns(recipe: Recipe) -> None:
    bridge_alone = build_captioner(recipe)
    bridge = everything_in(bridge_alone, "bridge.")
    assert learning(bridge_alone) == bridge
    in_part = trained(recipe, {"bridge.*": None, CROSS_ATTENTION: None})
    assert learning(in_part) == bridge | everything_in(in_part, "crossattention")
    whole = trained(recipe, {"bridge.*": None, "language_model.*": None})
    assert learning(whole) == bridge | everything_in(whole, "language_model.")


def test_the_first_pattern_that_matches_decides(recipe: Recipe) -> None:
    patterns = {"bridge.*": None, CROSS_ATTENTION: 1e-3, "language_model.*": 1e-4}
    found = trained_parameters(trained(recipe, patterns), patterns)
    assert {pattern for _, _, pattern in found} == patterns.keys()
    for name, _, pattern in found:
        in_decoder = CROSS_ATTENTION if "crossatt" in name else "language_model.*"
        assert pattern == ("bridge.*" if "bridge" in name else in_decoder)
    with pytest.raises(
        ConfigurationError, match=r"no parameter is left for the pattern .*crossattention"
    ):
        trained(recipe, {"bridge.*": None, "language_model.*": 1e-4, CROSS_ATTENTION: 1e-3})


def test_a_tied_weight_is_known_by_all_its_names(recipe: Recipe) -> None:
    by_head, by_embeddings = (
        trained(recipe, {"bridge.*": None, pattern: None}) for pattern in (HEAD, EMBEDDINGS)
    )
    head: Any = by_head.language_model.head_module
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert EMBEDDINGS in learning(by_head) & learning(by_embeddings)
    assert learning(by_embeddings) - everything_in(by_head, "bridge.") == {EMBEDDINGS}


def test_rates_are_relative_to_the_schedule(recipe: Recipe) -> None:
    patterns = {"bridge.*": None, CROSS_ATTENTION: 5e-4, "language_model.*": 0.0}
    changed = recipe_from_dict({**recipe.to_dict(), "trainable": patterns, "learning_rate": 1e-3})
    model = build_captioner(changed)
    optimizer, relative = adamw(trained_parameters(model, patterns), changed)
    of_name = {
        name: (rate, group["weight_decay"])
        for group, rate in zip(optimizer.param_groups, relative, strict=True)
        for name in group["param_names"]
    }
    assert of_name.keys() == learning(model)
    sizes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    for name, (rate, decay) in of_name.items():
        expected = 1.0 if "bridge" in name else 0.5 if "crossattention" in name else 0.0
        assert rate == pytest.approx(expected), name
        assert decay == (changed.weight_decay if sizes[name] >= 2 else 0.0), name


@pytest.mark.parametrize(
    ("trainable", "overrides", "message"),
    [
        ({"bridge.*": None, "language_model.*lora*": None}, (), "no parameter is left for"),
        ({"bridge.*": None, "vision_encoder.*": None}, (), "reaches into the vision encoder"),
        ({"*": None}, (), r"'\*' reaches into the vision encoder"),
        ({"bridge.*": None, "language_model.*": None}, ("language_model.dtype=bfloat16",),
         "small updates are lost: use language_model.dtype=float32"),
        ({"language_model.*": None}, (), r"start at random and would stay so \(first: bridge\."),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_trained_are_refused(
    recipe: Recipe, trainable: dict, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as refusal:
        trained(recipe, trainable, *overrides)
    assert "\n" not in str(refusal.value)


def test_patterns_may_be_given_on_the_command_line(recipe: Recipe) -> None:
    changed = override_recipe(
        recipe, ("trainable.language_model.*=2e-5", "trainable.bridge.*=1e-3")
    )
    assert changed.trainable == {"bridge.*": 1e-3, "language_model.*": 2e-5}
    whole = override_recipe(recipe, ("trainable={bridge.*: null}",))
    assert whole.trainable == {"bridge.*": None}
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
    patterns: dict[str, float | None] = {"bridge.*": None, "language_model.*cross*": None}
    model, again = trained(recipe, patterns), trained(recipe, patterns)
    # Parameters that no checkpoint held are in ours.
    fresh = {f"language_model.causal_lm.{name}" for name in model.language_model.fresh_parameters}
    assert fresh and fresh <= model.trained_state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name} does not follow the seed"


def test_dropout_acts_where_it_is_trained_and_nowhere_else(recipe: Recipe) -> None:
    for pattern, where in (
        (None, "nowhere"),
        (CROSS_ATTENTION, "crossattention"),
        ("language_model.*", ""),
    ):
        model = trained(recipe, {"bridge.*": None, **({pattern: None} if pattern else {})})
        model.train()
        dropouts = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
        active = {name for name, module in dropouts.items() if module.training}
        in_decoder = {name for name in dropouts if name.startswith("language_model.")}
        assert active == {name for name in in_decoder if where in name}
        assert model.bridge.training
        assert not any(module.training for module in model.vision_encoder.modules())
        model.eval()
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("pattern", [CROSS_ATTENTION, "language_model.*", HEAD])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
    recipe: Recipe, pattern: str, tmp_path: Path
) -> None:
    model = trained(recipe, {"bridge.*": None, pattern: None})
    state = model.trained_state_dict()
    assert state.keys() == learning(model) | {"feature_scale.mean", "feature_scale.std"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.add_(torch.randn_like(parameter))
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint(path, recipe, model.trained_state_dict())
    fresh = trained(recipe, {"bridge.*": None, pattern: None})
    checkpoints.restore(fresh, checkpoints.load_checkpoint(path), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    head: Any = fresh.language_model.causal_lm.get_output_embeddings()
    assert head.weight is fresh.language_model.causal_lm.get_input_embeddings().weight
