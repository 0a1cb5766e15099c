"""`vlm-bridge caption`: the order given, one line for each image that cannot be read."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from demo_server import noise
from vlm_bridge.captioning import results_file
from vlm_bridge.captioning.pipeline import Captioner, CaptionResult
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_vit_dir: Path, tiny_llama_dir: Path) -> Path:
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"num_beams": 2, "max_new_tokens": 5})
    weights = tiny_captioner(recipe).trained_state_dict()
    checkpoints.save_checkpoint(folder / "checkpoints" / checkpoints.BEST_WEIGHTS, recipe, weights)
    return folder


@pytest.fixture
def images(drawn_caption_folder: Path) -> list[Path]:
    return [image.path for image in CaptionFolder.open(drawn_caption_folder).split("test")]


@pytest.fixture
def caption(run: Path, run_here: Callable) -> Callable:
    return lambda *arguments: run_here(
        "caption", *arguments, "--checkpoint", run, "--device", "cpu"
    )


def test_order_is_kept_over_files_folders_and_globs(
    caption: Callable, images: list[Path], tmp_path: Path
) -> None:
    for name in ("b.png", "a.jpg"):
        Image.open(images[0]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    glob = images[0].parent / "test-0[45].jpg"
    result = caption(images[3], tmp_path, images[1], glob, "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    names = [Path(row["image"]).name for row in rows]
    assert names == ["test-03.jpg", "a.jpg", "b.png", "test-01.jpg", "test-04.jpg", "test-05.jpg"]
    assert all(row.keys() == {"image", "caption", "score"} and row["score"] < 0 for row in rows)


def test_lines_name_their_image_where_there_are_several(
    caption: Callable, images: list[Path], tmp_path: Path
) -> None:
    one, two = caption(images[0]), caption(*images[:2], "--batch-size", "1")
    assert one.returncode == two.returncode == 0
    assert two.stdout.splitlines()[0] == f"{images[0]}\t{one.stdout.rstrip(chr(10))}"
    assert two.stdout.splitlines()[1].startswith(f"{images[1]}\t")
    odd = [tmp_path / "a\nb.png", tmp_path / "a\tb.png"]
    for path in odd:
        shutil.copy(images[0], path)
    names = [line.split("\t")[0] for line in caption(*odd).stdout.splitlines()]
    assert names == [f"{tmp_path}/a\\nb.png", f"{tmp_path}/a\\tb.png"]


def test_options_reach_the_generation(caption: Callable, images: list[Path]) -> None:
    def captions(*options: str) -> list[str]:
        result = caption(*images, "--json", *options)
        assert result.returncode == 0, result.stderr
        return [row["caption"] for row in json.loads(result.stdout)]

    assert captions() == captions("--num-beams", "2", "--max-new-tokens", "5")
    assert captions("--max-new-tokens", "1") != captions("--max-new-tokens", "9")
    assert captions("--min-new-tokens", "5") != captions("--max-new-tokens", "1")
    assert captions("--repetition-penalty", "9", "--no-repeat-ngram-size", "1") != captions()
    sample = ("--do-sample", "--temperature", "2.0", "--seed")
    assert captions(*sample, "3") == captions(*sample, "3") != captions(*sample, "4")


def test_captions_of_unlike_images_are_marked(
    run_here: Callable, images: list[Path], tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> None:
    options = {"weights": [-1, 0, 9], "unsure_below": 0.9}
    recipe = tiny_recipe(
        tiny_vit_dir, tiny_llama_dir, confidence=options, decode={"max_new_tokens": 5}
    )
    model = tiny_captioner(recipe)
    assert model.familiarity is not None
    model.familiarity.remember(-model.bridge_features(model.encode_images([noise(1)])))
    noise(1).save(unlike := tmp_path / "unlike.png")
    file = tmp_path / "run" / "checkpoints" / checkpoints.BEST_WEIGHTS
    checkpoints.save_checkpoint(file, recipe, model.trained_state_dict())
    given = ("--checkpoint", tmp_path / "run", "--device", "cpu")
    result = run_here("caption", unlike, *given)
    assert result.returncode == 0
    warning = "unlike the training images, so the caption may well be wrong"
    assert result.stderr == f"{warning}\n"
    assert len(result.stdout.splitlines()) == 1
    assert run_here("caption", unlike, *given, "--quiet").stderr == ""
    rows = json.loads(run_here("caption", unlike, *given, "--json").stdout)
    assert rows[0]["confidence"] == 0.269 and rows[0]["unsure"] is True
    output = tmp_path / "captions.jsonl"
    result = run_here("caption", unlike, images[0], *given, "--output", output)
    assert f"{warning}: {unlike}" in result.stderr
    assert json.loads(output.read_text().splitlines()[0])["unsure"] is True


def test_output_continues_where_it_stopped(
    caption: Callable, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (broken := tmp_path / "broken.jpg").write_bytes(b"no image")
    given, file = [*images[:4], broken, *images[4:6]], tmp_path / "out" / "captions.csv"
    stream = Captioner.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[CaptionResult]:
        yield from islice(stream(*arguments, **options), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "stream", interrupted)
        result = caption(*given, "--output", file)
    said = f"interrupted: 3 of 7 images are done in {file}: the same command continues\n"
    assert (result.returncode, result.stderr, result.stdout) == (130, said, "")
    result = caption(*given, "--output", file)
    assert result.returncode == 1
    assert f"{file} has captions of 3 of the 7 images\n" in result.stderr
    assert result.stdout == f"captions: {file} (3 new, 1 failed)\n"
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["image"] for row in rows] == [str(path) for path in given]
    assert [bool(row["error"]) for row in rows] == [path == broken for path in given]
    printed = caption(*given).stdout.splitlines()
    good = [row for row in rows if not row["error"]]
    assert printed == [f"{row['image']}\t{row['caption']}" for row in good]
    assert caption(*images[:6], "--output", file).stdout == ""  # all are done


def test_what_is_printed_survives_an_interruption(
    caption: Callable, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[CaptionResult]:
        yield CaptionResult("one.jpg", "words", -1.0, True)
        raise KeyboardInterrupt

    monkeypatch.setattr(Captioner, "stream", interrupted)
    as_lines, as_json = caption(*images[:2]), caption(*images[:2], "--json")
    assert as_lines.returncode == as_json.returncode == 130
    assert as_lines.stderr == as_json.stderr == "interrupted: 1 of 2 images are done\n"
    assert as_lines.stdout == "one.jpg\twords\n"
    assert json.loads(as_json.stdout) == [{"image": "one.jpg", "caption": "words", "score": -1.0}]


def test_a_full_disk_is_one_line(
    caption: Callable, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, line: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(results_file, "append_line", full)
    result = caption(images[0], "--output", tmp_path / "a.jsonl")
    line = f"error: No space left on device ({tmp_path / 'a.jsonl'})\n"
    assert (result.returncode, result.stderr, result.stdout) == (1, line, "")


def test_hostile_images_cost_one_line_each(run: Path, tmp_path: Path, run_cli: Callable) -> None:
    """In a process of its own, as users start it."""
    image = noise(0, (30, 20))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    for mode in ("RGBA", "1", "P", "I;16"):
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / f"{mode}.png")
    Image.new("RGB", (60_000, 1), "blue").save(tmp_path / "wide.png")
    image.resize((200, 200)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    bad = {
        "empty.jpg": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"these are words",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    given = sorted(tmp_path.iterdir())
    result = run_cli("caption", *given, "--checkpoint", run, "--json")
    assert result.returncode == 1
    rows = json.loads(result.stdout)
    assert [row["image"] for row in rows] == [str(path) for path in given]
    failed = [str(tmp_path / name) for name in sorted(bad)]
    assert [row["image"] for row in rows if "error" in row] == failed
    lines = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == failed


def test_explain_writes_a_png_for_each_image(
    caption: Callable, images: list[Path], tmp_path: Path
) -> None:
    elsewhere, broken = tmp_path / images[0].name, tmp_path / "broken.jpg"
    Image.open(images[1]).save(elsewhere)
    broken.write_bytes(b"no image")
    sheets = tmp_path / "new" / "sheets"
    given = [images[0], broken, elsewhere, images[2]]
    plain, explained = caption(*given), caption(*given, "--explain", sheets)
    assert explained.returncode == 1
    assert (explained.stdout, explained.stderr) == (plain.stdout, plain.stderr)
    stems = [images[0].stem, f"{images[0].stem}-2", images[2].stem]
    paths = [sheets / f"{stem}.png" for stem in stems]
    assert sorted(sheets.iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            assert min(sheet.size) > 200
    rows = json.loads(caption(*given, "--explain", sheets, "--json").stdout)
    expected = [str(paths[0]), None, str(paths[1]), str(paths[2])]
    assert [row.get("explanation") for row in rows] == expected


def test_mistakes_are_one_line(
    run: Path, images: list[Path], tmp_path: Path, run_here: Callable
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((images[0], "--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        ((tmp_path / "no.jpg", "--checkpoint", run), "no such image"),
        ((tmp_path / "empty", "--checkpoint", run), "no image in"),
        ((tmp_path / "*.jpg", "--checkpoint", run), "no image in"),
        ((images[0], "--checkpoint", run, "--explain", tmp_path / "file"), "File exists"),
        ((images[0], "--output", tmp_path / "a.txt"), "must end with .csv or .jsonl"),
        ((images[0], "--output", tmp_path / "a.csv", "--json"), "give either --json"),
    ):
        result = run_here("caption", *arguments)
        assert result.returncode == 1 + ("--output" in arguments) and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line
