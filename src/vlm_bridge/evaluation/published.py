"""Scores that papers print, to set one's own beside. None of them was measured here.

Each figure was checked against a second page that shows it: a transcription of the paper, a repository that sets its
own result beside it, or the paper's entry in Papers with Code. Where that page names no table, none is named here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Scores of a published system, as fractions (papers print CIDEr 1.133 as 113.3)."""

    system: str
    dataset: str
    source: str
    scores: Mapping[str, float]


XU = "Xu et al. 2015, arXiv:1502.03044, table 1; test split, VGG features"
ANDERSON = "Anderson et al. 2018, arXiv:1707.07998; Karpathy test split"
MOKADY = "Mokady et al. 2021, arXiv:2111.09734; Karpathy test split"
RAMOS = "Ramos et al. 2023, arXiv:2209.15323"

PUBLISHED = (
    Published(
        "Show, Attend and Tell (soft attention)",
        "flickr8k",
        XU,
        {"BLEU-1": 0.670, "BLEU-2": 0.448, "BLEU-3": 0.299, "BLEU-4": 0.195, "METEOR": 0.1893},
    ),
    Published(
        "Show, Attend and Tell (hard attention)",
        "flickr8k",
        XU,
        {"BLEU-1": 0.670, "BLEU-2": 0.457, "BLEU-3": 0.314, "BLEU-4": 0.213, "METEOR": 0.2030},
    ),
    Published(
        "Show, Attend and Tell (soft attention)",
        "flickr30k",
        XU,
        {"BLEU-1": 0.667, "BLEU-2": 0.434, "BLEU-3": 0.288, "BLEU-4": 0.191, "METEOR": 0.1849},
    ),
    Published(
        "Show, Attend and Tell (hard attention)",
        "flickr30k",
        XU,
        {"BLEU-1": 0.669, "BLEU-2": 0.439, "BLEU-3": 0.296, "BLEU-4": 0.199, "METEOR": 0.1846},
    ),
    Published(
        "SmallCap (trained on COCO, prompted with retrieved captions)",
        "flickr30k",
        f"{RAMOS}; test split",
        {"CIDEr": 0.606},
    ),
    Published(
        "Up-Down (cross-entropy)",
        "coco",
        ANDERSON,
        {"BLEU-4": 0.362, "METEOR": 0.270, "ROUGE-L": 0.564, "CIDEr": 1.135, "SPICE": 0.203},
    ),
    Published(
        "Up-Down (CIDEr optimised)",
        "coco",
        ANDERSON,
        {"BLEU-4": 0.363, "METEOR": 0.277, "ROUGE-L": 0.569, "CIDEr": 1.201, "SPICE": 0.214},
    ),
    Published(
        "ClipCap (transformer, GPT-2 frozen)",
        "coco",
        MOKADY,
        {"BLEU-4": 0.3353, "METEOR": 0.2745, "CIDEr": 1.1308, "SPICE": 0.2105},
    ),
    Published(
        "ClipCap (MLP, GPT-2 tuned)",
        "coco",
        MOKADY,
        {"BLEU-4": 0.3215, "METEOR": 0.2710, "CIDEr": 1.0835, "SPICE": 0.2012},
    ),
    Published(
        "SmallCap (d=16, GPT-2 large)",
        "coco",
        f"{RAMOS}; Karpathy test split",
        {"BLEU-4": 0.372, "METEOR": 0.283, "CIDEr": 1.218},
    ),
    Published(
        "BLIP (ViT-B, CapFilt-L, 129M images)",
        "coco",
        "Li et al. 2022, arXiv:2201.12086, table 7; Karpathy test split",
        {"BLEU-4": 0.397, "CIDEr": 1.333},
    ),
)


def published_on(dataset: str) -> list[Published]:
    """Published systems on a dataset, known by how its name begins (``flickr8k``, ``Flickr8k-clean``)."""
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    return [system for system in PUBLISHED if name.startswith(system.dataset)]
