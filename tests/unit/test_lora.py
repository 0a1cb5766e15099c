"""LoRA adapters in the language model: trained, saved, resumed and started on top of a bridge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from captioners import (
    SYSTEMS,
    generated,
    random_features,
    randomise,
    tiny_captioner,
    tiny_recipe,
)
from logs import saved
from same import assert_same_checkpoints
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import LORA, DecodeSettings, Recipe, override_recipe
from vlm_bridge.errors import CheckpointError, ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train

pytest.importorskip("peft", reason="peft is in the extra lora")
GREEDY = DecodeSettings(num_beams=1, max_new_tokens=6)
SHORT = ("batch_size=16", "decode.max_new_tokens=4", "learning_rate=1e-2", "max_steps=4")
RANK = "language_model.lora.r=4"


def adapters(names: Any) -> set[str]:
    return {name for name in names if ".lora_" in name}


def with_lora(recipe: Recipe, *overrides: str) -> CaptionModel:
    """Return a captioner whose bridge and adapters are random, not the identity."""
    model = tiny_captioner(override_recipe(recipe, (RANK, *overrides)))
    for module in model.modules():
        if hasattr(module, "lora_B"):
            randomise(module.lora_B)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_every_system_reads_the_image_through_adapters(
    bridge: str, language_model: str, tiny_vit_dir: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    layers = "language_model.lora.target_modules=all-linear"
    model = with_lora(tiny_recipe(tiny_vit_dir, folder, bridge), layers)
    features, ids = random_features(model, 3), torch.arange(5, 11).expand(3, -1)
    logits = model(ids, model.image_inputs(features))
    for row in range(3):
        image = model.image_inputs(features[row : row + 1])
        torch.testing.assert_close(model(ids[row : row + 1], image), logits[row : row + 1])
    logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is not None} >= adapters(parameters)
    # Greedy generation with its cache chooses what one pass over everything chooses.
    captions, _ = generated(model, features, [model.language_model.start_id], GREEDY)
    start = model.language_model.start_id
    for row, caption in enumerate(captions):
        read = torch.tensor([[start, *caption]])[:, :-1]
        image = model.image_inputs(features[row : row + 1])
        assert model(read, image)[0].argmax(-1).tolist() == caption


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_start_as_the_identity_and_learn_in_float32(
    dtype: str, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "deep_prefix", dtype)
    plain, model = build_captioner(recipe), build_captioner(override_recipe(recipe, [RANK]))
    features, ids = random_features(plain, 2), torch.arange(5, 11).expand(2, -1)
    expected = plain(ids, plain.image_inputs(features))
    assert torch.equal(model(ids, model.image_inputs(features)), expected)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning.keys() - plain.trained_state_dict().keys() == adapters(learning) != set()
    assert {p.dtype for p in learning.values()} == {torch.float32}
    on_meta = build_captioner(override_recipe(recipe, [RANK]), meta=True)
    assert on_meta.trained_state_dict().keys() == model.trained_state_dict().keys()


def test_dropout_of_adapters_is_on_in_training_alone(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
    model = with_lora(recipe, "language_model.lora.dropout=0.5").train()
    dropouts = [m for n, m in model.named_modules() if ".lora_dropout." in n]
    assert dropouts and all(module.training for module in dropouts)
    assert not any(module.training for module in model.eval().modules())


def test_a_pattern_may_give_adapters_their_own_rate(
    tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    recipe = override_recipe(tiny_recipe(tiny_vit_dir, tiny_llama_dir), [RANK])
    assert recipe.trainable == {"bridge.*": None} and recipe.trained == {
        "bridge.*": None,
        LORA: None,
    }
    own = override_recipe(recipe, ["trainable.*.lora_*=2e-4"])
    assert own.trained == own.trainable == {"bridge.*": None, "*.lora_*": 2e-4}
    build_captioner(own)


@pytest.mark.parametrize(
    "changes", [("gradient_checkpointing=true",), ("weight_averaging=0.9", "amp_dtype=bfloat16")]
)
def test_training_changes_adapters_alone_and_resumes_exactly(
    make_recipe: Any, changes: tuple[str, ...]
) -> None:
    common = (*SHORT, *changes, "save_every=2 steps", "language_model.lora.dropout=0.2")
    whole, recipe, plain = (make_recipe(name, *common) for name in ("whole", "run", "plain"))
    frozen = build_captioner(whole).state_dict()
    train(whole)
    train(recipe, resume=Path(whole.checkpoint_dir, "step_00000002.pth"))
    for name in (checkpoints.LATEST, checkpoints.BEST):
        assert_same_checkpoints(*(Path(r.checkpoint_dir, name) for r in (whole, recipe)))
    weights = saved(whole)["weights"]
    assert adapters(weights) == adapters(frozen) and {n.split(".")[0] for n in weights} == {
        "bridge", "feature_scale", "language_model"
    }  # fmt: skip
    assert adapters(n for n in weights if not torch.equal(weights[n], frozen[n])) == adapters(
        weights
    )

    captioner = Captioner.from_pretrained(whole.checkpoint_dir, "cpu")
    state = captioner.model.state_dict()
    unchanged = state.keys() - weights.keys()
    assert all(torch.equal(state[name], frozen[name]) for name in unchanged)
    without = override_recipe(plain, ["language_model.lora=null"])
    with pytest.raises(CheckpointError, match=r"language_model\.lora=\{'r': 8.* wanted is None"):
        Captioner.from_pretrained(whole.checkpoint_dir, "cpu", recipe=without)


def test_adapters_start_on_top_of_a_checkpoint_without_them(
    make_recipe: Any, tmp_path: Path
) -> None:
    bridge = make_recipe("bridge", *SHORT)
    train(bridge)
    with pytest.raises(CheckpointError, match=r"it has language_model\.lora=None") as refusal:
        train(override_recipe(bridge, [RANK]), resume="auto")
    assert "\n" not in str(refusal.value)
    start = Path(bridge.checkpoint_dir, checkpoints.LATEST)
    still = (RANK, f"start_from={start}", "learning_rate=0", "min_lr=0")
    recipe = make_recipe("run", *SHORT, *still)
    train(recipe)
    weights, before = saved(recipe)["weights"], saved(bridge)["weights"]
    assert weights.keys() - before.keys() == adapters(weights) != set()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not any(weights[n].any() for n in weights if ".lora_B." in n)
    # And a start that has adapters keeps them.
    again = make_recipe(
        "again", *SHORT, *still, f"start_from={recipe.checkpoint_dir}/{checkpoints.LATEST}"
    )
    train(again)
    assert all(torch.equal(saved(again)["weights"][name], weights[name]) for name in weights)


def test_average_and_export_keep_adapters(
    tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    recipe = override_recipe(tiny_recipe(tiny_vit_dir, tiny_llama_dir), [RANK])
    model = with_lora(recipe)
    weights, paths = model.trained_state_dict(), [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path, factor in zip(paths, (1, 3), strict=True):
        changed = {name: factor * tensor for name, tensor in weights.items()}
        checkpoints.save_checkpoint(path, recipe, changed)
    checkpoints.save_average(tmp_path / "mean.pth", paths)
    mean = checkpoints.load_checkpoint(tmp_path / "mean.pth")["weights"]
    for name, tensor in weights.items():
        torch.testing.assert_close(mean[name], 2 * tensor)

    Captioner(model, recipe).save_pretrained(tmp_path / "exported")
    loaded = Captioner.from_pretrained(tmp_path / "exported", "cpu").model
    features = random_features(model, 3)
    assert generated(loaded, features, [loaded.language_model.start_id], GREEDY) == generated(
        model, features, [model.language_model.start_id], GREEDY
    )
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "LoRA adapters" in card


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{target_modules: [nope]}", "LlamaForCausalLM has no layers nope: give target_modules"),
        ("{target_modules: embed_tokens}", "embed_tokens are embeddings or the head"),
        ("{target_modules: [lm_head, q_proj]}", "lm_head, q_proj are embeddings or the head"),
        ("{target_modules: []}", r"target_modules=\[\]"),
        ("{rank: 4}", "unknown key language_model.lora.rank"),
        ("{r: 0}", "language_model.lora.r=0"),
    ],
)
def test_adapters_that_cannot_work_are_one_line(
    tiny_vit_dir: Path, tiny_llama_dir: Path, lora: str, message: str
) -> None:
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir)
    with pytest.raises((ConfigurationError, ModelError), match=message) as refusal:
        build_captioner(override_recipe(recipe, [f"language_model.lora={lora}"]))
    assert "\n" not in str(refusal.value)


def test_a_family_that_peft_does_not_know_and_a_missing_peft_are_one_line(
    tiny_vit_dir: Path, tiny_blip_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override_recipe(tiny_recipe(tiny_vit_dir, tiny_blip_dir, "projection"), [RANK])
    with pytest.raises(
        ModelError, match="BlipTextLMHeadModel has no layers that peft would choose"
    ):
        build_captioner(recipe)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'vlm-bridge\[lora\]'"):
        build_captioner(recipe)
