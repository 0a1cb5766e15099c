"""``vlm-data`` on GroundCap as a user types it; the source is the default, and no network is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from groundcap import write_groundcap
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 frames of 20 films in the published schema."""
    return write_groundcap(tmp_path_factory.mktemp("groundcap"), train=400, test=100, films=20)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_published_numbers_without_any_data(run_here: Run) -> None:
    done = run_here("data", "transform", "--dry-run", "--num-rows", 52350)
    assert done.returncode == 0, done.stderr
    assert "images: {train: 41880, val: 2618, test: 7852}" in done.stdout
    assert "steps_per_epoch: 5235" in done.stdout
    outlook = json.loads(
        run_here("data", "transform", "--dry-run", "--num-rows", 52350, "--json").stdout
    )
    assert outlook["images"] == {"train": 41880, "val": 2618, "test": 7852}
    assert not list(Path().iterdir())


def test_from_parquet_to_the_first_batch(run_here: Run, dataset: Path) -> None:
    explored = run_here("data", "explore-dataset", "--source-path", dataset, "--samples", 3)
    assert explored.returncode == 0, explored.stderr
    for part in ("rows: {test: 100, train: 400}", "list<element: struct<id: int32", "meaning: objects", "films: 20",
                 "words_per_caption", "tokens_per_caption: null"):  # fmt: skip
        assert part in explored.stdout
    with Image.open("runs/explore/groundcap.png") as grid:
        assert grid.format == "PNG"

    done = run_here(
        "data",
        "transform",
        "--source-path",
        dataset,
        "--output-dir",
        "data/groundcap",
        "--workers",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "train: {images: 400, captions: 400}" in done.stdout
    assert "CC-BY-4.0" in done.stdout and "images: 500 of 500" in done.stderr
    caption = CaptionFolder.open("data/groundcap").split("train")[0].captions[0]
    assert "<" not in caption and "&amp;" not in caption

    inspected = run_here(
        "data", "inspect-loader", "--data-dir", "data/groundcap", "--all", "--json"
    )
    assert inspected.returncode == 0, inspected.stderr
    result = json.loads(inspected.stdout)
    assert result["pictures_decoded"] == 500 and not result["broken"]
    assert (
        result["first_batch"]["batches_per_epoch"] == 50 and len(result["first_batch"]["rows"]) == 8
    )


def test_a_dry_run_of_the_files_says_what_the_transformation_makes(
    run_here: Run, dataset: Path
) -> None:
    arguments = ("data", "transform", "--source-path", dataset, "--dry-run", "--json")
    assert json.loads(run_here(*arguments).stdout)["images"] == {
        "train": 400,
        "val": 25,
        "test": 75,
    }
    official = json.loads(run_here(*arguments, "--split", "official").stdout)
    assert official["images"]["test"] == 100 and official["images"]["val"] > 0
    by_image = json.loads(
        run_here(*arguments, "--split-by", "image", "--test-fraction", 0.2).stdout
    )
    assert by_image["images"] == {"train": 375, "val": 25, "test": 100}


def test_tokens_are_counted_with_a_tokenizer(
    run_here: Run, dataset: Path, tiny_llama_dir: Path
) -> None:
    arguments = ("data", "explore-dataset", "--source-path", dataset, "--no-grid")
    counted = json.loads(run_here(*arguments, "--tokenizer", tiny_llama_dir, "--json").stdout)
    assert counted["tokens_per_caption"]["min"] > counted["words_per_caption"]["min"]
    missing = run_here(*arguments, "--tokenizer", "no/such-tokenizer", "--samples", 0)
    assert missing.returncode == 1
    assert "cannot load the tokenizer 'no/such-tokenizer'" in missing.stderr
    assert not list(Path().iterdir())


def test_tags_are_kept_on_request(run_here: Run, dataset: Path) -> None:
    arguments = ("--source-path", dataset, "--keep-tags")
    run_here("data", "transform", *arguments, "--output-dir", "out", "--limit", 2)
    assert CaptionFolder.open("out").split("train")[0].captions[0].startswith("<gdo ")
    shown = run_here("data", "explore-dataset", *arguments, "--no-grid", "--samples", 1, "--json")
    assert json.loads(shown.stdout)["samples"][0]["captions"][0].startswith("<gdo ")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_then_the_same_command_continues(tmp_path: Path, dataset: Path) -> None:
    large = write_groundcap(tmp_path / "large", train=1500, test=0, films=30, side=160)
    command = [sys.executable, "-m", "vlm_bridge", "data", "transform", "--source-path", str(large)]
    command += ["--output-dir", "out", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    out = Path("out")
    deadline = time.monotonic() + 200
    while len(list(out.glob("train/images/*.jpg"))) < 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/images/[!.]*.jpg")}

    subprocess.run(command, check=True, capture_output=True, timeout=250)
    folder = CaptionFolder.open(out)
    assert sum(counts["images"] for counts in folder.manifest["counts"].values()) == 1500
    assert folder.compute_fingerprint() == folder.fingerprint
    again = {path for path, written in finished.items() if path.stat().st_mtime_ns != written}
    assert not again, "what was finished is not made again"


BAD_INPUT = {
    "no output folder": (["transform"], 2, "give --output-dir"),
    "rows without a dry run": (["transform", "--output-dir", "out", "--num-rows", "5"], 2, "goes with --dry-run"),
    "official rows": (["transform", "--dry-run", "--num-rows", "5", "--split", "official"], 2, "without --split official"),
    "bad fraction": (["transform", "--dry-run", "--num-rows", "5", "--val-fraction", "1"], 2, "--val-fraction"),
    "missing folder": (["transform", "--source-path", "missing", "--output-dir", "out"], 1, "no such folder: missing"),
    "no parquet": (["explore-dataset", "--source-path", "."], 1, "cannot tell which dataset"),
    "two sources": (["explore-dataset", "--source", "local", "--data-dir", "x"], 2, "either --source or --data-dir"),
    "two grids": (["explore-dataset", "--grid", "x.png", "--no-grid"], 2, "either --grid or --no-grid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_line(run_here: Run, case: str) -> None:
    arguments, code, message = BAD_INPUT[case]
    done = run_here("data", *arguments)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1)
    assert message in done.stderr


def test_without_the_hub_one_line_says_what_to_do(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("data", "explore-dataset", env={"HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "cannot get daniel3303/GroundCap" in done.stderr and "--source-path" in done.stderr
