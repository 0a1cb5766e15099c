"""What differs between the training that wrote a checkpoint and the one that would continue it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_bridge.configuration import Recipe

ABSENT = "nothing"


def recipe_changes(before: Recipe, now: Recipe) -> list[str]:
    """Each dotted key whose value is another one and decides what is learned, as ``key=now, was before``."""
    return now.changes_since(before)


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
        if key not in before or key not in now or before[key] != now[key]
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
