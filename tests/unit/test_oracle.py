"""Captions of every bridge, decoder and way of decoding are those that were recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioners import SYSTEMS, generated, tiny_recipe
from oracle import CASES, SAMPLING, STEPS, oracle_features, recorded, set_weights
from vlm_bridge.model_architecture import generation
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner

RECORDED = recorded()


@pytest.fixture(params=SYSTEMS, ids="/".join, scope="module")
def system(request: pytest.FixtureRequest) -> str:
    return "/".join(request.param)


@pytest.fixture(scope="module")
def model(system: str, request: pytest.FixtureRequest) -> CaptionModel:
    bridge, language_model = system.split("/")
    vision_encoder, decoder = (
        request.getfixturevalue(f"tiny_{name}_dir") for name in ("vit", language_model)
    )
    model = build_captioner(tiny_recipe(Path(vision_encoder), Path(decoder), bridge))
    set_weights(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_captions_are_those_recorded(model: CaptionModel, system: str, name: str) -> None:
    case = CASES[name]
    ids, scores = generated(
        model, oracle_features(model), case.prompt, case.decode, case.alternatives
    )
    assert ids == RECORDED["captions"][system][name]
    assert scores == pytest.approx(RECORDED["scores"][system][name], abs=2e-4)


def test_tokens_are_drawn_from_the_recorded_distributions(
    model: CaptionModel, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = RECORDED["distributions"][system]
    tokens = torch.tensor(expected["tokens"])
    distributions: list[torch.Tensor] = []

    def take_the_recorded(_: object, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(distributions)
        distributions.append(scores.softmax(-1))
        chosen = tokens[:, min(step, STEPS - 1), None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    monkeypatch.setattr(generation.Draw, "__call__", take_the_recorded)
    generated(model, oracle_features(model), SAMPLING.prompt, SAMPLING.decode)
    for image, steps in enumerate(expected["likeliest"]):
        for step, likeliest in enumerate(steps):
            ids, probabilities = map(list, zip(*likeliest, strict=True))
            found = distributions[step][image, ids].tolist()
            assert found == pytest.approx(probabilities, abs=2e-4), f"image {image}, step {step}"
