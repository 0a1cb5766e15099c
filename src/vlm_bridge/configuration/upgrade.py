"""Recipes of earlier versions, and of the published DINOv2 + Gemma-2 system, in today's layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

RENAMED: dict[str, str] = {
    "vision_model_name": "vision_encoder.name",
    "language_model_name": "language_model.name",
    "bridge_num_heads": "bridge.num_heads",
    "bridge_dropout": "bridge.dropout",
    "max_length": "max_caption_tokens",
}

Translation = Callable[[Any], dict[str, object]]
TRANSLATED: dict[str, Translation] = {
    "use_scheduler": lambda used: {} if used else {"scheduler_type": "constant"},
    "use_amp": lambda used: {} if used else {"amp_dtype": "float32"},
    "use_early_stopping": lambda used: {} if used else {"early_stopping_patience": None},
    "val_every_n_epochs": lambda n: {"validate_every": f"{n} epoch{'s' * (n != 1)}"},
    "decode_every_n_steps": lambda n: {"validate_every": f"{n} steps"} if n else {},
    "save_every_n_epochs": lambda n: {"save_every": f"{n} epoch{'s' * (n != 1)}"},
    "save_every_n_minutes": lambda n: {"save_every": f"{n} minutes"} if n else {},
    "save_every_n_steps": lambda n: {"save_every": f"{n} steps"} if n else {},
    "quantize_language_model": lambda t: {} if t == "none" else {"language_model.dtype": t},
}
"""Keys and what they mean in today's; later ones win."""

REMOVED: dict[str, object] = {
    "pin_memory": True,
    "generate_samples_every_n_epochs": 1,
    "early_stopping_min_delta": 0,
    "max_skipped_steps": 10,
    "keep_step_checkpoints": 3,
    "halve_batch_on_oom": False,
    "feature_cache_pooling": 1,
    "text_state_cache": False,
    "scst_baseline": "leave_one_out",
    "loss_kernel": "auto",
    "shuffle_buffer": 0,
}
"""Keys without a meaning today, and the value that is today's behavior."""


def upgrade(data: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Return a recipe's dict with today's keys.

    Args:
        where: place of the recipe, to log which values are ignored; None is silent.
    """
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for key, target in RENAMED.items():
        if key in new:
            _put(new, target, new.pop(key))
    if new.get("decode_every_n_steps", 1) is None and new.get("monitor") == "loss":
        new.pop("num_decoded_images", None)  # it had an effect with the other monitors only
    for key, translate in TRANSLATED.items():
        if key in new:
            for target, value in translate(new.pop(key)).items():
                _put(new, target, value)
    ignored = [key for key, todays in REMOVED.items() if new.pop(key, todays) != todays]
    if isinstance(stage := new.get("distillation"), dict):
        new["distillation"] = stage.pop("teacher", None)
        ignored += [f"distillation.{key}" for key in stage]
    if ignored and where:
        logger.info("%s: ignored, as no longer supported: %s", where, ", ".join(ignored))
    return new


def _put(data: dict[str, Any], dotted: str, value: object) -> None:
    section, _, name = dotted.rpartition(".")
    place = data.setdefault(section, {}) if section else data
    if isinstance(place, dict):  # a mistake is reported where the recipe is built
        place[name] = value
