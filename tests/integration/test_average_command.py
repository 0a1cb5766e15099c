"""`vlm-bridge average`: the mean of several runs' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import override_recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints


@pytest.fixture
def runs(tmp_path: Path, tiny_vit_dir: Path, tiny_llama_dir: Path) -> dict[str, Path]:
    """Runs as training leaves them; `wider` has more queries."""
    folders = {}
    for seed, (name, queries) in enumerate({"first": 2, "second": 2, "wider": 3}.items()):
        recipe = override_recipe(
            tiny_recipe(tiny_vit_dir, tiny_llama_dir, seed=seed), [f"bridge.num_queries={queries}"]
        )
        weights = {
            key: tensor * (1 + seed)
            for key, tensor in tiny_captioner(recipe).trained_state_dict().items()
        }
        folders[name] = tmp_path / name
        path = folders[name] / "checkpoints" / checkpoints.BEST_WEIGHTS
        checkpoints.save_checkpoint(path, recipe, checkpoints.in_bfloat16(weights))
    return folders


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path)["weights"]


def test_weights_are_the_mean_and_captions_come_from_them(runs, tmp_path: Path, run_here) -> None:
    out = tmp_path / "mean"
    result = run_here("average", runs["first"], runs["second"], "--output-dir", out)
    assert result.returncode == 0, result.stderr
    first, second, mean = (weights_of(folder) for folder in (runs["first"], runs["second"], out))
    assert mean.keys() == first.keys()
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (first[name].float() + second[name].float()) / 2)
        assert not torch.equal(tensor, first[name].float()) or not tensor.any(), name
    restored = Captioner.from_pretrained(out, "cpu").model.trained_state_dict()
    torch.testing.assert_close(restored, mean)


def test_the_mean_of_a_run_with_itself_is_the_run(runs, tmp_path: Path, run_here) -> None:
    out = tmp_path / "mean"
    assert run_here("average", *[runs["first"]] * 3, "--output-dir", out).returncode == 0
    first, mean = weights_of(runs["first"]), weights_of(out)
    assert all(torch.equal(mean[name], tensor.float()) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["first"], "two checkpoints or more"),
        (["first", "wider"], "bridge.num_queries"),
        (["first", "nowhere"], "no checkpoint at"),
    ],
)
def test_what_cannot_be_averaged_is_refused_in_a_line(
    runs, tmp_path: Path, run_here, names: list[str], says: str
) -> None:
    out = tmp_path / "mean"
    folders = [runs.get(name, tmp_path / name) for name in names]
    result = run_here("average", *folders, "--output-dir", out)
    assert result.returncode != 0
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not list(out.rglob("*.pth"))


def test_an_earlier_average_stays_unless_told(runs, tmp_path: Path, run_here) -> None:
    out = tmp_path / "mean"
    command = ("average", runs["first"], runs["second"], "--output-dir", out)
    assert run_here(*command).returncode == 0
    before = weights_of(out)
    assert run_here(*command).returncode == 2
    assert (
        run_here("average", *[runs["second"]] * 2, "--output-dir", out, "--overwrite").returncode
        == 0
    )
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_of(out).items())
