"""The states of all random number generators that a training may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Start every generator from a seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the GPUs' generators, as a checkpoint can hold them."""
    kind, key, position, has_gauss, gauss = np.random.get_state()
    return {
        "random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
        "python_random_state": random.getstate(),
        "numpy_random_state": (
            str(kind), torch.from_numpy(np.asarray(key, np.int64)), int(position), int(has_gauss), float(gauss),
        ),
    }  # fmt: skip


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Continue from `random_states`; generators that an earlier version kept nothing of stay as they are."""
    torch.set_rng_state(states["random_state"])
    if device.type == "cuda":
        for index, state in enumerate(states["cuda_random_state"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    if "python_random_state" in states:
        version, internal, gauss = states["python_random_state"]
        random.setstate((version, tuple(internal), gauss))
    if "numpy_random_state" in states:
        kind, key, *rest = states["numpy_random_state"]
        np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
