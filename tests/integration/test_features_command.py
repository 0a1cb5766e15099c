"""`vlm-bridge features` builds what training reads, prints what it did, and removes old caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from captioners import tiny_recipe
from vlm_bridge.data_pipeline.features import caches_below


@pytest.fixture
def data(drawn_caption_folder: Path, tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns(".features")
    return shutil.copytree(drawn_caption_folder, tmp_path / "data", ignore=ignore)


@pytest.fixture
def recipe_file(data: Path, tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(tiny_vit_dir, tiny_llama_dir, data_dir=str(data)).to_yaml())
    return path


def test_caches_are_built_found_again_and_mended(run_here, recipe_file: Path, data: Path) -> None:
    first = run_here("features", "--config", recipe_file)
    assert first.returncode == 0, first.stderr
    train, val = first.stdout.splitlines()
    assert train.startswith("train: 24 images") and val.startswith("val: 8 images")
    assert str(data / ".features") in train and "made in" in train and "images/s" in train
    second = run_here("features", "--config", recipe_file, "--verify", "--json")
    caches = json.loads(second.stdout)
    assert [cache["was_there"] for cache in caches] == [True, True]
    assert [cache["num_images"] for cache in caches] == [24, 8]
    for path in (data / ".features").glob("*/features.bin"):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    mended = run_here("features", "--config", recipe_file, "--verify")
    assert mended.stdout.count("made in") == 2
    again = run_here("features", "--config", recipe_file, "--verify")
    assert again.stdout.count("was there") == 2


def test_caches_are_evicted_down_to_a_size(run_here, recipe_file: Path, data: Path) -> None:
    run_here("features", "--config", recipe_file)
    root = data / ".features"
    kept = run_here("features", "--config", recipe_file, "--evict-to", "1GiB", "--json")
    assert json.loads(kept.stdout)["removed"] == []
    small = min(caches_below(root).values())
    evicted = run_here("features", "--evict-to", f"{small}B", "--cache-dir", root)
    assert evicted.stdout.count("removed") == len(caches_below(root)) == 1
    assert run_here("features", "--evict-to", "0", "--cache-dir", root).returncode == 0
    assert caches_below(root) == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--evict-to", "5 apples"], "5GiB"),
        (["--cache-dir", "x"], "--evict-to"),
        (["feature_cache=off"], "feature_cache=auto"),
        (["feature_cache_views=-1"], "greater than or equal to 0"),
    ],
)
def test_mistakes_are_named(run_here, recipe_file: Path, arguments: list[str], reason: str) -> None:
    failed = run_here("features", "--config", recipe_file, *arguments)
    assert failed.returncode == 2 and reason in failed.stderr
