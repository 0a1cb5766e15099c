"""Which split an image belongs to, decided by its id alone."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from vlm_bridge.errors import UsageError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

DUPLICATE_PRIORITY: tuple[SplitName, ...] = ("test", "val", "train")
"""An image found in several splits stays in the first of these: losing a training image costs least."""

_SYNONYMS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def normalise_split(name: str) -> SplitName | None:
    """Return ours for any usual name of a split (``validation``, ``dev`` ...), None for an unknown one."""
    return _SYNONYMS.get(name.strip().lower())


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise UsageError unless both are in [0, 1) and leave something to train on."""
    for option, fraction in (("--val-fraction", val_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{option} must be at least 0 and below 1, not {fraction}")
    if val_fraction + test_fraction >= 1:
        raise UsageError(
            "--val-fraction and --test-fraction leave nothing to train on: their sum must be below 1"
        )


def assign_split(image_id: str, *, seed: int, val_fraction: float, test_fraction: float) -> SplitName:
    """Return the split of an image: a hash of (seed, id), so adding images never moves the others."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"
