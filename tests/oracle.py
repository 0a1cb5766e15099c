"""Captions that must not change: the systems, settings and weights of `tests/oracle.json`.

The file was recorded with transformers 5.23.0 from a captioner that was a transformers model of its
own, before the image was attached to the language model instead. Weights do not come from a
library's initialization, which may change, but from NumPy's generator, by name. The captions of
`cross_attention/gemma2` were recorded anew when embeddings came to be edited before Gemma scales
them; `test_interchange` holds that system to the published formula.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm_bridge.configuration import DecodeSettings

RECORDED = Path(__file__).with_name("oracle.json")
NUM_IMAGES = 3
PROMPT = (1,)
LONG_PROMPT = (1, 40, 50, 40, 51)
"""A pair of tokens may begin here that `no_repeat_ngram_size` must not let come again."""


@dataclass(frozen=True)
class Case:
    """How the images of a system are captioned; longer than tiny Gemma 2's window of 8."""

    decode: DecodeSettings
    prompt: tuple[int, ...] = PROMPT
    alternatives: int = 1


GREEDY = {"num_beams": 1, "max_new_tokens": 12}
BEAMS = {"num_beams": 4, "max_new_tokens": 12}
CASES = {
    "greedy": Case(DecodeSettings(**GREEDY)),
    "greedy, prompt": Case(DecodeSettings(**GREEDY), LONG_PROMPT),
    "greedy, no repeats, prompt": Case(
        DecodeSettings(**GREEDY, no_repeat_ngram_size=2), LONG_PROMPT
    ),
    "greedy, repetition penalty, prompt": Case(
        DecodeSettings(**GREEDY, repetition_penalty=1.5), LONG_PROMPT
    ),
    "beams": Case(DecodeSettings(**BEAMS)),
    "beams, prompt": Case(DecodeSettings(**BEAMS), LONG_PROMPT),
    "beams, no repeats, prompt": Case(DecodeSettings(**BEAMS, no_repeat_ngram_size=2), LONG_PROMPT),
    "beams, short": Case(DecodeSettings(**BEAMS, length_penalty=-2.0)),
    "beams, long": Case(DecodeSettings(**BEAMS, length_penalty=2.0, min_new_tokens=5)),
    "beams, all penalties": Case(
        DecodeSettings(
            **BEAMS,
            min_new_tokens=4,
            no_repeat_ngram_size=2,
            repetition_penalty=1.3,
            length_penalty=0.5,
        )
    ),
    "beams, alternatives": Case(DecodeSettings(**BEAMS), alternatives=3),
}
STEPS = 6
"""Of which distributions are recorded."""
SAMPLING = Case(
    DecodeSettings(
        **GREEDY,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        min_new_tokens=STEPS,
    ),
    LONG_PROMPT,
)
"""Draws may change; the distributions that they are drawn from may not."""


def recorded() -> dict[str, Any]:
    """Token ids by system and case, and the distributions of `SAMPLING`."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@torch.no_grad()
def set_weights(model: Any) -> None:
    """Give language model and bridge weights that follow from their parameters' names alone."""
    for prefix, part in (("lm", model.language_model.causal_lm), ("bridge", model.bridge)):
        for name, parameter in part.named_parameters():
            parameter.copy_(_weights(f"{prefix}.{name}", parameter))
    # A long vector is often far ahead of all others: captions end, and at different lengths.
    head = model.language_model.causal_lm.get_output_embeddings()
    head.weight[model.language_model.eos_id] *= 2.5


def _weights(name: str, parameter: nn.Parameter) -> torch.Tensor:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = torch.from_numpy(random.normal(size=parameter.shape)).float()
    if parameter.ndim > 1:
        return 0.3 * noise
    scale = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
    return scale + 0.2 * noise


def oracle_features(model: Any) -> torch.Tensor:
    """Features [NUM_IMAGES, N, D] as the system's encoder might give them."""
    encoder = model.vision_encoder
    random = np.random.default_rng(7)
    shape = (NUM_IMAGES, encoder.num_tokens, encoder.embed_dim)
    return torch.from_numpy(random.normal(size=shape)).float()
