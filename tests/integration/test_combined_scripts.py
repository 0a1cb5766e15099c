"""The published guide's commands on tiny models: save a combined file, fine-tune it, load it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_bridge.combined_files import combine_models, read_combined, write_combined
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder

Run = Callable[..., "subprocess.CompletedProcess[str]"]
QUICK = (
    "use_amp=false",
    "decode.num_beams=1",
    "decode.max_new_tokens=6",
    "num_decoded_images=2",
    "feature_cache=off",
)


@pytest.fixture
def run_script(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``python scripts/NAME.py ARGUMENTS`` inside this process, without its seconds of imports."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(repository / "scripts" / f"{name}.py"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(command[0], run_name="__main__")
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(command, exit_.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def models(tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> tuple[str, ...]:
    return ("--pvt", str(tiny_pvt_v2_dir), "--blip", str(tiny_blip_dir))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def write_coco(root: Path, colours: tuple[str, ...] = ("red", "green", "blue", "yellow")) -> Path:
    """12 training and 4 validation pictures with their captions, as COCO 2017 lays them out."""
    (root / "annotations").mkdir(parents=True)
    for part, ids in (("train", range(12)), ("val", range(12, 16))):
        (root / f"{part}2017").mkdir()
        images, annotations = [], []
        for index in ids:
            colour, name = colours[index % len(colours)], f"{index:012d}.jpg"
            picture = Image.new("RGB", (64, 64), colour)
            picture.putpixel((index, index), (0, 0, 0))
            picture.save(root / f"{part}2017" / name)
            images.append({"id": index, "file_name": name})
            annotations.append({"image_id": index, "id": index, "caption": f"A large {colour} square."})
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    return root


def test_the_guides_commands(
    run_script: Run,
    run_here: Run,
    models: tuple[str, ...],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, output = tmp_path / "start.pth", tmp_path / "out" / "tuned.pth"
    saved = run_script("save_combined_checkpoint", *models, "--projection", "linear", "--output", start)
    assert saved.returncode == 0, saved.stderr
    coco = write_coco(tmp_path / "coco")
    command = (
        "finetune_combined", "--checkpoint", start, "--dataset", "coco_sample", "--dataset_size", 8,
        "--dataset_path", coco, "--epochs", 2, "--batch_size", 4, "--lr", 1e-3, "--warmup_steps", 1,
        "--weight_decay", 0.05, "--max_length", 16, "--image_size", 64, "--num_workers", 1, "--device", "cpu",
        "--output", output, *models, *(word for key in QUICK for word in ("--set", key)),
    )  # fmt: skip
    tuned = run_script(*command)
    assert tuned.returncode == 0, tuned.stderr
    assert "4 steps" in tuned.stdout and str(output) in tuned.stdout
    folder = CaptionFolder.open(tmp_path / "out" / "coco_sample-8-captions")
    assert {split: count["images"] for split, count in folder.manifest["counts"].items()} == {
        "train": 8, "val": 4, "test": 0,
    }  # fmt: skip

    before, after = read_combined(start), read_combined(output)
    learnt = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and learnt == {"text_decoder", "visual_proj"}

    monkeypatch.syspath_prepend(repository)
    from scripts.load_combined_checkpoint import load_combined_model  # type: ignore[import-not-found]

    pvt, blip, proj = load_combined_model(output, "cpu", models[3], models[1])
    assert torch.equal(proj.weight, after["visual_proj.weight"])
    assert [type(part).__name__ for part in (pvt, blip, proj)] == ["PvtV2Model", "PvtBlip", "Linear"]

    again = run_script(*command)
    assert again.returncode == 0 and "at step 4 of 4" in again.stdout, again.stderr
    assert same(read_combined(output), after)
    changed = run_script(*command, "--lr", 5e-3)
    assert changed.returncode == 1 and "learning_rate" in changed.stderr and "--force" in changed.stderr
    forced = run_script(*command, "--lr", 5e-3, "--force")
    assert forced.returncode == 0 and "changed by --force: learning_rate" in forced.stdout, forced.stderr

    picture = next((coco / "val2017").iterdir())
    captioned = run_here("caption", picture, "--checkpoint", output.with_suffix(""), "--device", "cpu")
    assert captioned.returncode == 0, captioned.stderr

    saved = run_script(
        "save_combined_checkpoint", "--checkpoint", output.with_suffix(""), "--output", tmp_path / "s.pth"
    )
    assert saved.returncode == 0 and same(read_combined(tmp_path / "s.pth"), after), saved.stderr

    write_combined(start, {name: tensor + 1 for name, tensor in before.items()})
    other = run_script(*command)
    assert other.returncode == 2 and "started from another combined file" in other.stderr


def test_without_learning_the_output_is_the_input(
    run_script: Run, models: tuple[str, ...], drawn_caption_folder: Path, tmp_path: Path
) -> None:
    """Every weight that training starts from is the file's, not that of the models it was made of."""
    state = combine_models(models[1], models[3], "conv3x3")
    write_combined(tmp_path / "start.pth", state | {n: t + 0.1 for n, t in state.items() if t.ndim == 1})
    tuned = run_script(
        "finetune_combined", "--checkpoint", tmp_path / "start.pth", "--dataset", "local",
        "--dataset_path", drawn_caption_folder, "--epochs", 1, "--lr", 0, "--image_size", 64, "--num_workers", 1,
        "--output", tmp_path / "same.pth", "--set", "monitor=loss", "--set", "decode_every_n_steps=null",
        "--set", "trainable={bridge.*: null, language_model.*crossattention*: null}", *models,
        *(word for key in QUICK for word in ("--set", key)),
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert same(read_combined(tmp_path / "same.pth"), read_combined(tmp_path / "start.pth"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["same", "same.pth", "start.pth"]


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"--checkpoint": "nowhere.pth"}, 1, "no file at nowhere.pth; scripts/save_combined_checkpoint.py makes one"),
        ({"--checkpoint": "evil.pth"}, 1, "holds code; it was not loaded"),
        ({"--output": "start.pth"}, 2, "the output is the checkpoint itself"),
        ({"--output": "out"}, 2, "the output is a file"),
        ({"--dataset_path": "nowhere"}, 1, "no such folder: nowhere (--dataset_path)"),
        ({"--lr": "-1"}, 2, "learning_rate must be at least 0"),
        ({"--set": "batch=3"}, 2, "did you mean 'batch_size'"),
        ({"--pvt": "nobody/nothing"}, 1, "cannot read the configuration of 'nobody/nothing'"),
        ({"--dataset_size": "5"}, 2, "is a caption folder already"),
        ({"--num-samples": "0"}, 2, "--dataset_size must be at least 1, not 0"),
        ({"--dataset_size": "-3"}, 2, "--dataset_size must be at least 1, not -3"),
        ({"--device": "warp", "--checkpoint": "nowhere.pth"}, 2, "device='warp' is unknown"),
        ({"--dataset": "coco", "--dataset_path": None}, 1, "no dataset at datasets/coco: run vlm-data download coco"),
        ({"--dataset_path": None}, 2, "--dataset local needs --dataset_path DIR"),
        ({"--blip": "nobody/nothing"}, 1, "cannot read the configuration of 'nobody/nothing'"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_line(
    changes: dict[str, str | None], code: int, says: str, run_script: Run, models: tuple[str, ...], drawn_caption_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_combined("start.pth", combine_models(models[1], models[3], "linear"))
    torch.save({"visual_proj.weight": print}, "evil.pth")
    arguments = {
        "--checkpoint": "start.pth", "--dataset": "local", "--dataset_path": str(drawn_caption_folder),
        "--output": "out.pth", **dict(zip(models[::2], models[1::2], strict=True)), **changes,
    }  # fmt: skip
    given = {name: value for name, value in arguments.items() if value is not None}
    failed = run_script("finetune_combined", *(word for pair in given.items() for word in pair))
    assert failed.returncode == code, failed.stderr
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not Path("out.pth").exists()
