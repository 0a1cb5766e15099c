"""`vlm-bridge average`: the mean of several runs' weights."""

from __future__ import annotations

from pathlib import Path

import torch

from captioners import tiny_captioner
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path)["weights"]


def test_the_mean_of_runs_captions_and_other_runs_are_refused(
    make_recipe, tmp_path: Path, run_here
) -> None:
    for number, (name, queries) in enumerate({"first": 2, "second": 2, "wider": 3}.items(), 1):
        recipe = make_recipe(name, f"bridge.num_queries={queries}")
        trained = tiny_captioner(recipe).trained_state_dict()
        weights = {key: number * tensor for key, tensor in trained.items()}
        path = Path(recipe.checkpoint_dir, checkpoints.BEST_WEIGHTS)
        checkpoints.save_checkpoint(path, recipe, checkpoints.stored_as(weights, "bfloat16"))
    first, second, out = (tmp_path / name for name in ("first", "second", "mean"))

    for others, says in (
        ([], "two checkpoints or more"),
        ([tmp_path / "wider"], "bridge.num_queries"),
        ([tmp_path / "nowhere"], "no checkpoint at"),
    ):
        refused = run_here("average", first, *others, "--output-dir", out)
        assert refused.returncode != 0
        assert says in refused.stderr and refused.stderr.count("\n") == 1
    assert not out.exists()

    result = run_here("average", first, second, "--output-dir", out)
    assert result.returncode == 0, result.stderr
    mean = weights_of(out)
    assert mean.keys() == weights_of(first).keys()
    for name, tensor in mean.items():
        expected = (weights_of(first)[name].float() + weights_of(second)[name].float()) / 2
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected)
    restored = Captioner.from_pretrained(out, "cpu").model.trained_state_dict()
    torch.testing.assert_close(restored, mean)
    assert run_here("average", first, second, "--output-dir", out).returncode == 2  # it is there
    again = run_here("average", second, second, "--output-dir", out, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(weights_of(out)[n], x.float()) for n, x in weights_of(second).items())
