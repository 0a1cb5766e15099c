"""Train, resume and evaluate from shards by commands; they teach what the same files teach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from shards import sample, shards_of, write_tar
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import image_size
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.trainer import train


@pytest.fixture
def shards(drawn_caption_folder: Path, tmp_path: Path) -> Path:
    return shards_of(CaptionFolder.open(drawn_caption_folder), tmp_path / "shards")


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(Path(folder) / checkpoints.LATEST)["weights"]


def test_commands_train_resume_and_evaluate(
    run_here, make_recipe, shards: Path, tmp_path: Path
) -> None:
    changes = ("batch_size=4", "save_every=2 steps", "feature_cache=off")
    recipe = make_recipe("whole", f"data_dir={shards}", "captions_per_image=1", *changes)
    (file := tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    trained = run_here("train", "--config", file)
    assert trained.returncode == 0, trained.stderr
    assert "24 images, 24 captions; 6 steps" in trained.stdout + trained.stderr
    step = Path(recipe.checkpoint_dir) / checkpoints.STEP.format(2)
    places = (f"checkpoint_dir={tmp_path / 'again'}", f"log_dir={tmp_path / 'again' / 'logs'}")
    resumed = run_here("train", "--config", file, "--resume", step, *places)
    assert resumed.returncode == 0, resumed.stderr
    first, second = weights(recipe.checkpoint_dir), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)

    # A sample that cannot be used, of a hundred, is skipped.
    many = [member for n in range(110) for member in sample(n)]
    write_tar(shards / "val" / "00009.tar", [*many, ("00999.jpg", b"x")])
    scored = run_here(
        "evaluate", "--checkpoint", recipe.checkpoint_dir, "--data-dir", shards, "--split", "val",
        "--limit", 8, "--device", "cpu", "--output-dir", tmp_path / "scores",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "num_images\t8" in scored.stdout
    assert "skipped 1 of 119 val samples" in scored.stderr
    report = (tmp_path / "scores" / "report.html").read_text()
    assert "are not where they were evaluated" not in report and "data:image/jpeg" in report

    looked = run_here("data", "inspect-loader", "--data-dir", shards, "--all", "--json")
    assert looked.returncode == 0, looked.stderr
    assert len(json.loads(looked.stdout)["set_aside"]) == 1
    grid = tmp_path / "grid.png"
    explored = run_here("data", "explore-dataset", "--data-dir", shards, "--grid", grid, "--json")
    assert explored.returncode == 0, explored.stderr
    assert image_size(grid)[0] > 500
    assert json.loads(explored.stdout)["images_per_split"]["train"] == 24

    changed = run_here("train", "--config", file, "--resume", step, *places)
    assert changed.returncode == 1
    assert "data fingerprint=" in changed.stderr and "--force" in changed.stderr


def test_shards_teach_what_the_same_files_teach(
    drawn_caption_folder: Path, make_recipe, shards: Path, tmp_path: Path
) -> None:
    ignore = shutil.ignore_patterns(".*", "manifest.json")
    files = shutil.copytree(drawn_caption_folder, tmp_path / "files", ignore=ignore)
    for path in files.glob("*/captions.jsonl"):  # shards have one caption an image
        lines = path.read_text().splitlines()
        first = {json.loads(line)["image_path"]: line for line in reversed(lines)}
        path.write_text("".join(f"{line}\n" for line in reversed(first.values())))
    taught = []
    for name, data in (("files", files), ("shards", shards)):
        recipe = make_recipe(name, f"data_dir={data}", "captions_per_image=1")
        train(recipe)
        taught.append(weights(recipe.checkpoint_dir))
    assert all(torch.equal(taught[0][name], taught[1][name]) for name in taught[0])
    # A cache of each split, for both.
    assert len(list((tmp_path / "features").glob("*/features.bin"))) == 2
