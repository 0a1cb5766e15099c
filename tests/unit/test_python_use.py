"""The package as a notebook uses it: lazy names, recipes by name, and a run from photos to scores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_bridge
from captioners import tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge import Captioner, Recipe, evaluate, train, transform
from vlm_bridge.errors import ConfigurationError, DataError, UsageError
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Java takes seconds and is tested with the metrics."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_names_are_imported_when_they_are_used() -> None:
    assert set(vlm_bridge.__all__) <= set(dir(vlm_bridge))
    assert all(getattr(vlm_bridge, name) for name in vlm_bridge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlm_bridge.nothing  # noqa: B018
    program = "import sys, vlm_bridge; print({'torch', 'pydantic', 'PIL'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n"


def test_a_recipe_by_name_with_changes() -> None:
    plain = Recipe.load("lite-flickr8k")
    recipe = Recipe.load(
        "lite-flickr8k", max_steps=3, data_dir=Path("data"), output_dir="runs/x", log_dir="logs",
        bridge={"num_queries": 4}, **{"decode.num_beams": 5},
    )  # fmt: skip
    assert (recipe.max_steps, recipe.data_dir, recipe.log_dir) == (3, "data", "logs")
    assert recipe.checkpoint_dir == "runs/x/checkpoints"
    assert recipe.bridge == plain.bridge.replace(num_queries=4)
    assert recipe.decode == plain.decode.replace(num_beams=5)
    assert Recipe.load(recipe) == recipe
    assert Recipe.load(recipe, max_steps=4) == recipe.replace(max_steps=4)
    for wrong, message in (({"max_step": 3}, "did you mean 'max_steps'"), ({"seed": "x"}, "seed")):
        with pytest.raises(ConfigurationError, match=message):
            Recipe.load("lite-flickr8k", **wrong)
    with pytest.raises(ConfigurationError, match="no recipe at lite-flickr9k"):
        Recipe.load("lite-flickr9k")


def test_from_photos_to_scores(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(20):
        noise(seed).save(photos / f"{seed}.png")
        (photos / f"{seed}.txt").write_text(f"Noise of seed {seed}.")
    done: list[tuple[int, int]] = []
    manifest = transform(
        photos, tmp_path / "data", val_fraction=0.2, progress=lambda *counts: done.append(counts)
    )
    assert manifest["source"] == "local" and done[-1] == (20, 20)
    with pytest.raises(UsageError, match="unknown source 'photos'"):
        transform(photos, tmp_path / "other", source="photos")

    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe("run", f"data_dir={tmp_path / 'data'}").to_yaml())
    assert train(file).steps > 0
    run = evaluate(
        tmp_path / "run", data_dir=tmp_path / "data", limit=2, output_dir=tmp_path / "scores",
        num_beams=2, max_new_tokens=4,
    )  # fmt: skip
    assert run.scores["num_images"] == 2 and run.scores["perplexity"] > 0
    assert (run.metrics["decode"]["num_beams"], run.name) == (2, "run")
    assert (tmp_path / "scores" / "report.html").is_file()
    with pytest.raises(DataError):
        evaluate(data_dir=tmp_path / "nowhere")


def test_the_bundled_captioner_is_scored_by_default(
    tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path, drawn_caption_folder: Path,
    monkeypatch: pytest.MonkeyPatch, run_here: Callable,
) -> None:  # fmt: skip
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"max_new_tokens": 4})
    Captioner(tiny_captioner(recipe), recipe).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(checkpoints, "BUNDLED_FOLDER", tmp_path / "ours")
    run = evaluate(data_dir=drawn_caption_folder, limit=2)
    assert run.metrics["model"] == {"name": "bundled"}
    result = run_here("evaluate", "--data-dir", drawn_caption_folder, "--limit", 2)
    assert result.returncode == 0, result.stderr
    assert f"perplexity\t{run.scores['perplexity']:.4f}\n" in result.stdout
