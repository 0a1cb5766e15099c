"""`vlm-bridge info`: what a recipe is made of, without reading any weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from captioners import SYSTEMS, tiny_recipe
from vlm_bridge.cli.info import parts_of
from vlm_bridge.cli.main import app
from vlm_bridge.configuration import load_recipe, shipped_recipe
from vlm_bridge.model_architecture.captioner import build_captioner


def test_json_of_a_recipe(tmp_path: Path, tiny_dinov2_dir: Path, tiny_gemma2_dir: Path) -> None:
    config = tmp_path / "recipe.yaml"
    recipe = tiny_recipe(tiny_dinov2_dir, tiny_gemma2_dir, "cross_attention")
    config.write_text(recipe.to_yaml(), encoding="utf-8")
    # Weights are not needed: only the folders' configuration is read.
    result = CliRunner().invoke(
        app, ["info", "--config", str(config), "--json", "bridge.num_heads=8"]
    )
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert {"components", "trainable_share", "features_shape"} <= shown.keys()
    assert [c["role"] for c in shown["components"]] == [
        "vision_encoder",
        "bridge",
        "language_model",
    ]
    for component in shown["components"]:
        assert component.keys() == {"name", "role", "pretrained", "parameters", "trainable"}
        assert component["trainable"] == (
            component["parameters"] if component["role"] == "bridge" else 0
        )


def test_table_for_people(tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(tiny_recipe(tiny_vit_dir, tiny_llama_dir).to_yaml(), encoding="utf-8")
    result = CliRunner().invoke(app, ["info", "--config", str(config)])
    assert result.exit_code == 0, result.output
    for mention in (
        "vision_encoder",
        "language_model",
        "bridge",
        "10 tokens x 32",
        "trainable share",
    ):
        assert mention in result.stdout


def test_the_lite_models_need_no_weights(tmp_path: Path, run_cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs pip install 'vlm-bridge[lite]'")
    config = tmp_path / "recipe.yaml"
    config.write_text(load_recipe(None).to_yaml(), encoding="utf-8")
    # An empty cache, and no SmolLM2 to convert into it.
    result = run_cli(
        "info", "--config", config, "--json", env={"VLM_BRIDGE_CACHE": str(tmp_path / "cache")}
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    shown = json.loads(result.stdout)
    by_role = {component["role"]: component for component in shown["components"]}
    assert by_role["language_model"]["name"] == "smollm2-135m-instruct"
    assert by_role["language_model"]["parameters"] == 134_515_008
    assert shown["features_shape"] == [49, 1280]
    assert 0 < shown["trainable_share"] < 0.3
    assert not (tmp_path / "cache").exists()


def test_a_mistake_is_a_usage_error(run_here) -> None:
    result = run_here("info", "bridge.kind=telepathy")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "bridge.kind='telepathy' is unknown" in result.stderr


@pytest.mark.parametrize(("bridge", "language_model"), SYSTEMS)
def test_counts_are_those_of_the_real_captioner(
    tiny_vit_dir: Path, bridge: str, language_model: str, request: pytest.FixtureRequest
) -> None:
    recipe = tiny_recipe(
        tiny_vit_dir, request.getfixturevalue(f"tiny_{language_model}_dir"), bridge
    )
    found, model = parts_of(recipe), build_captioner(recipe)
    by_role = {component["role"]: component for component in found["components"]}
    for role, part in (
        ("vision_encoder", model.vision_encoder),
        ("bridge", model.bridge),
        ("language_model", model.language_model),
    ):
        assert by_role[role]["parameters"] == sum(p.numel() for p in part.parameters())
        assert by_role[role]["trainable"] == sum(
            p.numel() for p in part.parameters() if p.requires_grad
        )
    assert by_role["bridge"]["trainable"] == by_role["bridge"]["parameters"]
    total = sum(p.numel() for p in model.parameters())
    assert found["trainable_share"] == pytest.approx(by_role["bridge"]["parameters"] / total)
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
