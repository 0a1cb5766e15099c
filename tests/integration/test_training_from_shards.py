"""Train, resume and evaluate from shards by the commands of a user; what is learned is what the same files teach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from captioners import places_of_run, tiny_recipe
from shards import sample, shards_of, write_tar
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder, CaptionFolderWriter, caption_line
from vlm_bridge.data_pipeline.caption_folder import fingerprint as fingerprint_of
from vlm_bridge.data_pipeline.images import image_size
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train


@pytest.fixture
def shards(drawn_caption_folder: Path, tmp_path: Path) -> Path:
    return shards_of(CaptionFolder.open(drawn_caption_folder), tmp_path / "shards")


def recipe_of(
    data: Path, root: Path, name: str, models: tuple[Path, Path], *overrides: str
) -> Recipe:
    recipe = tiny_recipe(
        *models,
        **places_of_run(root, name, data),
        learning_rate=1e-2,
        num_epochs=1,
        batch_size=4,
        early_stopping_patience=None,
        log_every_n_steps=1,
        save_every="2 steps",
        decode={"num_beams": 1, "max_new_tokens": 5},
    )
    return override_recipe(recipe, overrides)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path)["weights"]


def with_one_caption(folder: CaptionFolder, root: Path) -> Path:
    """The same pictures with their first captions only, as shards have them."""
    writer = CaptionFolderWriter(root)
    writer.prepare()
    counts = {}
    for split in folder.splits:
        images = folder.split(split)  # type: ignore[arg-type] - the splits that it has
        lines = []
        for image in images:
            (root / split / "images" / image.path.name).write_bytes(image.path.read_bytes())
            lines.append(caption_line(image.path.name, image.captions[0], image.original_id))
        writer.write_captions(split, lines)
        counts[split] = {"images": len(images)}
    writer.finish({**folder.manifest, "counts": counts, "fingerprint": fingerprint_of({}, {})})
    return root


def test_commands_train_resume_and_evaluate(
    run_here, shards: Path, tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    recipe = recipe_of(
        shards, tmp_path, "whole", (tiny_vit_dir, tiny_llama_dir), "feature_cache=off"
    )
    (file := tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    trained = run_here("train", "--config", file)
    assert trained.returncode == 0, trained.stderr
    checkpoint_dir = Path(recipe.checkpoint_dir)
    assert "24 images, 24 captions; 6 steps" in trained.stdout + trained.stderr
    step = checkpoint_dir / checkpoints.STEP.format(2)
    places = (f"checkpoint_dir={tmp_path / 'again'}", f"log_dir={tmp_path / 'again' / 'logs'}")
    resumed = run_here("train", "--config", file, "--resume", step, *places)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (
        weights(folder / checkpoints.LATEST) for folder in (checkpoint_dir, tmp_path / "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    # A sample that cannot be used, of a hundred, is skipped.
    many = [member for n in range(110) for member in sample(n)]
    write_tar(shards / "val" / "00009.tar", [*many, ("00999.jpg", b"x")])
    scored = run_here(
        "evaluate", "--checkpoint", checkpoint_dir, "--data-dir", shards, "--split", "val", "--limit", 8,
        "--device", "cpu", "--output-dir", tmp_path / "scores",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "num_images\t8" in scored.stdout
    assert "skipped 1 of 119 val samples" in scored.stderr
    assert (
        "are not where they were evaluated" not in (tmp_path / "scores" / "report.html").read_text()
    )
    assert "data:image/jpeg" in (tmp_path / "scores" / "report.html").read_text()

    looked = run_here("data", "inspect-loader", "--data-dir", shards, "--all", "--json")
    assert looked.returncode == 0, looked.stderr
    assert len(json.loads(looked.stdout)["set_aside"]) == 1
    explored = run_here(
        "data", "explore-dataset", "--data-dir", shards, "--grid", tmp_path / "grid.png", "--json"
    )
    assert explored.returncode == 0, explored.stderr
    assert image_size(tmp_path / "grid.png")[0] > 500
    assert json.loads(explored.stdout)["images_per_split"]["train"] == 24

    changed = run_here("train", "--config", file, "--resume", step, *places)
    assert changed.returncode == 1
    assert "data fingerprint=" in changed.stderr and "--force" in changed.stderr


def test_shards_teach_what_the_same_files_teach(
    drawn_caption_folder: Path,
    shards: Path,
    tmp_path: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
) -> None:
    files = with_one_caption(CaptionFolder.open(drawn_caption_folder), tmp_path / "files")
    taught = []
    for name, data in (("files", files), ("shards", shards)):
        recipe = recipe_of(data, tmp_path, name, (tiny_vit_dir, tiny_llama_dir))
        train(recipe)
        taught.append(weights(Path(recipe.checkpoint_dir) / checkpoints.LATEST))
    assert all(torch.equal(taught[0][name], taught[1][name]) for name in taught[0])
    assert (
        len(list((tmp_path / "features").glob("*/features.bin"))) == 2
    )  # a cache of each split, for both
