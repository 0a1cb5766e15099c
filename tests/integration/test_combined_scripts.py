"""The published guide's commands on tiny models: save a combined file, fine-tune it, load it."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipImageProcessorPil

from layouts import write_coco, write_flickr30k
from tiny_models import save_tiny_pvt_v2, seeded
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.formats.pvt_blip import (
    BLIP,
    combine_models,
    load_combined_model,
    read_combined,
    write_combined,
)
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig

Run = Callable[..., Any]
KEYS = ("amp_dtype=float32", "decode.num_beams=1", "decode.max_new_tokens=6",
        "num_decoded_images=2", "feature_cache=off")  # fmt: skip
QUICK = [word for key in KEYS for word in ("--set", key)]


@pytest.fixture
def run_script(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """``python scripts/NAME.py ARGUMENTS`` inside this process, without its seconds of imports.

    The result is what it printed; of a failure with exit code `fails`, its line on stderr.
    """

    def run(name: str, *arguments: object, fails: int = 0) -> str:
        command = [str(repository / "scripts" / f"{name}.py"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(command[0], run_name="__main__")
        captured = capsys.readouterr()
        assert int(exit_.value.code or 0) == fails, captured.err
        return captured.err if fails else captured.out

    return run


@pytest.fixture
def models(tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> tuple[str, ...]:
    return ("--pvt", str(tiny_pvt_v2_dir), "--blip", str(tiny_blip_dir))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())


def test_the_guides_commands(
    run_script: Run, run_here: Run, models: tuple[str, ...], tmp_path: Path
) -> None:
    start, output, again = (tmp_path / name for name in ("start.pth", "out/tuned.pth", "again.pth"))
    save = "save_combined_checkpoint"
    run_script(save, *models, "--projection", "linear", "--output", start)
    coco = write_coco(tmp_path / "coco")
    command = (
        "finetune_combined", "--checkpoint", start, "--dataset", "coco_sample",
        "--dataset_size", 8, "--dataset_path", coco, "--epochs", 2, "--batch_size", 4,
        "--lr", 1e-3, "--warmup_steps", 1, "--weight_decay", 0.05, "--max_length", 16,
        "--image_size", 64, "--num_workers", 1, "--device", "cpu", "--output", output,
        *models, *QUICK,
    )  # fmt: skip
    tuned = run_script(*command)
    assert "4 steps" in tuned and str(output) in tuned
    folder = CaptionFolder.open(tmp_path / "out" / "coco_sample-8-captions")
    counts = {split: count["images"] for split, count in folder.manifest["counts"].items()}
    assert counts == {"train": 8, "val": 4, "test": 0}

    before, after = read_combined(start), read_combined(output)
    learned = {n.partition(".")[0] for n in before if not torch.equal(before[n], after[n])}
    assert before.keys() == after.keys() and learned == {"text_decoder", "visual_proj"}
    parts = load_combined_model(output, "cpu", models[3], models[1])
    assert parts.proj is not None and torch.equal(parts.proj.weight, after["visual_proj.weight"])
    assert [type(part).__name__ for part in parts] == ["PvtV2Model", "PvtBlip", "Linear"]

    assert "at step 4 of 4" in run_script(*command)
    assert same(read_combined(output), after)
    changed = run_script(*command, "--lr", 5e-3, fails=1)
    assert "learning_rate" in changed and "--force" in changed
    forced = run_script(*command, "--lr", 5e-3, "--force")
    assert "changed by --force: learning_rate" in forced

    run, image = output.with_suffix(""), next((coco / "val2017").iterdir())
    captioned = run_here("caption", image, "--checkpoint", run, "--device", "cpu")
    assert captioned.returncode == 0, captioned.stderr
    run_script(save, "--checkpoint", run, "--output", again)
    assert same(read_combined(again), after)

    write_combined(start, {name: tensor + 1 for name, tensor in before.items()})
    assert "started from another combined file" in run_script(*command, fails=2)


def test_without_learning_the_output_is_the_input(
    run_script: Run, models: tuple[str, ...], drawn_caption_folder: Path, tmp_path: Path
) -> None:
    """All weights that training starts from are the file's, not those of the named models."""
    state = combine_models(models[1], models[3], "conv3x3")
    start, output = tmp_path / "start.pth", tmp_path / "same.pth"
    write_combined(start, state | {n: t + 0.1 for n, t in state.items() if t.ndim == 1})
    run_script(
        "finetune_combined", "--checkpoint", start, "--dataset", "local",
        "--dataset_path", drawn_caption_folder, "--epochs", 1, "--lr", 0, "--image_size", 64,
        "--num_workers", 1, "--output", output, "--set", "monitor=loss", "--set",
        "trainable={bridge.*: null, language_model.*crossattention*: null}", *models, *QUICK,
    )  # fmt: skip
    assert same(read_combined(output), read_combined(start))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["same", "same.pth", "start.pth"]


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"--checkpoint": "nowhere.pth"}, 1, "no combined file at nowhere.pth; scripts/save_comb"),
        ({"--checkpoint": "evil.pth"}, 1, "holds code; it was not loaded"),
        ({"--output": "start.pth"}, 2, "the output is the checkpoint itself"),
        ({"--dataset_path": "nowhere"}, 1, "no such folder: nowhere (--dataset_path)"),
        ({"--set": "batch=3"}, 2, "did you mean 'batch_size'"),
        ({"--dataset_size": "5"}, 2, "is a caption folder already"),
        ({"--device": "warp", "--checkpoint": "nowhere.pth"}, 2, "device='warp' is unknown"),
        ({"--dataset_path": None}, 2, "--dataset local needs --dataset_path DIR"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    changes: dict[str, str | None], code: int, says: str, run_script: Run, models: tuple[str, ...],
    drawn_caption_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_combined("start.pth", combine_models(models[1], models[3], "linear"))
    torch.save({"visual_proj.weight": print}, "evil.pth")
    arguments = {
        "--checkpoint": "start.pth", "--dataset": "local", "--output": "out.pth",
        "--dataset_path": str(drawn_caption_folder),
        **dict(zip(models[::2], models[1::2], strict=True)), **changes,
    }  # fmt: skip
    given = [word for pair in arguments.items() if pair[1] is not None for word in pair]
    (line,) = run_script("finetune_combined", *given, fails=code).strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not Path("out.pth").exists()


# The guide's commands, letter by letter.
SCENARIO_1 = r"""
python scripts/finetune_combined.py \
--checkpoint checkpoints/blip_pvt_combined.pth \
--dataset flickr30k \
--dataset_path ./flickr30k-captions \
--epochs 5 \
--batch_size 32 \
--lr 1e-4 \
--output checkpoints/blip_pvt_flickr30k_trained.pth

# 3. Test inference
python - << 'EOF'
from scripts.load_combined_checkpoint import load_combined_model
from transformers import BlipProcessor
from PIL import Image

pvt, blip, proj = load_combined_model('checkpoints/blip_pvt_flickr30k_trained.pth')
processor = BlipProcessor.from_pretrained("Salesforce/blip-image-captioning-base")

img = Image.open('test_image.jpg')
inputs = processor(images=[img], return_tensors="pt")
captions = blip.generate(inputs['pixel_values'], num_beams=5, max_length=50)
print(processor.decode(captions[0], skip_special_tokens=True))
EOF
"""
SCENARIO_2 = (
    "scripts/finetune_combined.py --checkpoint checkpoints/blip_pvt_combined.pth "
    "--dataset coco_sample --dataset_size 1000 --epochs 1 --batch_size 8 "
    "--output checkpoints/blip_pvt_quick_test.pth"
)
SCENARIO_3 = (
    "scripts/finetune_combined.py --checkpoint checkpoints/blip_pvt_combined.pth "
    "--dataset flickr30k --epochs 5 --batch_size 2 --device cpu "
    "--output checkpoints/blip_pvt_cpu_trained.pth"
)


def originals_file() -> None:
    """Write PVT with CBAM and a whole BLIP, without a projection, as the original's save script."""
    blip = BlipForConditionalGeneration.from_pretrained(BLIP)
    with seeded():
        pvt = PvtCbam(PvtCbamConfig((8, 16, 40, 64), cbam="sequence"))
    state = {f"visual_encoder.{name}": x for name, x in pvt.state_dict().items()}
    state |= {f"text_decoder.{name}": x for name, x in blip.state_dict().items()}
    Path("checkpoints").mkdir()
    torch.save(state, "checkpoints/blip_pvt_combined.pth")


@pytest.fixture
def guide_folder(
    repository: Path, tiny_blip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkout's folder, with tiny models in folders that have the names of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(repository / "scripts")
    shutil.copytree(tiny_blip_dir, BLIP)
    BlipImageProcessorPil().save_pretrained(BLIP)
    blip = BlipForConditionalGeneration.from_pretrained(BLIP)
    with torch.no_grad():  # captions that are sure of their words, and end
        for parameter in blip.text_decoder.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        blip.text_decoder.get_output_embeddings().bias[blip.config.text_config.sep_token_id] += 1
    blip.save_pretrained(BLIP)
    with seeded():
        noise = torch.randint(0, 256, (120, 90, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save("test_image.jpg")
    return tmp_path


def test_the_guides_scenario_1(guide_folder: Path, repository: Path, run_script: Run) -> None:
    originals_file()
    write_flickr30k(guide_folder / "flickr30k-captions")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run(
        ["bash", "-c", SCENARIO_1], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no projection in the file: a new linear one, 64 -> 24" in done.stdout
    trained = guide_folder / "checkpoints" / "blip_pvt_flickr30k_trained.pth"
    written = torch.load(trained, weights_only=True)
    assert any(name.startswith("text_decoder.text_decoder.bert.") for name in written)
    shown = run_script("load_combined_checkpoint", "--checkpoint", trained, "--device", "cpu")
    for part in ("PVT: PvtCbam", "BLIP: PvtBlip", "Projection: MapLinear"):
        assert f"- {part}\n" in shown


@pytest.mark.parametrize("scenario", [SCENARIO_2, SCENARIO_3], ids=["2", "3"])
def test_the_guides_other_scenarios(scenario: str, guide_folder: Path, run_script: Run) -> None:
    if scenario == SCENARIO_2:
        write_coco(guide_folder / "datasets" / "coco")
        state = combine_models(str(save_tiny_pvt_v2(guide_folder / "pvt")), BLIP)
        write_combined("checkpoints/blip_pvt_combined.pth", state)
        scenario += " --pvt pvt"  # the tensors of a tiny PVT do not tell its heads
    else:
        write_flickr30k(guide_folder / "datasets" / "flickr30k")
        originals_file()
    script, *arguments = shlex.split(scenario)
    run_script(Path(script).stem, *arguments)
    output = arguments[arguments.index("--output") + 1]
    assert read_combined(output).keys() >= {"visual_proj.weight"}
