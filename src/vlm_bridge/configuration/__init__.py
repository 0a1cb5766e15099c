"""Recipes as YAML, with dotted KEY=VALUE overrides.

One YAML file is one experiment. Training keys are flat and have the published names; the parts of
the model are nested. Keys of earlier versions and of the published system are translated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_bridge.configuration.recipe import BridgeOptions as BridgeOptions
from vlm_bridge.configuration.recipe import DecodeSettings as DecodeSettings
from vlm_bridge.configuration.recipe import LanguageModelConfig as LanguageModelConfig
from vlm_bridge.configuration.recipe import Recipe as Recipe
from vlm_bridge.configuration.recipe import VisionEncoderConfig as VisionEncoderConfig
from vlm_bridge.configuration.recipe import flat as flat
from vlm_bridge.configuration.recipe import parse_interval as parse_interval
from vlm_bridge.configuration.recipe import same_setting as same_setting
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import MAX_YAML_CHARACTERS, parse_yaml, shown

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "training-default"
MODEL_SECTIONS = frozenset({"vision_encoder", "language_model", "bridge", "decode"})
# Earlier keys and those of the published system, and what they mean in today's; later ones win.
TRANSLATED: dict[str, Callable[[Any], dict[str, object]]] = {
    "vision_model_name": lambda name: {"vision_encoder.name": name},
    "language_model_name": lambda name: {"language_model.name": name},
    "bridge_num_heads": lambda count: {"bridge.num_heads": count},
    "bridge_dropout": lambda share: {"bridge.dropout": share},
    "max_length": lambda count: {"max_caption_tokens": count},
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
# Keys without a meaning today, and the value that is today's behavior.
REMOVED: dict[str, object] = {
    "pin_memory": True, "generate_samples_every_n_epochs": 1, "early_stopping_min_delta": 0,
    "max_skipped_steps": 10, "keep_step_checkpoints": 3, "halve_batch_on_oom": False,
    "feature_cache_pooling": 1, "text_state_cache": False, "scst_baseline": "leave_one_out",
    "loss_kernel": "auto", "shuffle_buffer": 0, "distillation": None,
}  # fmt: skip


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``dotted.key=value`` overrides, whose values are YAML.

    A file without any model section is in the flat layout of the published system: its keys change
    the recipe `training-default`. Raises ConfigurationError for the first mistake.
    """
    where = str(path) if path is not None else "the command line"
    data = _read_yaml(Path(path)) if path is not None else {}
    if data and not MODEL_SECTIONS & data.keys():
        data = _from_published_layout(data, where)
    for override in overrides:
        _apply_override(data, override)
    return Recipe.build(upgrade(data, where), where)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Apply ``dotted.key=value`` overrides. Raises ConfigurationError as `load_recipe` does."""
    data = recipe.to_dict()
    for override in overrides:
        _apply_override(data, override)
    return recipe_from_dict(data, where="the command line")


def recipe_from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from the YAML layout. Raises ConfigurationError as `load_recipe` does."""
    return Recipe.build(upgrade(data) if isinstance(data, Mapping) else data, where)


def published_recipe(settings: Any, where: str) -> Recipe:
    """Put settings of a checkpoint of the published system over the recipe `training-default`."""
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{where}: its config must be a mapping, not {shown(settings)}")
    return recipe_from_dict(_from_published_layout(settings, where), where)


def shipped_recipe(name: str) -> Path:
    """Return the path of a recipe that ships: in the package, or in ``config/`` of a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "config", package.parents[1] / "config"):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigurationError(f"no recipe named {name!r} ships with vlm-bridge")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            data = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1)) or {}
    except FileNotFoundError:
        raise ConfigurationError(f"no recipe at {path}; recipes that ship are in config/") from None
    except (OSError, ValueError) as error:  # not UTF-8, too
        raise ConfigurationError(
            f"cannot read the recipe {path}: not valid YAML: {error}"
        ) from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must hold keys and values, not a {type(data).__name__}")
    return data


def _from_published_layout(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Put the values of a flat file over the default recipe."""
    data = _read_yaml(shipped_recipe(DEFAULT_RECIPE))
    names = (data["vision_encoder"]["name"], data["bridge"]["kind"], data["language_model"]["name"])
    models = " + ".join(names)
    logger.info("%s names no models: using those of %s (%s)", where, DEFAULT_RECIPE, models)
    data = upgrade({**data, **flat}, where)
    data["device"] = data["device"] or "auto"  # as published: null lets the program choose
    if data["amp_dtype"] == "float32":
        # There the models are loaded in float32, and mixed precision alone computes in less.
        data["language_model"]["dtype"] = data["feature_cache_dtype"] = "float32"
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"{shown(override)} is not KEY=VALUE, such as learning_rate=1e-4")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise ConfigurationError(f"the value in {shown(override)} is not valid YAML") from None
    # A pattern of parameter names has dots of its own: trainable.language_model.*=1e-5
    *parents, last = key.split(".", 1) if key.startswith("trainable.") else key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigurationError(f"{shown(override)}: {parent} is a value, not a section")
    data[last] = value


def upgrade(data: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Translate the keys of a recipe; log those that are ignored, unless ``where`` is None."""
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    if new.get("decode_every_n_steps", 1) is None and new.get("monitor") == "loss":
        new.pop("num_decoded_images", None)  # it had an effect with the other monitors only
    for key, translate in TRANSLATED.items():
        if key in new:
            for target, value in translate(new.pop(key)).items():
                _put(new, target, value)
    ignored = [key for key, todays in REMOVED.items() if new.pop(key, todays) != todays]
    if ignored and where:
        logger.info("%s: ignored, as no longer supported: %s", where, ", ".join(ignored))
    return new


def _put(data: dict[str, Any], dotted: str, value: object) -> None:
    section, _, name = dotted.rpartition(".")
    place = data.setdefault(section, {}) if section else data
    if isinstance(place, dict):  # a mistake is reported where the recipe is built
        place[name] = value
