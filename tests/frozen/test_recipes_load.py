"""Recipes written so far load, and mean what they meant.

No assertion here may change with the code. `data/recipes` holds every key that version 0.1.0
knew: at its default, at another value, and in the flat layout of the published DINOv2 + Gemma-2
system. A key may lose its meaning; it must not be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_bridge.configuration import load_recipe

RECIPES = Path(__file__).parent / "data" / "recipes"
SHIPPED = (
    "blip-pvt-coco", "blip-pvt-coco-small", "blip-pvt-conceptual", "blip-pvt-cpu",
    "blip-pvt-flickr30k", "captioner-flickr8k", "captioner-flickr8k-long",
    "captioner-flickr8k-scst", "captioner-flickr8k-views", "captioner-flickr8k-views-scst",
    "captioner-flickr8k-words", "captioner-flickr8k-words-scst",
    "lite-flickr8k", "quickstart", "scratch-flickr8k", "training-default",
)  # fmt: skip
KEPT = {
    "vision_encoder.name", "vision_encoder.revision", "vision_encoder.image_size",
    "vision_encoder.layers", "language_model.name", "language_model.revision",
    "language_model.dtype", "language_model.prompt", "bridge.kind", "bridge.standardize_features",
    "bridge.num_queries", "bridge.depth", "bridge.width", "bridge.num_heads",
    "bridge.feed_forward_multiplier", "bridge.position_embeddings", "bridge.dropout",
    "bridge.enter_at_layer", "bridge.projection", "decode.num_beams", "decode.max_new_tokens",
    "decode.length_penalty", "decode.do_sample", "decode.temperature", "decode.seed", "data_dir",
    "captions_per_image", "max_caption_tokens", "num_workers", "feature_cache",
    "feature_cache_dtype", "trainable", "learning_rate", "min_lr", "num_epochs", "batch_size",
    "gradient_accumulation_steps", "gradient_clip_val", "weight_decay", "label_smoothing",
    "weight_averaging", "scheduler_type", "warmup_steps", "seed", "objective", "start_from",
    "amp_dtype", "gradient_checkpointing", "device", "monitor", "early_stopping_patience",
    "log_every_n_steps", "num_validation_samples", "checkpoint_dir", "log_dir",
    "resume_from_checkpoint",
}  # fmt: skip
"""Keys that keep their names."""
NAMED_OTHERWISE = {
    "vision_model_name": "vision_encoder.name",
    "language_model_name": "language_model.name",
    "bridge_num_heads": "bridge.num_heads",
    "bridge_dropout": "bridge.dropout",
    "max_length": "max_caption_tokens",
}
"""Flat names of the published system that are other names here."""


def flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and key != "trainable":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def read(path: Path) -> dict[str, Any]:
    return dict(flat(yaml.safe_load(path.read_text(encoding="utf-8"))))


def loaded(path: Path, *overrides: str) -> dict[str, Any]:
    return dict(flat(load_recipe(path, overrides).to_dict()))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_keeps_its_name_and_loads(name: str, repository: Path) -> None:
    load_recipe(repository / "config" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["default", "changed", "self-critical", "distillation"])
def test_a_recipe_with_the_keys_of_before_loads(name: str) -> None:
    before, now = read(RECIPES / f"{name}.yaml"), loaded(RECIPES / f"{name}.yaml")
    before |= {"feature_cache": "off"} if before.get("feature_cache") is False else {}
    before |= {key: float(value) for key, value in before.items() if value == "1e-5"}
    # Keys that give others their value are compared by the tests below.
    for key in ("use_amp", "use_early_stopping", "use_scheduler", "quantize_language_model"):
        if key in before:
            del before[key]
    different = {key: now[key] for key in before.keys() & now.keys() if now[key] != before[key]}
    assert different.keys() <= {"language_model.dtype", "num_decoded_images"}, different
    assert not (before.keys() & KEPT) - now.keys()


def test_defaults_stay() -> None:
    before, now = read(RECIPES / "default.yaml"), dict(flat(load_recipe(None).to_dict()))
    changed = {key: now[key] for key in before.keys() & now.keys() if now[key] != before[key]}
    assert changed.keys() <= {"num_decoded_images"}, changed


def test_a_flat_file_of_the_published_system_loads(repository: Path) -> None:
    before, now = read(RECIPES / "published.yaml"), loaded(RECIPES / "published.yaml")
    default = loaded(repository / "config" / "training-default.yaml")
    for key, value in before.items():
        key = NAMED_OTHERWISE.get(key, key)
        if key in now and key not in ("device", "early_stopping_min_delta"):
            assert now[key] == value, key
    assert now["device"] == "auto"
    for key in ("bridge.kind", "bridge.standardize_features", "decode.max_new_tokens"):
        assert now[key] == default[key]


def test_the_published_system_without_mixed_precision_is_all_float32(tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text("batch_size: 4\nuse_amp: false\n", encoding="utf-8")
    now = loaded(tmp_path / "flat.yaml")
    assert now["language_model.dtype"] == now["feature_cache_dtype"] == "float32"


def test_values_can_be_given_as_on_the_command_line() -> None:
    overrides = ("learning_rate=1e-3", "feature_cache=off", "bridge.num_queries=4", "use_amp=false")
    now = loaded(RECIPES / "default.yaml", *overrides, "trainable.language_model.*=1e-5")
    assert (now["learning_rate"], now["feature_cache"], now["bridge.num_queries"]) == (
        1e-3,
        "off",
        4,
    )
    assert now["trainable"] == {"bridge.*": None, "language_model.*": 1e-5}
