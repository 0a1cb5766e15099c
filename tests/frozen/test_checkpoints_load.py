"""Checkpoints written by version 0.1.0 load: training resumes, captions and exports stay.

No assertion here may change with the code. `data/dinov2-gemma` and `data/pvt-blip` hold a recipe,
a checkpoint from the middle of its second epoch, and the best weights at the end of the same run.
`expected.json` holds the losses, weights and captions of that run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drawn_captions import write_drawn_caption_folder
from tiny_models import save_tiny_blip, save_tiny_dinov2, save_tiny_gemma2, save_tiny_pvt_v2

DATA = Path(__file__).parent / "data"
SYSTEMS = ("dinov2-gemma", "pvt-blip")
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
FILES = {"latest_checkpoint.pth", "best_model.pth", "best_model_weights_only.pth"}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the relative names of the recipes mean something."""
    home = tmp_path_factory.mktemp("before")
    (home / "models").mkdir()
    save_tiny_dinov2(home / "models" / "dinov2")
    save_tiny_gemma2(home / "models" / "gemma2")
    save_tiny_pvt_v2(home / "models" / "pvt")
    save_tiny_blip(home / "models" / "blip")
    # Training a WordPiece vocabulary gives another one in each process.
    shutil.copytree(DATA / "blip-tokenizer", home / "models" / "blip", dirs_exist_ok=True)
    write_drawn_caption_folder(home / "data")
    return home


@pytest.fixture(params=SYSTEMS)
def system(
    request: pytest.FixtureRequest, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """Name of a system; its files are in the folder ``before`` of the current one."""
    for name in ("models", "data"):
        shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(DATA / request.param, tmp_path / "before")
    monkeypatch.chdir(tmp_path)
    return request.param


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("vlm-training", ...)`` inside this process: what was written to stdout."""
    from vlm_bridge.cli import main

    entries = {"vlm-bridge": main.run_bridge, "vlm-training": main.run_training}

    def run(program: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            entries[program]()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    return run


def sizes(checkpoint: str) -> dict[str, float]:
    """The norm of each trained tensor."""
    content = torch.load(checkpoint, weights_only=True)
    return {name: tensor.double().norm().item() for name, tensor in content["weights"].items()}


def check_end(system: str, since: int) -> None:
    history = Path("run/logs/history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in history]
    expected = EXPECTED[system]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses == pytest.approx(expected["losses"][since:], rel=1e-4)
    validated = [row["loss"] for row in rows if row["event"] == "validation"]
    assert validated[-1] == pytest.approx(expected["validation"][-1], rel=1e-4)
    found, before = sizes("run/checkpoints/latest_checkpoint.pth"), dict(expected["norms"])
    # Softmax ignores it: its gradient is rounding alone, which Adam makes as large as any other.
    for norms in (found, before):
        norms.pop("bridge.key.bias", None)
    assert found == pytest.approx(before, rel=1e-4, abs=1e-4)


def test_a_run_of_before_is_the_same_from_its_start(system: str, run: Run) -> None:
    run("vlm-training", "--config", "before/recipe.yaml")
    check_end(system, since=0)
    assert {path.name for path in Path("run/checkpoints").iterdir()} >= FILES
    weights_only = torch.load("run/checkpoints/best_model_weights_only.pth", weights_only=True)
    assert weights_only.keys() >= {"format", "recipe", "weights"}


@pytest.mark.parametrize("named", [["before/latest_checkpoint.pth"], ["before"]])
def test_a_checkpoint_of_before_resumes_exactly(named: list[str], system: str, run: Run) -> None:
    said = run("vlm-training", "--resume", *named)
    assert "latest_checkpoint.pth at step 5 of " in said
    check_end(system, since=5)


def test_captions_of_a_checkpoint_of_before_stay(system: str, run: Run) -> None:
    shown = run("vlm-bridge", "caption", "data/test/images", "--checkpoint",
                "before/best_model_weights_only.pth", "--json", "--device", "cpu")  # fmt: skip
    rows, expected = json.loads(shown), EXPECTED[system]["captions"]
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    assert [row["caption"] for row in rows] == [row["caption"] for row in expected]
    scores = [row["score"] for row in expected]
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("system", ["dinov2-gemma"], indirect=True)
def test_a_checkpoint_goes_to_the_published_layout_and_back(system: str, run: Run) -> None:
    checkpoint = "before/best_model_weights_only.pth"
    run("vlm-bridge", "export", checkpoint, "--format", "original", "--output-dir", "published")
    published = Path("published/best_model_weights_only.pth")
    content = torch.load(published, weights_only=True)
    tensors = {name: list(tensor.shape) for name, tensor in content["model_state_dict"].items()}
    assert tensors == EXPECTED["published"]
    run("vlm-bridge", "export", str(published), "--config", "before/recipe.yaml",
        "--output-dir", "back")  # fmt: skip
    shown = run("vlm-bridge", "caption", "data/test/images", "--checkpoint", "back", "--json",
                "--device", "cpu")  # fmt: skip
    assert [row["caption"] for row in json.loads(shown)] == [
        row["caption"] for row in EXPECTED[system]["captions"]
    ]


def test_an_exported_captioner_keeps_its_files(system: str, run: Run) -> None:
    run("vlm-bridge", "export", "before", "--output-dir", "exported")
    assert {path.name for path in Path("exported").iterdir()} >= {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    shown = run("vlm-bridge", "caption", "data/test/images", "--checkpoint", "exported", "--json",
                "--device", "cpu")  # fmt: skip
    assert len(json.loads(shown)) == 8
