"""The moving average of what is trained."""

from __future__ import annotations

import torch
from torch import nn

from vlm_bridge.training_strategy.optimizer import WeightAverage


def test_it_follows_its_formula_and_leaves_frozen_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    average = WeightAverage(model, decay=0.5)
    assert set(average.weights) == {"0.weight", "0.bias"}
    expected = model[0].weight.detach().clone()
    for step in (1, 2, 30):
        with torch.no_grad():
            model[0].weight.add_(1)
        average.update(step, torch.tensor(0.0))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.weights["0.weight"], expected)


def test_a_skipped_step_leaves_it_as_it_is() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    before = average.weights["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    average.update(7, torch.tensor(1.0))
    assert torch.equal(average.weights["weight"], before)


def test_the_model_has_the_average_in_a_block_and_its_own_weights_behind() -> None:
    model = nn.Linear(3, 3)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.mul_(2)
    own, averaged = model.weight.detach().clone(), average.weights["weight"].clone()
    with average.in_model():
        assert torch.equal(model.weight, averaged)
    assert torch.equal(model.weight, own)
    assert torch.equal(average.weights["weight"], averaged)
    assert torch.equal(average.live_weights["weight"], own)
