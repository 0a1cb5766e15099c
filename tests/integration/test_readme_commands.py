"""Every command of README.md runs, in order, on tiny models and drawn images."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from readme import PROGRAMS, README, code_blocks, fenced_blocks, shell_commands
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder

RunHere = Callable[..., "subprocess.CompletedProcess[str]"]

LEFT_OUT = {
    "git clone", "cd", "python3 -m venv", "source", "pip install", "uv sync", "uv pip install",
    "make quickstart", "make caption",  # install, then call a command that is run
    "make captioner",  # seven trainings
    "make bundle",  # exports, which is run, and writes into the sources
    "vlm-bridge demo", "curl",  # the demo serves until it is stopped, and has tests of its own
    "make test",
}  # fmt: skip
"""Beginnings of the commands that are not run here."""
ANSWERS = {"doctor": {0, 1}}
"""Exit codes besides 0 that are no failure: doctor reports what this machine lacks."""

FLICKR8K = Path("datasets/flickr8k")  # below the home folder
FLICKR8K_SPLITS = {"train": "train", "val": "dev", "test": "test"}
WORDINGS = ("{} .", "There is {} .", "Here is {} .", "A picture of {} .", "Somebody drew {} .")

QUICKSTART_SCENES = {"NUM_TRAIN": 12, "NUM_VAL": 4, "NUM_TEST": 6}
QUICKSTART_METRICS = {
    "colour_shape_accuracy", "relation_accuracy", "visual_gain", "CIDEr", "BLEU-4",
    "perplexity", "train_seconds", "total_seconds", "peak_rss_gib",
}  # fmt: skip
WRITTEN = (
    "data/flickr8k/manifest.json",
    "data/mine/manifest.json",
    "runs/lite-flickr8k/checkpoints/latest_checkpoint.pth",
    "runs/lite-flickr8k/val/report.html",
    "runs/mine/checkpoints/latest_checkpoint.pth",
    "runs/quickstart/contact_sheet.png",
    "runs/quickstart/report.html",
    "scores.json",
)


def left_out(words: list[str]) -> str | None:
    """Return the entry of LEFT_OUT that a command begins with."""
    return next((start for start in LEFT_OUT if words[: len(start.split())] == start.split()), None)


def test_every_readme_command_is_run_or_left_out_for_a_reason() -> None:
    commands = [words for code in code_blocks(README, "bash") for words in shell_commands(code)]
    unknown = [w for w in commands if w[0] not in PROGRAMS and not left_out(w)]
    assert [shlex.join(words) for words in unknown] == []
    assert {left_out(words) for words in commands} - {None} == LEFT_OUT
    assert {language for language, _ in fenced_blocks(README)} <= {"", "bash", "python"}


@pytest.fixture
def clone(
    tmp_path: Path,
    repository: Path,
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
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
        write_tiny_recipe(recipe, recipes / recipe.name, tiny_vit_dir, tiny_llama_dir)
    monkeypatch.setattr(
        "vlm_bridge.configuration.shipped_recipes",
        lambda: {file.stem: file for file in recipes.glob("*.yaml")},
    )
    for constant, number in QUICKSTART_SCENES.items():
        monkeypatch.setattr(f"vlm_bridge.quickstart.{constant}", number)

    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"max_new_tokens": 5})
    Captioner(tiny_captioner(recipe), recipe).save_pretrained(tmp_path / "bundled")
    monkeypatch.setattr("vlm_bridge.captioning.BUNDLED", tmp_path / "bundled")

    folder = CaptionFolder.open(drawn_caption_folder)
    counts = {"train": 8, "val": 3, "test": 3}
    splits = {split: folder.split(split)[:count] for split, count in counts.items()}
    write_flickr8k(splits, tmp_path / FLICKR8K)
    write_own_pictures(splits, tmp_path / "pictures")
    photo, other, *holiday = (image.path for image in folder.split("test")[3:7])
    shutil.copy(photo, tmp_path / "photo.jpg")
    Image.open(other).save(tmp_path / "other.png")
    (tmp_path / "holiday").mkdir()
    for path in holiday:
        shutil.copy(path, tmp_path / "holiday")
    return tmp_path


def write_tiny_recipe(
    shipped: Path, tiny: Path, vision_encoder: Path, language_model: Path
) -> None:
    """Copy a recipe with its models replaced, its bridge narrow and its training cut to two steps."""
    recipe = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    recipe["vision_encoder"] = {"name": str(vision_encoder)}
    recipe["language_model"]["name"] = str(language_model)
    recipe["bridge"] |= {"num_heads": 4}
    if recipe["bridge"]["kind"] != "cross_attention":
        recipe["bridge"]["width"] = 16
    if "enter_at_layer" in recipe["bridge"]:
        recipe["bridge"]["enter_at_layer"] = 1  # the tiny models have two layers
    recipe["decode"]["max_new_tokens"] = 5
    recipe["decode"]["object_bonus"] = 0  # the tiny encoder does not classify
    recipe |= {"max_steps": 2, "warmup_steps": 1, "batch_size": 10, "num_workers": 0}
    tiny.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_flickr8k(splits: dict[str, list[CaptionedImage]], root: Path) -> None:
    """Write pictures in Flickr8k's own layout, five captions each."""
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, images in splits.items():
        for image in images:
            shutil.copy(image.path, root / "Images")
            thing = image.captions[0].lower().removesuffix(".")
            lines += [
                f"{image.path.name}#{n}\t{words.format(thing)}\n"
                for n, words in enumerate(WORDINGS)
            ]
        names = "".join(f"{image.path.name}\n" for image in images)
        (root / f"Flickr_8k.{FLICKR8K_SPLITS[split]}Images.txt").write_text(names, encoding="utf-8")
    (root / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")


def write_own_pictures(splits: dict[str, list[CaptionedImage]], root: Path) -> None:
    """Write a folder of pictures with a captions.csv that decides the splits."""
    root.mkdir()
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for split, images in splits.items():
            for image in images:
                shutil.copy(image.path, root)
                table.writerows([image.path.name, caption, split] for caption in image.captions)


def test_readme_runs_from_top_to_bottom(
    clone: Path,
    run_here: RunHere,
    capsys: pytest.CaptureFixture[str],
    tiny_dinov2_dir: Path,
    tiny_gpt2_dir: Path,
) -> None:
    # Whatever models README.md names on a command line, these are used; they differ from the recipes' own.
    stand_ins = {"vision_encoder.name": tiny_dinov2_dir, "language_model.name": tiny_gpt2_dir}

    def as_typed(word: str) -> str:
        key, _, _ = word.partition("=")
        if key in stand_ins:
            return f"{key}={stand_ins[key]}"
        return str(Path(word).expanduser()) if word.startswith("~") else word

    for language, code in fenced_blocks(README):
        if language == "python":
            names: dict[str, Any] = {}
            exec(compile(code, "README.md", "exec"), names)
            lines = capsys.readouterr().out.splitlines()
            assert [line.split()[0] for line in lines] == ["photo.jpg", "other.png"]
            assert names["result"].error is None
        if language != "bash":
            continue
        for program, *words in shell_commands(code):
            if program not in PROGRAMS or left_out([program, *words]):
                continue
            result = run_here(*PROGRAMS[program], *map(as_typed, words))
            allowed = {0} | ANSWERS.get(words[0], set())
            assert result.returncode in allowed, f"{shlex.join([program, *words])}\n{result.stderr}"
            assert "Traceback" not in result.stderr

    missing = [name for name in WRITTEN if not (clone / name).is_file()]
    assert not missing
    metrics = json.loads((clone / "runs/quickstart/metrics.json").read_text(encoding="utf-8"))
    assert metrics.keys() >= QUICKSTART_METRICS
    assert metrics["num_images"] == QUICKSTART_SCENES["NUM_TEST"]
