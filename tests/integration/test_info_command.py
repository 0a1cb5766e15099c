"""`vlm-bridge info`: the parts of a recipe, without reading any weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captioners import SYSTEMS, tiny_recipe
from vlm_bridge.cli.tools import parts_of
from vlm_bridge.configuration import load_recipe, shipped_recipe
from vlm_bridge.model_architecture.captioner import build_captioner


def test_json_and_a_table(tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path, run_here) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(tiny_recipe(tiny_vit_dir, tiny_llama_dir).to_yaml(), encoding="utf-8")
    result = run_here("info", "--config", config, "--json", "bridge.num_heads=8")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert {"components", "trainable_share", "features_shape"} <= shown.keys()
    for component in shown["components"]:
        assert component.keys() == {"name", "role", "pretrained", "parameters", "trainable"}
        is_bridge = component["role"] == "bridge"
        assert component["trainable"] == (component["parameters"] if is_bridge else 0)
    table = run_here("info", "--config", config).stdout
    for mention in ("vision_encoder", "language_model", "10 tokens x 32", "trainable share"):
        assert mention in table


def test_the_lite_models_need_no_weights(
    tmp_path: Path, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs pip install 'vlm-bridge[lite]'")
    config = tmp_path / "recipe.yaml"
    config.write_text(load_recipe(None).to_yaml(), encoding="utf-8")
    # An empty cache, and no SmolLM2 to convert into it.
    monkeypatch.setenv("VLM_BRIDGE_CACHE", str(tmp_path / "cache"))
    result = run_here("info", "--config", config, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    by_role = {component["role"]: component for component in shown["components"]}
    assert by_role["language_model"]["parameters"] == 134_515_008
    assert shown["features_shape"] == [49, 1280]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_counts_are_those_of_the_real_captioner(
    tiny_vit_dir: Path, bridge: str, language_model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{language_model}_dir")
    recipe = tiny_recipe(tiny_vit_dir, folder, bridge)
    found, model = parts_of(recipe), build_captioner(recipe)
    for component in found["components"]:
        parameters = list(getattr(model, component["role"]).parameters())
        assert component["parameters"] == sum(p.numel() for p in parameters)
        assert component["trainable"] == sum(p.numel() for p in parameters if p.requires_grad)
    trained = sum(component["trainable"] for component in found["components"])
    total = sum(p.numel() for p in model.parameters())
    assert found["trainable_share"] == pytest.approx(trained / total)
    assert found["features_shape"] == [10, 32]
    assert found["soft_tokens"] == (3 if bridge == "prefix" else 0)


def test_the_published_system_is_counted_without_hub_or_weights() -> None:
    found = parts_of(load_recipe(shipped_recipe("training-default")))
    assert {part["role"]: part["parameters"] for part in found["components"]} == {
        "vision_encoder": 304_368_640,
        "bridge": 66_092_544,
        "language_model": 2_614_341_888,
    }
    assert [part["trainable"] for part in found["components"]] == [0, 66_092_544, 0]
    assert f"{found['trainable_share']:.2%}" == "2.21%"
    assert found["features_shape"] == [257, 1024]
