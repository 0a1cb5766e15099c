"""`vlm-bridge caption`: in the order given, whatever the pictures are, and never with a traceback."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.cli.main import app
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.training_strategy import checkpoint as checkpoints


@dataclass(frozen=True)
class Trained:
    """A run folder as training leaves it."""

    folder: Path
    recipe: Recipe


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, decode={"num_beams": 2, "max_new_tokens": 5})
    weights = tiny_captioner(recipe).trained_state_dict()
    checkpoints.save_checkpoint(folder / "checkpoints" / checkpoints.BEST_WEIGHTS, recipe, weights)
    return Trained(folder, recipe)


@pytest.fixture
def pictures(drawn_caption_folder: Path) -> list[Path]:
    return [image.path for image in CaptionFolder.open(drawn_caption_folder).split("test")]


def caption(trained: Trained, *arguments: object) -> Result:
    """The command inside this process (starting one costs seconds)."""
    return CliRunner().invoke(
        app,
        ["caption", *map(str, arguments), "--checkpoint", str(trained.folder), "--device", "cpu"],
    )


def rows(result: Result) -> list[dict]:
    return json.loads(result.stdout)


def test_order_is_kept_over_files_folders_and_globs(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "notes.txt"):
        if name.endswith(".txt"):
            (folder / name).write_text("not a picture")
        else:
            Image.open(pictures[0]).save(folder / name)
    result = caption(
        trained, pictures[3], folder, pictures[1], pictures[0].parent / "test-0[45].jpg", "--json"
    )
    assert result.exit_code == 0, result.stderr
    names = [Path(row["image"]).name for row in rows(result)]
    assert names == ["test-03.jpg", "a.jpg", "b.png", "test-01.jpg", "test-04.jpg", "test-05.jpg"]


def test_json_has_image_caption_and_score(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    result = caption(trained, pictures[0], broken, pictures[1], "--json")
    assert result.exit_code == 1
    first, error, last = rows(result)
    for row, path in ((first, pictures[0]), (last, pictures[1])):
        assert row.keys() == {"image", "caption", "score"}
        assert row["image"] == str(path)
        assert isinstance(row["caption"], str)
        assert row["score"] < 0
    assert error.keys() == {"image", "error"}
    assert error["image"] == str(broken)
    assert result.stderr == f"{broken}: {error['error']}\n"


def test_lines_name_their_picture_where_there_are_several(
    trained: Trained, pictures: list[Path]
) -> None:
    one = caption(trained, pictures[0])
    two = caption(trained, *pictures[:2], "--batch-size", "1")
    assert one.exit_code == two.exit_code == 0
    assert two.stdout.splitlines()[0] == f"{pictures[0]}\t{one.stdout.rstrip(chr(10))}"
    assert two.stdout.splitlines()[1].startswith(f"{pictures[1]}\t")


def test_names_with_line_breaks_and_tabs_stay_one_line(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    odd = [tmp_path / "a\nb.png", tmp_path / "a\tb.png"]
    for path in odd:
        shutil.copy(pictures[0], path)
    lines = caption(trained, *odd).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        f"{tmp_path}/a\\nb.png",
        f"{tmp_path}/a\\tb.png",
    ]


def test_options_reach_the_generation(trained: Trained, pictures: list[Path]) -> None:
    def captions(*options: object) -> list[str]:
        result = caption(trained, *pictures, "--json", *options)
        assert result.exit_code == 0, result.stderr
        return [row["caption"] for row in rows(result)]

    assert captions() == captions("--num-beams", "2", "--max-new-tokens", "5")
    assert captions("--max-new-tokens", "1") != captions("--max-new-tokens", "9")
    sampled = captions("--do-sample", "--temperature", "2.0", "--seed", "3")
    assert sampled == captions("--do-sample", "--temperature", "2.0", "--seed", "3")
    assert sampled != captions("--do-sample", "--temperature", "2.0", "--seed", "4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it compiles there")
def test_compilation_is_refused_without_a_gpu(trained: Trained, pictures: list[Path]) -> None:
    refused = caption(trained, pictures[0], "--compile")
    assert "compiles generation for NVIDIA GPUs" in str(refused.exception)


def hostile_pictures(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Odd pictures that can be captioned, and files that cannot."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20, 30, 3), np.uint8)
    picture = Image.fromarray(pixels)
    good = {
        name: folder / name
        for name in (
            "cmyk.jpg",
            "grey16.png",
            "rotated.jpg",
            "animated.gif",
            "dot.png",
            "glass.png",
            "bits.png",
            "palette.png",
            "wide.png",
        )
    }
    picture.convert("CMYK").save(good["cmyk.jpg"])
    Image.fromarray(random.integers(0, 65536, (20, 30), np.uint16)).save(good["grey16.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(good["rotated.jpg"], exif=exif)
    picture.save(
        good["animated.gif"], save_all=True, append_images=[picture.rotate(90), picture.rotate(180)]
    )
    Image.new("RGB", (1, 1), "red").save(good["dot.png"])
    picture.convert("RGBA").save(good["glass.png"])
    picture.convert("1").save(good["bits.png"])
    picture.convert("P").save(good["palette.png"], transparency=3)
    Image.new("RGB", (60_000, 1), "blue").save(good["wide.png"])

    bad = {
        name: folder / name
        for name in ("empty.jpg", "truncated.jpg", "text.jpg", "huge.png", "half-header.png")
    }
    bad["empty.jpg"].touch()
    picture.resize((200, 200)).save(bad["truncated.jpg"])
    whole = bad["truncated.jpg"].read_bytes()
    bad["truncated.jpg"].write_bytes(whole[: len(whole) // 2])
    bad["text.jpg"].write_text("these are words")
    bad["huge.png"].write_bytes(png_header(20_000, 20_000))
    bad["half-header.png"].write_bytes(png_header(10, 10)[:20])
    return good, bad


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
    )


def test_hostile_pictures_cost_one_line_each(trained: Trained, tmp_path: Path, run_cli) -> None:
    good, bad = hostile_pictures(tmp_path / "pictures")
    given = [path for pair in zip(good.values(), bad.values(), strict=False) for path in pair]
    given += list(good.values())[len(bad) :]
    result = run_cli("caption", *given, "--checkpoint", trained.folder, "--json")
    assert result.returncode == 1
    captioned = json.loads(result.stdout)
    assert [row["image"] for row in captioned] == [str(path) for path in given]
    assert [row["image"] for row in captioned if "error" in row] == [
        str(path) for path in bad.values()
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad.values(), strict=True):
        assert line.startswith(f"{path}: ")


def test_rotated_pictures_are_seen_upright(trained: Trained, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 60, 3), np.uint8))
    upright, sideways = tmp_path / "upright.png", tmp_path / "sideways.png"
    picture.save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.rotate(90, expand=True).save(sideways, exif=exif)
    one, other = rows(caption(trained, upright, sideways, "--json"))
    assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_explain_writes_a_png_for_each_picture(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / pictures[0].name
    Image.open(pictures[1]).save(elsewhere)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    sheets = tmp_path / "new" / "sheets"
    given = [pictures[0], broken, elsewhere, pictures[2]]
    plain = caption(trained, *given)
    explained = caption(trained, *given, "--explain", sheets)
    assert (explained.exit_code, explained.stdout, explained.stderr) == (
        1,
        plain.stdout,
        plain.stderr,
    )

    names = [f"{pictures[0].stem}.png", f"{pictures[0].stem}-2.png", f"{pictures[2].stem}.png"]
    assert sorted(path.name for path in sheets.iterdir()) == sorted(names)
    for name in names:
        with Image.open(sheets / name) as sheet:
            assert sheet.format == "PNG"
            assert min(sheet.size) > 200
    assert (sheets / names[0]).read_bytes() != (sheets / names[1]).read_bytes()

    listed = rows(caption(trained, *given, "--explain", sheets, "--json"))
    assert [row.get("explanation") for row in listed] == [
        str(sheets / names[0]), None, str(sheets / names[1]), str(sheets / names[2]),
    ]  # fmt: skip


def test_explain_shows_what_was_sampled(
    trained: Trained, pictures: list[Path], tmp_path: Path
) -> None:
    options = ("--explain", tmp_path, "--do-sample", "--temperature", "2.0", "--seed", "3")
    assert (
        caption(trained, *pictures[:3], *options).stdout
        == caption(trained, *pictures[:3], *options[2:]).stdout
    )
    sampled = (tmp_path / f"{pictures[1].stem}.png").read_bytes()
    assert caption(trained, *pictures[:3], "--explain", tmp_path).exit_code == 0
    assert (tmp_path / f"{pictures[1].stem}.png").read_bytes() != sampled


def test_a_folder_that_cannot_be_made_costs_no_captions(
    trained: Trained, pictures: list[Path], tmp_path: Path, run_here
) -> None:
    (tmp_path / "file").touch()
    result = run_here(
        "caption", pictures[0], "--checkpoint", trained.folder, "--explain", tmp_path / "file"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"error: File exists ({tmp_path / 'file'})"]


def test_mistakes_are_one_line(
    trained: Trained, pictures: list[Path], tmp_path: Path, run_here
) -> None:
    missing = run_here("caption", pictures[0], "--checkpoint", "nowhere")
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert len(missing.stderr.splitlines()) == 1
    assert missing.stderr.startswith("error: no checkpoint at nowhere")

    empty = tmp_path / "empty"
    empty.mkdir()
    for path, mention in (
        (tmp_path / "no.jpg", "no such image"),
        (empty, "no image in folder"),
        (tmp_path / "*.jpg", "no image matches"),
    ):
        result = run_here("caption", path, "--checkpoint", trained.folder)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert mention in result.stderr


def test_a_checkpoint_of_another_architecture_is_refused(
    trained: Trained,
    pictures: list[Path],
    tmp_path: Path,
    tiny_dinov2_dir: Path,
    tiny_gpt2_dir: Path,
) -> None:
    content = checkpoints.load_checkpoint(trained.folder)
    other = Trained(tmp_path, tiny_recipe(tiny_dinov2_dir, tiny_gpt2_dir, "cross_attention"))
    checkpoints.save_checkpoint(
        tmp_path / checkpoints.BEST_WEIGHTS, other.recipe, content["weights"]
    )
    result = caption(other, pictures[0])
    assert result.exit_code == 1
    assert "belongs to another architecture: bridge." in str(result.exception)
    assert "\n" not in str(result.exception)
