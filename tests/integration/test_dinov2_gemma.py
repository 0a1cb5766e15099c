"""The DINOv2 + Gemma-2 system: its commands on tiny models, its numbers at full size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from vlm_bridge.cli.main import run_training
from vlm_bridge.configuration import DEFAULT_RECIPE
from vlm_bridge.formats import dinov2_gemma

# A file in the original project's layout: no model is named.
FLAT = """\
batch_size: 8
checkpoint_dir: checkpoints
data_dir: data/groundcap
device: null
learning_rate: 1.0e-03
log_dir: logs
log_every_n_steps: 1
num_epochs: 3
num_workers: 0
use_amp: true
amp_dtype: bfloat16
"""


@pytest.fixture
def vlm_training(
    tmp_path: Path,
    drawn_caption_folder: Path,
    tiny_dinov2_dir: Path,
    tiny_gemma2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Run ``vlm-training ARGUMENTS`` in a fresh folder on tiny models; return its stdout."""
    monkeypatch.chdir(tmp_path)
    settings = (
        f"vision_encoder.name={tiny_dinov2_dir}", f"language_model.name={tiny_gemma2_dir}",
        "vision_encoder.image_size=56", "decode.max_new_tokens=6", "num_workers=0", "device=cpu",
        f"data_dir={drawn_caption_folder}", "feature_cache=features", "log_every_n_steps=1",
    )  # fmt: skip

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlm-training", *arguments, *settings])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_training()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    return run


def events(kind: str) -> list[dict]:
    history = Path("logs/history.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, history) if event["event"] == kind]


def test_the_published_commands(vlm_training: Callable[..., str], tmp_path: Path) -> None:
    latest = "checkpoints/latest_checkpoint.pth"
    # 48 captions of 24 images, in batches of 8.
    alone = vlm_training("num_epochs=1")
    assert f"{DEFAULT_RECIPE}.yaml" in alone and "done: 6 steps" in alone
    resumed = vlm_training("--resume", latest, "--force", "num_epochs=2")
    assert f"resumed {latest} at step 6 of 12" in resumed and "done: 12 steps" in resumed

    (tmp_path / "original.yaml").write_text(FLAT, encoding="utf-8")
    both = vlm_training("--config", "original.yaml", "--resume", latest, "--force")
    assert "original.yaml names no models" in both
    assert f"resumed {latest} at step 12 of 18" in both
    assert [event["step"] for event in events("train")] == list(range(1, 19))

    options = ("num_epochs=1", "gradient_checkpointing=true")
    config = vlm_training("--config", "original.yaml", *options)
    assert "resumed" not in config and "done: 6 steps" in config
    first, *_, last = events("train")[-6:]
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert last["learning_rate"] < 2e-4


def test_what_tensorboard_gets(vlm_training: Callable[..., str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = vlm_training("num_epochs=1", "num_validation_samples=2", "gradient_clip_val=1e-6")
    recorded = EventAccumulator("logs").Reload()
    assert set(recorded.Tags()["scalars"]) == {
        "train/loss", "train/learning_rate", "train/grad_norm_before_clip", "epoch/train_loss",
        "val/loss", "val/perplexity", "val/avg_sequence_length", "val/token_diversity",
        "val/visual_gain", "val/sample_bleu_avg", "val/sample_length_avg", "val/sample_diversity",
    }  # fmt: skip
    recipe = recorded.Tensors("training/config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate:" in recipe and "num_epochs: 1" in recipe
    text = recorded.Tensors("val/sample_0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reference: " in text and "sample 1: " in log
    # The norm is that of before clipping.
    assert min(event["gradient_norm"] for event in events("train")) > 1e-6


def test_info_of_the_published_system(run_cli, repository: Path, tmp_path: Path) -> None:
    # Nothing cached, and no hub: names and sizes are known without.
    environment = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    shown = run_cli(
        "info", "--config", repository / "config/training-default.yaml", env=environment
    )
    assert shown.returncode == 0, shown.stderr
    for mention in (
        "304,368,640", "2,614,341,888", "66,092,544", "2.21%", "[B, 257, 1024]",
    ):  # fmt: skip
        assert mention in shown.stdout


def test_a_run_of_the_original_project_continues(
    vlm_training: Callable[..., str], tmp_path: Path
) -> None:
    """Its weights, moments and place are taken: the rest of the training is as ours."""
    (tmp_path / "flat.yaml").write_text(FLAT, encoding="utf-8")
    settings = ("bridge.num_heads=4", "bridge.dropout=0", "amp_dtype=float32",
                "num_validation_samples=0")  # fmt: skip
    vlm_training("--config", "flat.yaml", "save_every=6 steps", *settings)
    losses = [event["loss"] for event in events("train")]
    per_epoch = len(losses) // 3
    # Written by us, in the layout in which the original project writes after an epoch.
    content = torch.load(f"checkpoints/step_{2 * per_epoch:08d}.pth", weights_only=True)
    moments = content["training"]["optimizer"]
    number = {
        name: index
        for group in moments["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    order = list(dinov2_gemma.ORIGINAL_NAMES)
    assert len(content["weights"]) == len(order)
    original = {
        "epoch": 2,
        "model_state_dict": dinov2_gemma.to_original(content["weights"], "it"),
        "optimizer_state_dict": {
            "state": {i: moments["state"][number[name]] for i, name in enumerate(order)},
            "param_groups": [{"lr": 1e-5, "params": list(range(len(order)))}],
        },
        "scheduler_state_dict": {"T_max": 3 * per_epoch, "last_epoch": 2 * per_epoch},
        "best_val_loss": 0.1,
        "early_stopping_counter": 2,
        "config": {**yaml.safe_load(FLAT), "checkpoint_dir": "other", "log_dir": "other-logs"},
    }
    torch.save(original, "original_latest.pth")
    log = vlm_training("--resume", "original_latest.pth", *settings)
    assert f"at epoch 3, step {2 * per_epoch} of {3 * per_epoch}, with its optimizer" in log
    lines = Path("other-logs/history.jsonl").read_text().splitlines()
    rest = [e["loss"] for e in map(json.loads, lines) if e["event"] == "train"]
    assert rest == pytest.approx(losses[2 * per_epoch :], rel=1e-5)
    torch.save({**original, "optimizer_state_dict": {}}, "o.pth")
    assert "with a new optimizer" in vlm_training("--resume", "o.pth", *settings)
