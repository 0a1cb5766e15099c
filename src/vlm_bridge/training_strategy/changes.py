"""What differs between the training that wrote a checkpoint and the one that would continue it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.training_strategy.checkpoint import same_setting

FREE_TO_CHANGE = frozenset(
    {
        # where things are
        "data_dir", "checkpoint_dir", "log_dir", "resume_from_checkpoint", "feature_cache", "device", "num_workers",
        # what is told and kept
        "log_every_n_steps", "generate_samples_every_n_epochs", "num_validation_samples", "save_every_n_steps",
        "save_every_n_minutes", "save_every_n_epochs", "keep_step_checkpoints",
    }
)  # fmt: skip
"""Keys of a recipe that decide nothing of what is learned. The dataset itself is compared by its fingerprint."""
ABSENT = "nothing"


def recipe_changes(before: Recipe, now: Recipe) -> list[str]:
    """Each dotted key whose value is another one and decides what is learned, as ``key=now, was before``."""
    return _changes(_flat(before.to_dict()), _flat(now.to_dict()))


def dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The same of two datasets by their `dataset_facts`; nothing where the fingerprints are equal."""
    if before["fingerprint"] == now["fingerprint"]:
        return []
    known = {key: value for key, value in now.items() if key in before}
    return [f"data {change}" for change in _changes(before, known)]


def dataset_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of a caption folder, from its manifest."""
    wanted = ("source", "counts", "split_rule", "seed", "settings", "fingerprint")
    return _flat({key: manifest[key] for key in wanted if key in manifest})


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={now.get(key, ABSENT)}, was {before.get(key, ABSENT)}"
        for key in dict.fromkeys((*before, *now))
        if key.partition(".")[0] not in FREE_TO_CHANGE
        and (key not in before or key not in now or not same_setting(key, before[key], now[key]))
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
