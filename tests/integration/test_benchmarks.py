"""The benchmarks run on tiny models, write the figures that they promise, and refuse to compare different work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
ROW = {"variant", "samples_per_second", "tokens_per_second", "peak_bytes", "spread"}


@pytest.fixture(autouse=True)
def _benchmarks_importable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.setenv("PYTHONPATH", f"{repository}:{repository / 'src'}")


def quiet(_line: str) -> None:
    pass


class TestHarness:
    def test_variants_take_turns_after_one_unmeasured_round(self) -> None:
        from benchmarks.harness import Variant, measure

        calls: list[str] = []
        variants = [Variant(name, lambda name=name: calls.append(name), samples=1) for name in "ab"]
        results = measure(variants, 3, say=quiet)
        assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
        assert [len(result.seconds) for result in results] == [3, 3]

    def test_ratios_are_medians_over_repeats(self) -> None:
        from benchmarks.harness import Measurement, Report

        # The second repeat was disturbed for both; the ratio does not see it.
        report = Report(
            [Measurement("fast", (1.0, 9.0, 1.0), 10), Measurement("slow", (2.0, 18.0, 2.0), 5)],
            CPU,
        )
        assert report.add_ratio("fast", "slow") == 4.0
        assert report["fast"].samples_per_second == 10.0

    def test_spread_is_the_interquartile_range_over_the_median(self) -> None:
        from benchmarks.harness import Measurement

        assert Measurement("a", (1.0, 2.0, 3.0, 4.0, 5.0), 1).spread == pytest.approx(2 / 3)

    def test_the_file_holds_exactly_the_promised_keys(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from benchmarks.harness import Measurement, Peak, Report

        report = Report([Measurement("a", (2.0,), 10, 30, flops=4e9)], CPU, seed=3, matmul_peak=8e9)
        report.add_peak("a", Peak(2**30, 2**29))
        report.add_peak_share("a")
        report.finish(tmp_path / "new" / "figures.json")
        content = json.loads((tmp_path / "new" / "figures.json").read_text())
        assert content.keys() == {"rows", "ratios", "environment"}
        assert content["rows"] == [
            {"variant": "a", "samples_per_second": 5.0, "tokens_per_second": 15.0, "peak_bytes": 2**30, "spread": 0.0}
        ]  # fmt: skip
        assert content["ratios"] == {"a: share of matmul peak": 0.25}
        environment = content["environment"]
        assert environment["seed"] == 3 and environment["torch"] == torch.__version__
        assert "date" in environment and "processor" in environment
        assert "| a       |      5.00 |" in capsys.readouterr().out

    def test_what_was_not_measured_is_null(self, tmp_path: Path) -> None:
        from benchmarks.harness import Measurement, Peak, Report

        report = Report(
            [Measurement("a", (), 10, peak=Peak(5, 3)), Measurement("b", (), 10, peak=Peak(10, 4))],
            CPU,
        )
        report.add_memory_ratio("a", "b")
        report.finish(tmp_path / "figures.json")
        content = json.loads((tmp_path / "figures.json").read_text())
        assert content["rows"][0]["samples_per_second"] is content["rows"][0]["spread"] is None
        assert content["ratios"] == {
            "a / b: peak memory": 0.5,
            "a / b: peak memory over models": 0.75,
        }

    def test_operations_of_frozen_training(self) -> None:
        from benchmarks.harness import frozen_training_flops

        assert frozen_training_flops(100, 7) == 4 * 100 * 7
        assert frozen_training_flops(100, 7, without_gradient=40) == (4 * 60 + 2 * 40) * 7

    @pytest.mark.skipif(
        sys.platform != "linux", reason="elsewhere the peak of a process cannot be counted anew"
    )
    def test_the_peak_is_that_of_the_step_alone(self) -> None:
        from benchmarks.harness import watch_peak

        def use(mebibytes: int) -> None:
            np.ones(mebibytes * 2**20, np.uint8)

        use(256)
        peak = watch_peak(lambda: use(64), CPU)
        assert 60 * 2**20 < peak.over_models < 128 * 2**20
        assert peak.absolute > peak.over_models


@pytest.mark.parametrize("system", ["lite", "gemma-like"])
def test_training_steps_of_tiny_models(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import train_step

    figures, profile = tmp_path / "figures.json", tmp_path / "profile.txt"
    code = train_step.main(
        [
            "--tiny",
            "--system",
            system,
            "--repeats",
            "1",
            "--json",
            str(figures),
            "--profile",
            str(profile),
        ]
    )
    assert code == 0
    content = json.loads(figures.read_text())
    variants = [row["variant"] for row in content["rows"]]
    assert all(row.keys() == ROW for row in content["rows"])
    assert {
        "ours",
        "full-logits",
        "no-feature-cache",
        "published",
        "encoder-decoder",
        "clipcap",
    } <= set(variants)
    assert ("no-packing" in variants) is ("enter-at-layer-0" in variants) is (system == "lite")
    ratios = {f"ours / {variant}: samples/s" for variant in variants if variant != "ours"}
    assert content["ratios"].keys() == ratios | {"ours: share of matmul peak"}
    assert "aten::mm" in profile.read_text()
    assert "of matmul peak" in capsys.readouterr().out


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

    subject = build_system(
        system, CPU, num_captions=10, seed=0, tiny=True, changes=["bridge.dropout=0"]
    )  # type: ignore[arg-type]
    subject.model.language_model.float()
    images = list(range(len(subject.data)))
    batch = train_step.collate(list(train_step.CaptionDataset(subject)))  # type: ignore[arg-type]
    rows = train_step.whole_rows(subject.data.captions_per_image)
    packed = subject.data.pack([rows[image] for image in images])
    loaded = train_step.load_batch(packed, subject.pixels, CPU)

    parameters = dict(subject.model.bridge.named_parameters())
    ours = train_step.summed_loss(subject.model, loaded) / packed.num_supervised
    plain = train_step.published_loss(subject, batch)
    full = train_step.full_logits_loss(subject.model, loaded) / packed.num_supervised
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(full, ours, rtol=1e-5, atol=0)
    gradients = [
        torch.autograd.grad(loss, list(parameters.values())) for loss in (ours, plain, full)
    ]
    for name, of_ours, of_plain, of_full in zip(parameters, *gradients, strict=True):
        scale = of_ours.abs().max().item()
        for other in (of_plain, of_full):
            torch.testing.assert_close(
                other, of_ours, rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=name
            )


def test_peaks_come_from_processes_of_their_own(tmp_path: Path) -> None:
    from benchmarks import memory

    figures = tmp_path / "figures.json"
    code = memory.main(
        [
            "--tiny",
            "--systems",
            "gemma-like",
            "--batch-sizes",
            "--variants",
            "ours",
            "--json",
            str(figures),
        ]
    )
    assert code == 0
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["variant"] == "gemma-like, batch 4: ours"
    assert 2**26 < row["peak_bytes"] < 2**33


def test_a_child_that_fails_says_why() -> None:
    from benchmarks.harness import peak_in_child

    with pytest.raises(RuntimeError, match=r"exit \d(?s:.)*no-such-file"):
        peak_in_child("json.tool", ["no-such-file"])  # any program that starts quickly


@pytest.mark.timeout(900)  # five programs, one after another
def test_all_gpu_measurements_run_on_a_cpu_with_tiny_models(
    repository: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny", "--device", "cpu", "--output-dir", str(tmp_path)],
        cwd=repository, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert figures.keys() == {"train-batch-8", "train-batch-10", "memory", "caption"}
    for content in figures.values():
        assert content["rows"] and all(row.keys() == ROW for row in content["rows"])
    assert "ours / published: samples/s" in figures["train-batch-8"]["ratios"]
    assert (tmp_path / "profile-batch-10.txt").stat().st_size > 0


def test_gpu_script_refuses_what_it_does_not_know(repository: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--fast"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown option --fast" in done.stderr


def test_our_first_losses_are_those_of_the_published_formula(repository: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.published_losses", "--tiny", "--steps", "6"],
        cwd=repository, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    *rows, last = result.stdout.splitlines()[1:]
    assert len(rows) == 6
    assert float(last.split("difference ")[1].split()[0]) < 1e-5
