"""Captions of every bridge, decoder and way of decoding are those of `tests/oracle.json`.

The file was recorded with transformers 5.23.0 from a captioner that was a transformers model of its
own. Weights come from NumPy's generator, by name: a library's initialization may change. Captions
of `cross_attention/gemma2` were recorded anew when embeddings came to be edited before Gemma scales
them; `test_interchange` holds that system to the published formula.
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from captioners import SYSTEMS, generated, tiny_recipe
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.model_architecture import generation
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner

RECORDED = json.loads((Path(__file__).parents[1] / "oracle.json").read_text(encoding="utf-8"))
# A pair of tokens may begin here that `no_repeat_ngram_size` must not let come again.
LONG_PROMPT = (1, 40, 50, 40, 51)


class Case(NamedTuple):
    """How the images of a system are captioned; longer than tiny Gemma 2's window of 8."""

    decode: DecodeSettings
    prompt: tuple[int, ...] = (1,)
    alternatives: int = 1


greedy = partial(DecodeSettings, num_beams=1, max_new_tokens=12)
beams = partial(DecodeSettings, num_beams=4, max_new_tokens=12)
CASES = {
    "greedy": Case(greedy()),
    "greedy, prompt": Case(greedy(), LONG_PROMPT),
    "greedy, no repeats, prompt": Case(greedy(no_repeat_ngram_size=2), LONG_PROMPT),
    "greedy, repetition penalty, prompt": Case(greedy(repetition_penalty=1.5), LONG_PROMPT),
    "beams": Case(beams()),
    "beams, prompt": Case(beams(), LONG_PROMPT),
    "beams, no repeats, prompt": Case(beams(no_repeat_ngram_size=2), LONG_PROMPT),
    "beams, short": Case(beams(length_penalty=-2.0)),
    "beams, long": Case(beams(length_penalty=2.0, min_new_tokens=5)),
    "beams, all penalties": Case(
        beams(min_new_tokens=4, no_repeat_ngram_size=2, repetition_penalty=1.3, length_penalty=0.5)
    ),
    "beams, alternatives": Case(beams(), alternatives=3),
}
STEPS = 6  # of which distributions are recorded
SAMPLING = greedy(
    do_sample=True, temperature=0.8, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=2,
    min_new_tokens=STEPS,
)  # fmt: skip


@torch.no_grad()
def set_weights(model: Any) -> None:
    """Give language model and bridge weights that follow from their parameters' names alone."""
    for prefix, part in (("lm", model.language_model.causal_lm), ("bridge", model.bridge)):
        for name, parameter in part.named_parameters():
            random = np.random.default_rng(zlib.crc32(f"{prefix}.{name}".encode()))
            noise = torch.from_numpy(random.normal(size=parameter.shape)).float()
            is_scale = "norm" in f"{prefix}.{name}".lower() and name.endswith("weight")
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else float(is_scale) + 0.2 * noise)
    # A long vector is often far ahead of all others: captions end, and at different lengths.
    head = model.language_model.causal_lm.get_output_embeddings()
    head.weight[model.language_model.eos_id] *= 2.5


def oracle_features(model: Any) -> torch.Tensor:
    """Features [3, N, D] as the system's encoder might give them."""
    encoder = model.vision_encoder
    random = np.random.default_rng(7)
    return torch.from_numpy(random.normal(size=(3, encoder.num_tokens, encoder.embed_dim))).float()


@pytest.fixture(params=SYSTEMS, ids="/".join, scope="module")
def system(request: pytest.FixtureRequest) -> str:
    return "/".join(request.param)


@pytest.fixture(scope="module")
def model(system: str, request: pytest.FixtureRequest) -> CaptionModel:
    bridge, language_model = system.split("/")
    vit, decoder = (request.getfixturevalue(f"tiny_{n}_dir") for n in ("vit", language_model))
    model = build_captioner(tiny_recipe(vit, decoder, bridge))
    set_weights(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_captions_are_those_recorded(model: CaptionModel, system: str, name: str) -> None:
    case = CASES[name]
    features = oracle_features(model)
    ids, scores = generated(model, features, case.prompt, case.decode, case.alternatives)
    assert ids == RECORDED["captions"][system][name]
    assert scores == pytest.approx(RECORDED["scores"][system][name], abs=2e-4)


def test_tokens_are_drawn_from_the_recorded_distributions(
    model: CaptionModel, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws may change; the distributions that they are drawn from may not."""
    expected = RECORDED["distributions"][system]
    tokens = torch.tensor(expected["tokens"])
    distributions: list[torch.Tensor] = []

    def take_the_recorded(_: object, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(distributions)
        distributions.append(scores.softmax(-1))
        chosen = tokens[:, min(step, STEPS - 1), None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    monkeypatch.setattr(generation.Draw, "__call__", take_the_recorded)
    generated(model, oracle_features(model), LONG_PROMPT, SAMPLING)
    for image, steps in enumerate(expected["likeliest"]):
        for step, likeliest in enumerate(steps):
            ids, probabilities = map(list, zip(*likeliest, strict=True))
            found = distributions[step][image, ids].tolist()
            assert found == pytest.approx(probabilities, abs=2e-4), f"image {image}, step {step}"
