"""``vlm-data`` as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import UNFINISHED_NAME, CaptionFolder

RunCLI = Callable[..., "subprocess.CompletedProcess[str]"]
TINY_SCENES = ("--source", "scenes", "--num-train", 4, "--num-val", 2, "--num-test", 2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (30, 20), (index * 20, 90, 30)).save(folder / f"{index}.jpg")
    lines = [f"{index}.jpg\tPicture number {index}." for index in range(12)]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_from_a_folder_of_pictures_to_the_first_batch(
    run_cli: RunCLI, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "3.jpg").write_bytes(b"")
    explored = run_cli(
        "data", "explore-dataset", "--source", "local", "--input-dir", pictures, "--json"
    )
    statistics = json.loads(explored.stdout)
    assert (statistics["images"], statistics["captions"]) == (12, 12)
    assert statistics["picture_width"] == {"min": 30, "median": 30, "p95": 30, "max": 30}
    assert statistics["unreadable"] == [{"id": "3", "reason": "the file is empty"}]

    out = tmp_path / "out"
    done = run_cli(
        "data",
        "transform",
        "--source",
        "local",
        "--input-dir",
        pictures,
        "--output-dir",
        out,
        "--workers",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "3: the file is empty" in done.stdout and "images: 12 of 12" in done.stderr

    inspected = run_cli(
        "data", "inspect-loader", "--data-dir", out, "--all", "--batch-size", 2, "--json"
    )
    result = json.loads(inspected.stdout)
    assert result["pictures_decoded"] == 11 and not result["broken"]
    assert len(result["first_batch"]["rows"]) == 2


def test_the_source_is_found_out_and_links_are_read_where_they_are_allowed(
    run_cli: RunCLI, pictures: Path, tmp_path: Path
) -> None:
    for n in range(4):
        (pictures / f"{n}.jpg").rename(tmp_path / f"{n}.jpg")
        (pictures / f"{n}.jpg").symlink_to(tmp_path / f"{n}.jpg")
    command = ("data", "transform", "--input-dir", pictures, "--workers", 1)
    done = run_cli(*command, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "source: local (captions.tsv)"
    lines = done.stdout.splitlines()
    assert sum("--follow-links" in line for line in lines) == 1
    assert any("4 times a link that leads out" in line for line in lines)
    allowed = run_cli(*command, "--output-dir", tmp_path / "all", "--follow-links", "--json")
    assert sum(counts["images"] for counts in json.loads(allowed.stdout)["counts"].values()) == 12


def test_scenes_need_no_input(run_cli: RunCLI, tmp_path: Path) -> None:
    done = run_cli("data", "transform", *TINY_SCENES, "--output-dir", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["counts"]["train"] == {"images": 4, "captions": 8}
    grid = tmp_path / "new" / "grid.png"
    explored = run_cli("data", "explore-dataset", *TINY_SCENES, "--samples", 3, "--grid", grid)
    assert (
        explored.returncode == 0
        and "images_per_split: {train: 4, val: 2, test: 2}" in explored.stdout
    )
    with Image.open(grid) as picture:
        assert picture.format == "PNG"


def test_inspecting_with_a_recipe_shows_tokens(
    run_cli: RunCLI, drawn_caption_folder: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data_dir: {drawn_caption_folder}\nbatch_size: 4\nlanguage_model:\n  name: {tiny_llama_dir}\n"
    )
    inspected = run_cli("data", "inspect-loader", "--config", recipe, "--json")
    assert inspected.returncode == 0, inspected.stderr
    batch = json.loads(inspected.stdout)["first_batch"]
    assert batch["tokens"]["shape"][0] == len(batch["rows"]) == 4


def test_a_changed_folder_is_noticed(run_cli: RunCLI, tmp_path: Path) -> None:
    run_cli("data", "transform", *TINY_SCENES, "--output-dir", tmp_path / "out")
    picture = next((tmp_path / "out").glob("train/images/*.jpg"))
    whole = picture.read_bytes()
    picture.write_bytes(whole + b"\0")
    changed = run_cli("data", "inspect-loader", "--data-dir", tmp_path / "out", "--all")
    assert changed.returncode == 1 and "fingerprint differs" in changed.stderr
    picture.write_bytes(whole[:500])
    broken = run_cli("data", "inspect-loader", "--data-dir", tmp_path / "out")
    assert broken.returncode == 1 and "1 images" in broken.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_then_the_same_command_continues(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "vlm_bridge",
        "data",
        "transform",
        "--source",
        "scenes",
        "--num-train",
        "1200",
    ]
    command += ["--num-val", "20", "--num-test", "20", "--workers", "2", "--output-dir", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/images/*.jpg"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.05)
    # As a terminal does: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors and "Traceback" not in errors
    assert (out / UNFINISHED_NAME).is_dir() and not (out / "manifest.json").exists()

    subprocess.run(command, check=True, capture_output=True, timeout=120)
    folder = CaptionFolder.open(out)
    assert folder.manifest["counts"]["train"]["images"] == 1200
    assert folder.compute_fingerprint() == folder.fingerprint
    assert not (out / UNFINISHED_NAME).exists()


BAD_INPUT = {
    "missing folder": (["--source", "local", "--input-dir", "missing"], 1),
    "no folder": (["--source", "local"], 2),
    "empty folder": (["--source", "local", "--input-dir", "empty"], 1),
    "not Flickr8k": (["--source", "flickr8k", "--input-dir", "empty"], 1),
    "missing captions": (
        ["--source", "local", "--input-dir", "empty", "--captions-file", "no.csv"],
        1,
    ),
    "bad fraction": (["--source", "local", "--input-dir", "empty", "--val-fraction", "2"], 2),
    "unknown source": (["--source", "flickr9k"], 2),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_line(run_cli: RunCLI, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    arguments, code = BAD_INPUT[case]
    done = run_cli("data", "transform", *arguments, "--output-dir", "out")
    assert done.returncode == code
    assert "Traceback" not in done.stderr and done.stderr.strip()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_output_folder_may_not_hold_something_else(run_cli: RunCLI, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    done = run_cli("data", "transform", *TINY_SCENES, "--output-dir", "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: out is not empty and no caption folder: choose another --output-dir"
    ]


def test_a_folder_of_other_tools_is_inspected(
    run_here: RunCLI, drawn_caption_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "groundcap"
    shutil.copytree(
        drawn_caption_folder, root, ignore=shutil.ignore_patterns(".*", "manifest.json")
    )
    with (root / "val" / "captions.jsonl").open("a") as file:
        file.write("\n")
    as_json = run_here("data", "inspect-loader", "--data-dir", root, "--json")
    assert json.loads(as_json.stdout)["data_dir"] == str(root)
    checked = run_here("data", "inspect-loader", "--data-dir", root, "--all")
    assert (checked.returncode, len(checked.stderr.splitlines())) == (0, 1)  # the progress
    assert "set_aside:" in checked.stdout
    assert "captions.jsonl:17: not a JSON object" in checked.stdout
    explored = run_here("data", "explore-dataset", "--data-dir", root, "--no-grid")
    assert explored.returncode == 0 and "{train: 24, val: 8, test: 8}" in explored.stdout
