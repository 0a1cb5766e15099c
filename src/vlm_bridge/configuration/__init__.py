"""Recipes: strict pydantic models <-> YAML, with dotted KEY=VALUE overrides.

One YAML file is one experiment. Training keys are flat and have the published names; the parts of
the model are nested. A mistake is one line with the place, the key and the nearest known key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vlm_bridge.configuration.sections import (
    BRIDGE_OPTIONS,
    MAX_RATE,
    MAX_RETURN_SEQUENCES,
    AnyBridgeOptions,
    BridgeOptions,
    Count,
    CountOrZero,
    CrossAttentionOptions,
    DecodeSettings,
    DeepPrefixOptions,
    DistillationConfig,
    Interval,
    LanguageModelConfig,
    Number,
    PrefixOptions,
    ProjectionOptions,
    Rate,
    ResamplerOptions,
    Section,
    Seed,
    Share,
    VisionEncoderConfig,
    parse_interval,
)
from vlm_bridge.configuration.upgrade import upgrade
from vlm_bridge.credentials import holds_credential
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import MAX_YAML_CHARACTERS, parse_yaml, shown

__all__ = [
    "BRIDGE_OPTIONS",
    "DEFAULT_RECIPE",
    "MAX_RETURN_SEQUENCES",
    "BridgeOptions",
    "CrossAttentionOptions",
    "DecodeSettings",
    "DeepPrefixOptions",
    "DistillationConfig",
    "Interval",
    "LanguageModelConfig",
    "PrefixOptions",
    "ProjectionOptions",
    "Recipe",
    "ResamplerOptions",
    "VisionEncoderConfig",
    "load_recipe",
    "override_recipe",
    "parse_interval",
    "published_recipe",
    "recipe_from_dict",
    "same_setting",
    "shipped_recipe",
]

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "training-default"
"""The published DINOv2 + Gemma-2 system."""
MODEL_SECTIONS = frozenset({"vision_encoder", "language_model", "bridge", "decode"})

# What a resumed run may change: "place" is where things are on this machine, "free" is what a run
# logs and keeps. Everything else decides what is learned.
PLACE = Field(json_schema_extra={"resume": "place"})
FREE = Field(json_schema_extra={"resume": "free"})


def _interval(text: str) -> str:
    return str(parse_interval(text))


def _no_minutes(text: str) -> str:
    if parse_interval(text).unit == "minute":
        raise ValueError("must count epochs or steps, not minutes")
    return _interval(text)


class Recipe(Section):
    """One experiment. Defaults are those of the published training recipe where it has a value.

    Attributes:
        shuffle_buffer: 0 shuffles all training images in every epoch; N reads shard after shard and
            shuffles within windows of N images, for disks that are slow at random access.
        max_bad_samples: share of a split's captions, and of its images, that may be unreadable.
            They are skipped and listed in ``log_dir``; above the share training does not start.
        feature_cache: `auto` keeps the encoder's features in ``data_dir``/.features if reading them
            is measured to be quicker than encoding; a folder keeps them there; `off` encodes.
        feature_cache_dtype: `int8` has a scale per token.
        feature_cache_views: random crops per training image, one an epoch in turn; 0 is the whole
            image, as validation always is.
        trainable: patterns of parameter names and the learning rate of each (null:
            `learning_rate`); the rest stays frozen.
        tokens_per_batch: fill batches with rows of like length up to this many positions;
            `batch_size` is ignored then.
        label_smoothing: share of each target spread over the vocabulary (Szegedy et al. 2016).
        weight_averaging: decay of a moving average of trained weights, such as 0.999; validation,
            captions and checkpoints use the average.
        warmup_steps: of a linear rise from zero, at most a tenth of all steps.
        objective: `cross_entropy` of human captions, or `scst`: self-critical sequence training on
            CIDEr-D (Rennie et al. 2017), which wants `start_from` and a small learning rate.
        scst_samples: captions drawn for each image of a step; `batch_size` counts them.
        scst_temperature: of the samples; below 1 more of them are good.
        start_from: checkpoint of the same architecture whose weights a new run starts from.
        amp_dtype: of mixed precision; `float32` is none.
        compile: compile the language model for training.
        validate_every: "2 epochs" or "500 steps"; the last step is validated, too.
        monitor: decides the best checkpoint and early stopping: validation loss, or a score of
            captions decoded in validation.
        num_decoded_images: first images of validation that are decoded and scored; null is none
            with ``monitor=loss``, else 200.
        early_stopping_patience: validations in a row without a new best; null trains to the end.
        save_every: "1 epoch" or "30 minutes" saves the latest checkpoint; "500 steps" keeps
            the newest ``keep_step_checkpoints`` of single steps. Every validation saves the latest.
        resume_from_checkpoint: checkpoint, folder, or `auto` (the newest in ``checkpoint_dir``).
    """

    vision_encoder: VisionEncoderConfig = VisionEncoderConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    bridge: AnyBridgeOptions = PrefixOptions()
    decode: DecodeSettings = DecodeSettings()
    distillation: DistillationConfig | None = None

    # Data
    data_dir: Annotated[str, PLACE] = "data/flickr8k"
    captions_per_image: Count = 1
    max_caption_tokens: Count = 128
    num_workers: Annotated[CountOrZero, PLACE] = 2
    shuffle_buffer: CountOrZero = 0
    max_bad_samples: Annotated[Number, Field(ge=0, le=1)] = 0.01
    feature_cache: Annotated[str, PLACE, BeforeValidator(lambda v: "off" if v is False else v)] = (
        "auto"  # YAML 1.1 reads a bare `off` as false
    )
    feature_cache_dtype: Literal["float16", "bfloat16", "int8", "float32"] = "float16"
    feature_cache_views: CountOrZero = 0

    # Optimization
    trainable: Annotated[dict[str, Rate | None], Field(min_length=1)] = Field(
        default_factory=lambda: {"bridge.*": None}
    )
    learning_rate: Rate = 1e-5
    min_lr: Rate = 1e-6
    num_epochs: Count = 12
    max_steps: Count | None = None
    batch_size: Count = 8
    tokens_per_batch: Count | None = None
    gradient_accumulation_steps: Count = 1
    gradient_clip_val: Annotated[Number, Field(gt=0, le=1e6)] = 0.3
    weight_decay: Rate = 0.01
    label_smoothing: Share = 0.0
    weight_averaging: Annotated[Number, Field(gt=0, lt=1)] | None = None
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: CountOrZero = 0
    seed: Seed = 0

    # Objective and start
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    scst_samples: Annotated[int, Field(ge=2, le=1_000)] = 5
    scst_temperature: Annotated[Number, Field(gt=0, le=MAX_RATE)] = 1.0
    start_from: Annotated[str | None, PLACE] = None

    # Precision and devices
    amp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: Annotated[str, PLACE] = "auto"

    # Validation, early stopping, checkpoints, logs
    validate_every: Annotated[str, AfterValidator(_no_minutes)] = "1 epoch"
    monitor: Literal["loss", "bleu4", "cider"] = "loss"
    num_decoded_images: CountOrZero | None = None
    early_stopping_patience: Count | None = 3
    save_every: Annotated[str, FREE, AfterValidator(_interval)] = "1 epoch"
    keep_step_checkpoints: Annotated[Count, FREE] = 3
    log_every_n_steps: Annotated[Count, FREE] = 10
    num_validation_samples: Annotated[CountOrZero, FREE] = 4
    max_validation_images: Count | None = None
    checkpoint_dir: Annotated[str, PLACE] = "checkpoints"
    log_dir: Annotated[str, PLACE] = "logs"
    resume_from_checkpoint: Annotated[str | None, PLACE] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if secret := next(
            (key for key, text in _texts(self.to_dict()) if holds_credential(text)), None
        ):
            raise ValueError(
                f"{secret} holds a token or a password, and a recipe goes into checkpoints and "
                "reports: give the plain name or address, and the hub's token in HF_TOKEN"
            )
        if self.learning_rate == 0 and any(self.trainable.values()):
            raise ValueError(
                "trainable has learning rates, which follow the schedule of learning_rate: it must "
                "be above 0"
            )
        if self.distillation is not None and self.feature_cache_views:
            raise ValueError(
                "distillation compares two encoders on the same image: it needs "
                "feature_cache_views=0"
            )
        if self.monitor != "loss" and self.num_decoded_images == 0:
            raise ValueError(f"num_decoded_images must be above 0 with monitor={self.monitor}")
        if self.objective == "scst":
            for key in ("tokens_per_batch", "label_smoothing"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} needs given captions: leave it out with objective=scst"
                    )
            self._check_divides("scst_samples")
        elif self.tokens_per_batch is None:
            self._check_divides("captions_per_image")
        return self

    def _check_divides(self, key: str) -> None:
        if self.batch_size % getattr(self, key):
            raise ValueError(
                f"batch_size counts captions: {self.batch_size} is not a multiple of "
                f"{key}={getattr(self, key)}"
            )

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype of mixed precision; None without it."""
        return None if self.amp_dtype == "float32" else self.amp_dtype

    @property
    def decoded_images(self) -> int:
        """Number of images that each validation decodes and scores."""
        if self.num_decoded_images is None:
            return 0 if self.monitor == "loss" else 200
        return self.num_decoded_images

    @classmethod
    def keys_marked(cls, *marks: str) -> frozenset[str]:
        """Return keys that a resumed run may change: `place`, `free` or both."""
        extras = {key: field.json_schema_extra for key, field in cls.model_fields.items()}
        return frozenset(
            key
            for key, extra in extras.items()
            if isinstance(extra, dict) and extra["resume"] in marks
        )

    def changes_since(self, before: Recipe) -> list[str]:
        """Return each dotted key that decides what is learned and differs.

        Returns:
            ``key=now, was before`` each.
        """
        free = self.keys_marked("place", "free")
        now, then = (
            _flat({key: value for key, value in recipe.to_dict().items() if key not in free})
            for recipe in (self, before)
        )
        return [
            f"{key}={now.get(key, 'nothing')}, was {then.get(key, 'nothing')}"
            for key in dict.fromkeys((*then, *now))
            if key not in now or key not in then or not same_setting(key, then[key], now[key])
        ]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def same_setting(key: str, has: Any, wanted: Any) -> bool:
    """Return whether two values of a dotted key mean the same.

    Models are compared by the last part of their name: google/gemma-2-2b and models/gemma-2-2b are
    one model that was moved. A revision of None matches any other.
    """
    if key.endswith(".name") and has and wanted:
        of_has, of_wanted = (
            [Path(name).name for name in names.split(" + ")] for names in (has, wanted)
        )
        return of_has == of_wanted
    if key.endswith(".revision"):
        return None in (has, wanted) or has == wanted
    return has == wanted


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``dotted.key=value`` overrides (values are YAML).

    A file without any model section is in the flat layout of the published system: its keys change
    the recipe `training-default`.

    Raises:
        ConfigurationError: the file is missing or not YAML, a key is unknown, a type is wrong or a
            value impossible.
    """
    where = str(path) if path is not None else "the command line"
    data = _read_yaml(Path(path)) if path is not None else {}
    if data and not MODEL_SECTIONS & data.keys():
        data = _from_published_layout(data, where)
    for override in overrides:
        _apply_override(data, override)
    return recipe_from_dict(upgrade(data, where), where)


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
    """Put settings of a checkpoint of the published system over the recipe `training-default`.

    Raises:
        ConfigurationError: as `load_recipe`.
    """
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{where}: its config must be a mapping, not {shown(settings)}")
    return recipe_from_dict(_from_published_layout(settings, where), where=where)


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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the recipe {path}: {error}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid YAML, or no recipe: {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must hold keys and values, not a {type(data).__name__}")
    return data


def _from_published_layout(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Put the values of a flat file over the default recipe."""
    data = _read_yaml(shipped_recipe(DEFAULT_RECIPE))
    names = (data["vision_encoder"]["name"], data["bridge"]["kind"], data["language_model"]["name"])
    logger.info(
        "%s names no models: using those of %s (%s)", where, DEFAULT_RECIPE, " + ".join(names)
    )
    data = upgrade({**data, **flat}, where)
    if data["device"] is None:  # as published: null lets the program choose
        data["device"] = "auto"
    if data["amp_dtype"] == "float32":
        # There the models are loaded in float32, and mixed precision alone computes in less.
        data["language_model"]["dtype"] = data["feature_cache_dtype"] = "float32"
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigurationError(
            f"{shown(override)} is not KEY=VALUE (for example learning_rate=1e-4)"
        )
    try:
        value = parse_yaml(text)
    except ValueError:
        raise ConfigurationError(f"the value in {shown(override)} is not valid YAML") from None
    section, _, rest = key.partition(".")
    # A pattern of parameter names has dots of its own: trainable.language_model.*=1e-5
    *parents, last = (section, rest) if section == "trainable" and rest else key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigurationError(
                f"{shown(override)}: {parent if parent.isprintable() else shown(parent)} is a value, not a section"
            )
    data[last] = value


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _texts(nested: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, value) for key, value in _flat(nested).items() if isinstance(value, str)]
