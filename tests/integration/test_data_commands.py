"""``vlm-data`` as a user types it; the default source is GroundCap, and no network is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from groundcap import write_groundcap
from vlm_bridge.data_pipeline.caption_folder import UNFINISHED_NAME, CaptionFolder

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Data = Callable[..., Any]
SCENES = ("--source", "scenes", "--num-train", 4, "--num-val", 2, "--num-test", 2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(run_here: Run) -> Callable[..., Any]:
    """Run `vlm-bridge data` with success; return JSON, or stdout without --json."""

    def run(*arguments: object) -> Any:
        done = run_here("data", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    return run


@pytest.fixture
def images() -> Path:
    folder = Path("images")
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (30, 20), (index * 20, 90, 30)).save(folder / f"{index}.jpg")
    lines = "".join(f"{index}.jpg\tImage number {index}.\n" for index in range(12))
    (folder / "captions.tsv").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def groundcap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 frames of 20 films in the published schema."""
    return write_groundcap(tmp_path_factory.mktemp("groundcap"), train=400, test=100, films=20)


def test_from_images_to_a_batch(run_cli: Run, data: Data, images: Path) -> None:
    (images / "3.jpg").write_bytes(b"")
    given = ("--source", "local", "--input-dir", images)
    statistics = data("explore-dataset", *given, "--grid", "new/grid.png", "--json")
    Image.open("new/grid.png").verify()
    assert (statistics["images"], statistics["captions"]) == (12, 12)
    assert statistics["picture_width"] == {"min": 30, "median": 30, "p95": 30, "max": 30}
    assert statistics["unreadable"] == [{"id": "3", "reason": "the file is empty"}]
    (images / "0.jpg").rename("0.jpg")
    (images / "0.jpg").symlink_to(Path("0.jpg").resolve())
    given = ("--input-dir", images, "--follow-links", "--workers", 2)
    done = run_cli("data", "transform", *given, "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "source: local (captions.tsv)"
    assert "3: the file is empty" in done.stdout and "images: 12 of 12" in done.stderr
    result = data("inspect-loader", "--data-dir", "out", "--all", "--batch-size", 2, "--json")
    assert result["pictures_decoded"] == 11 and not result["broken"]
    assert len(result["first_batch"]["rows"]) == 2


def test_a_recipe_shows_tokens(
    data: Data, drawn_caption_folder: Path, tiny_llama_dir: Path
) -> None:
    data_dir, model = f"data_dir: {drawn_caption_folder}\n", f"{{name: {tiny_llama_dir}}}"
    Path("recipe.yaml").write_text(f"{data_dir}batch_size: 4\nlanguage_model: {model}\n")
    batch = data("inspect-loader", "--config", "recipe.yaml", "--json")["first_batch"]
    assert batch["tokens"]["shape"][0] == len(batch["rows"]) == 4


def test_a_changed_folder_is_noticed(run_here: Run, data: Data) -> None:
    manifest = data("transform", *SCENES, "--output-dir", "out", "--workers", 1, "--json")
    assert manifest["counts"]["train"] == {"images": 4, "captions": 8}
    image = next(Path("out").glob("train/images/*.jpg"))
    whole = image.read_bytes()
    for content, message in ((whole + b"\0", "fingerprint differs"), (whole[:500], "1 images")):
        image.write_bytes(content)
        done = run_here("data", "inspect-loader", "--data-dir", "out", "--all")
        assert done.returncode == 1 and message in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_continues(how: signal.Signals) -> None:
    options = (
        "--source scenes --num-train 400 --num-val 2 --num-test 2 --workers 2 --output-dir out"
    )
    command = [sys.executable, "-m", "vlm_bridge", "data", "transform", *options.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    out = Path("out")
    while len(list(out.glob("train/images/[!.]*.jpg"))) < 60 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, how)  # as a terminal does: to every process of the group
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues" in errors and "Traceback" not in errors
    assert (out / UNFINISHED_NAME).is_dir() and not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/images/[!.]*.jpg")}
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    folder = CaptionFolder.open(out)
    assert len(finished) >= 60 and folder.compute_fingerprint() == folder.fingerprint
    assert not (out / UNFINISHED_NAME).exists()
    kept = [path for path in finished if path.exists()]  # a duplicate goes in the end
    assert all(path.stat().st_mtime_ns == finished[path] for path in kept), "made again"


def test_the_published_numbers_without_any_data(data: Data) -> None:
    shown = data("transform", "--dry-run", "--num-rows", 52350)
    assert "images: {train: 41880, val: 2618, test: 7852}" in shown
    assert "steps_per_epoch: 5235" in shown and not list(Path().iterdir())


def test_from_parquet_to_the_first_batch(data: Data, groundcap: Path) -> None:
    explored = data("explore-dataset", "--source-path", groundcap, "--samples", 3)
    for part in ("films: 20", "words_per_caption: {", "tokens_per_caption: null"):
        assert part in explored
    Image.open("runs/explore/groundcap.png").verify()
    command = ("transform", "--source-path", groundcap)
    done = data(*command, "--output-dir", "out", "--workers", 1)
    assert "train: {images: 400, captions: 400}" in done and "CC-BY-4.0" in done
    caption = CaptionFolder.open("out").split("train")[0].captions[0]
    assert "<" not in caption and "&amp;" not in caption
    result = data("inspect-loader", "--data-dir", "out", "--all", "--json")
    assert result["pictures_decoded"] == 500 and not result["broken"]
    assert result["first_batch"]["batches_per_epoch"] == 50

    dry = (*command, "--dry-run", "--json")
    assert data(*dry)["images"] == {"train": 400, "val": 25, "test": 75}
    assert data(*dry, "--split", "official")["images"]["test"] == 100
    by_image = data(*dry, "--split-by", "image", "--test-fraction", 0.2)["images"]
    assert by_image == {"train": 375, "val": 25, "test": 100}


def test_tokens_and_tags(run_here: Run, data: Data, groundcap: Path, tiny_llama_dir: Path) -> None:
    given = ("--source-path", groundcap, "--keep-tags")
    shown = ("explore-dataset", *given, "--no-grid", "--samples", 1, "--tokenizer")
    counted = data(*shown, tiny_llama_dir, "--json")
    assert counted["tokens_per_caption"]["min"] > counted["words_per_caption"]["min"]
    assert counted["samples"][0]["captions"][0].startswith("<gdo ")
    missing = run_here("data", *shown, "no/such-tokenizer").stderr
    assert "cannot load the tokenizer 'no/such-tokenizer'" in missing
    data("transform", *given, "--limit", 2, "--workers", 1, "--output-dir", "out")
    assert CaptionFolder.open("out").split("train")[0].captions[0].startswith("<gdo ")


OUT = ["--output-dir", "out"]
DRY = ["transform", "--dry-run", "--num-rows", "5"]
BAD_INPUT = {
    "unknown source": (["transform", "--source", "flickr9k", *OUT], 2, "flickr9k"),
    "foreign folder": (["transform", *map(str, SCENES), "--output-dir", "mine"], 1, "mine is not empty and no caption"),
    "no output folder": (["transform"], 2, "give --output-dir"),
    "no limit": (["transform", *OUT, "--limit", "0"], 2, "limit"),
    "rows without a dry run": (["transform", *OUT, "--num-rows", "5"], 2, "goes with --dry-run"),
    "bad fraction": ([*DRY, "--val-fraction", "1"], 2, "--val-fraction"),
    "unknown dataset": (["explore-dataset", "--source-path", "empty"], 1, "no captions found in empty"),
    "two sources": (["explore-dataset", "--source", "local", "--data-dir", "x"], 2, "either --source or --data-dir"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_line(run_here: Run, case: str) -> None:
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/letter.txt").touch()
    arguments, code, message = BAD_INPUT[case]
    done = run_here("data", *arguments)
    assert done.returncode == code and message in done.stderr
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]
    assert "Traceback" not in done.stderr and not Path("out/manifest.json").exists()
    assert len(done.stderr.strip().splitlines()) == 1 or "Usage:" in done.stderr
