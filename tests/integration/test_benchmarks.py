"""The benchmarks run on tiny models, write their figures, and refuse to compare different work."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CPU = torch.device("cpu")
ROW = {"variant", "samples_per_second", "tokens_per_second", "peak_bytes", "spread", "cpu_seconds"}


@pytest.fixture(autouse=True)
def _benchmarks_importable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.setenv("PYTHONPATH", f"{repository}:{repository / 'src'}")


def run(repository: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(
        list(map(str, command)), cwd=repository, env=environment, capture_output=True, text=True
    )


def test_different_losses_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import train_step

    right = train_step.published_loss
    monkeypatch.setattr(train_step, "published_loss", lambda *batch: 1.05 * right(*batch))
    assert train_step.main(["--tiny", "--repeats", "1"]) == 1
    assert "FAILED: the losses differ" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["lite", "gemma-like"])
def test_the_published_step_learns_what_ours_learns(system: str) -> None:
    """The same gradients of the bridge, up to what bfloat16 rounds."""
    from benchmarks import train_step
    from benchmarks.systems import build_system

    options = {"num_captions": 10, "seed": 0, "tiny": True, "changes": ["bridge.dropout=0"]}
    subject = build_system(system, CPU, **options)  # type: ignore[arg-type]
    subject.model.language_model.float()
    batch = train_step.collate(list(train_step.CaptionDataset(subject)))  # type: ignore[arg-type]
    rows = train_step.whole_rows(subject.data.captions_per_image)
    packed = subject.data.pack([rows[image] for image in range(len(subject.data))])
    loaded = train_step.load_batch(packed, subject.pixels, CPU)
    ours = train_step.summed_loss(subject.model, loaded) / packed.num_supervised
    plain = train_step.published_loss(subject, batch)
    full = train_step.full_logits_loss(subject.model, loaded) / packed.num_supervised
    parameters = dict(subject.model.bridge.named_parameters())
    gradients = [
        torch.autograd.grad(loss, list(parameters.values())) for loss in (ours, plain, full)
    ]
    for loss in (plain, full):
        torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    for name, of_ours, *others in zip(parameters, *gradients, strict=True):
        atol = 1e-4 * of_ours.abs().max().item() + 1e-9
        for other in others:
            torch.testing.assert_close(other, of_ours, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.timeout(600)
def test_all_gpu_measurements_run_on_a_cpu_with_tiny_models(
    repository: Path, tmp_path: Path
) -> None:
    script = repository / "benchmarks" / "gpu.sh"
    python = tmp_path / "python"  # keeps the commands, to be run in this process
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/commands"\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    options = ("--tiny", "--device", "cpu", "--output-dir", out)
    assert run(repository, "bash", script, *options, PYTHON=str(python)).returncode == 0
    for line in (tmp_path / "commands").read_text().splitlines():
        _, module, *arguments = line.split()
        assert importlib.import_module(module).main([*arguments, "--repeats", "1"]) == 0
    figures = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert figures.keys() == {"train-batch-8", "train-batch-10", "memory", "caption"}
    for content in figures.values():
        assert content["rows"] and all(row.keys() == ROW for row in content["rows"])
    assert "ours / published: samples/s" in figures["train-batch-8"]["ratios"]
    assert all(row["peak_bytes"] > 2**26 for row in figures["memory"]["rows"])
    assert (out / "profile-batch-10.txt").stat().st_size > 0
    done = run(repository, "bash", script, "--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr


@pytest.mark.parametrize("system", ["lite", "pvt-blip"])
def test_all_variants_of_captioning_find_the_same_captions(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import caption

    options = ["--tiny", "--system", system, "--repeats", "1"]
    assert caption.main([*options, "--json", str(tmp_path / "caption.json")]) == 0
    printed = capsys.readouterr().out
    for other in ("published loop", "plain generate"):
        assert f"same captions: 3/3 (float32, ours and {other})" in printed
    found = json.loads((tmp_path / "caption.json").read_text(encoding="utf-8"))
    names = {row["variant"] for row in found["rows"]}
    assert names >= {"ours", "batch 1", "no KV cache", "plain generate", "published loop"}
    units = ("samples/s", "samples per CPU second")
    expected = {f"ours / {name}: {unit}" for name in names - {"ours"} for unit in units}
    assert found["ratios"].keys() == expected


def test_our_first_losses_are_those_of_the_published_formula(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import published_losses

    monkeypatch.setattr(sys, "argv", ["published_losses", "--tiny", "--steps", "6"])
    assert published_losses.main() == 0
    *rows, last = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 6
    assert float(last.split("difference ")[1].split()[0]) < 1e-5


def test_every_format_is_compared_with_features_that_were_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # Java takes seconds
    from benchmarks import feature_formats

    file = tmp_path / "formats.json"
    assert feature_formats.main(["--tiny", "--json", str(file)]) == 0
    exact, *others = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["format"] for row in others] == ["float16", "bfloat16", "int8", "float32"]
    # The tiny system's features are made in float16, which that format then keeps as they are.
    assert others[0] == {**exact, "format": "float16"} and exact["captions_changed"] == 0
    for row in others:
        assert row["loss"] == pytest.approx(exact["loss"], rel=0.05) and row["loss"] > 0


def test_rows_by_positions_have_fewer_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import data, harness

    def peak_here(module: str, arguments: list[str]) -> harness.Peak:
        return data.own_peak(data.parse_arguments(arguments), CPU)

    monkeypatch.setattr(harness, "peak_in_child", peak_here)
    monkeypatch.setattr(data, "TINY_SIZES", (20, 60))
    data.main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "data.json")])
    pads = json.loads((tmp_path / "data.json").read_text())["ratios"]
    by_positions, by_captions = (
        pads[f"share of pads: an image a row, by {unit}"] for unit in ("positions", "captions")
    )
    assert by_positions < by_captions


def test_the_plan_of_a_million_images_names_every_stage(
    drawn_caption_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import scale

    file = tmp_path / "plan.json"
    scale.main(["--data-dir", str(drawn_caption_folder), "--tiny", "--json", str(file)])
    printed, plan = capsys.readouterr().out, json.loads(file.read_text())["plan"]
    assert printed.startswith("1,000,000 images") and all(name in printed for name in scale.WHEN)
    assert plan.keys() == scale.WHEN.keys()
    assert all(cost["seconds"] >= 0 for cost in plan.values())
