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
        recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, seed=seed)
        recipe = override_recipe(recipe, [f"bridge.num_queries={queries}"])
        trained = tiny_captioner(recipe).trained_state_dict()
        weights = {key: tensor * (1 + seed) for key, tensor in trained.items()}
        folders[name] = tmp_path / name
        path = folders[name] / "checkpoints" / checkpoints.BEST_WEIGHTS
        checkpoints.save_checkpoint(path, recipe, checkpoints.stored_as(weights, "bfloat16"))
    return folders


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path)["weights"]


def test_weights_are_the_mean_and_captions_come_from_them(runs, tmp_path: Path, run_here) -> None:
    out = tmp_path / "mean"
    command = ("average", runs["first"], runs["second"], "--output-dir", out)
    result = run_here(*command)
    assert result.returncode == 0, result.stderr
    first, second, mean = (weights_of(folder) for folder in (runs["first"], runs["second"], out))
    assert mean.keys() == first.keys()
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (first[name].float() + second[name].float()) / 2)
    restored = Captioner.from_pretrained(out, "cpu").model.trained_state_dict()
    torch.testing.assert_close(restored, mean)

    assert run_here(*command).returncode == 2  # it is there already
    again = run_here("average", *[runs["second"]] * 3, "--output-dir", out, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(weights_of(out)[name], second[name].float()) for name in second)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["first"], "two checkpoints or more"),
        (["first", "wider"], "bridge.num_queries"),
        (["first", "nowhere"], "no checkpoint at"),
    ],
)
def test_runs_that_have_no_mean_are_refused_in_a_line(
    runs, tmp_path: Path, run_here, names: list[str], says: str
) -> None:
    out = tmp_path / "mean"
    folders = [runs.get(name, tmp_path / name) for name in names]
    result = run_here("average", *folders, "--output-dir", out)
    assert result.returncode != 0
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not list(out.rglob("*.pth"))
