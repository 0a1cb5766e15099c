"""Recipes: strict pydantic models <-> YAML, with dotted KEY=VALUE overrides.

One YAML file is one experiment. Training keys are flat and have the published names; the parts of
the model are nested. Defaults are those of the published training where it has a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, model_serializer, model_validator

from vlm_bridge.configuration import fields
from vlm_bridge.configuration.fields import flat as flat
from vlm_bridge.configuration.fields import parse_interval as parse_interval
from vlm_bridge.configuration.upgrade import upgrade
from vlm_bridge.credentials import holds_credential
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import MAX_YAML_CHARACTERS, parse_yaml, shown

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "training-default"
MODEL_SECTIONS = frozenset({"vision_encoder", "language_model", "bridge", "decode"})
ATTENTION = frozenset({"num_heads", "feed_forward_multiplier", "dropout"})
RESAMPLER = ATTENTION | {"num_queries", "depth", "width", "position_embeddings"}
BRIDGE_KEYS: dict[str, frozenset[str]] = {
    "prefix": RESAMPLER,
    "deep_prefix": RESAMPLER | {"enter_at_layer"},
    "cross_attention": ATTENTION | {"enter_at_layer"},
    "projection": frozenset({"projection", "position_embeddings", "dropout"}),
}

# What a resumed run may change: "place" is where things are on this machine, "free" is what a run
# logs and keeps. All other keys decide what is learned.
PLACE = Field(json_schema_extra={"resume": "place"})
FREE = Field(json_schema_extra={"resume": "free"})


class VisionEncoderConfig(fields.Section):
    """Frozen vision encoder: `efficientnet-lite0`, 1 or 2, or a Hugging Face name or folder.

    Several names joined by ` + ` concatenate their features on the grid of the first encoder.
    ``layers`` are concatenated, too; None is the last one.
    """

    place = "vision_encoder"
    name: fields.ModelName = "efficientnet-lite0"
    revision: str | None = None
    image_size: Annotated[int, Field(ge=1, le=2_048)] | None = None
    layers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    resample: Literal["bilinear", "bicubic"] | None = None  # null: the image processor's own

    @model_validator(mode="after")
    def _check_several(self) -> Self:
        given = self.model_fields_set - {"name"}
        if len(self.names) > 1 and (keys := [k for k in given if getattr(self, k) is not None]):
            raise ValueError(f"{keys[0]} is for one encoder: leave it out beside {self.name!r}")
        return self

    @property
    def names(self) -> list[str]:
        return self.name.split(" + ")

    @property
    def parts(self) -> list[VisionEncoderConfig]:
        """Configuration of each encoder."""
        return [self.replace(name=name) for name in self.names]


class LanguageModelConfig(fields.Section):
    """Language model: `smollm2-135m-instruct`, a GGUF file, or a Hugging Face name or folder.

    A BLIP captioning model contributes its text decoder. Stored in ``dtype``, of which `int8`
    (Dettmers et al. 2022) and `nf4` (QLoRA, 2023) quantize linear layers on NVIDIA GPUs.
    """

    place = "language_model"
    name: fields.ModelName = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    # auto: eager for soft-capped scores (Gemma 2) and on CPUs, where it is faster, else sdpa.
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    prompt: Annotated[str, Field(max_length=10_000)] = ""  # before every caption, not supervised
    add_cross_attention: bool = False  # to GPT-2 or BERT, to be trained

    @property
    def quantization(self) -> str | None:
        """`int8`, `nf4` or None."""
        return self.dtype if self.dtype in ("int8", "nf4") else None


class BridgeOptions(fields.Section):
    """Options of a bridge. Each kind has some of them, see `BRIDGE_KEYS`.

    Attributes:
        kind: `prefix`: soft tokens before the text; `deep_prefix`: keys and values for the layers
            from ``enter_at_layer`` on; `cross_attention`: the text attends to the image before
            that layer; `projection`: encoder states for a decoder that cross-attends.
        enter_at_layer: no gradient flows below it; None means a third of the way up, and 0, the
            published default of `cross_attention`, edits embeddings.
        projection: `linear` (published for PVTv2-B0), `mlp` (two layers with GELU), or `conv3x3`
            (published, 3.5 M parameters) over the grid of image tokens.
    """

    place = "bridge"
    kind: Literal["prefix", "deep_prefix", "cross_attention", "projection"] = "prefix"
    standardize_features: bool = True  # by mean and deviation of channels of training images
    num_queries: fields.Size = 16  # vectors per image
    depth: fields.Small = 2
    width: fields.Size | None = None  # null: the language model's
    num_heads: fields.Size = 8
    feed_forward_multiplier: fields.Small = 4
    position_embeddings: bool = False  # of image tokens, for convolutional encoders
    dropout: fields.Share = 0.0  # on residual branches and on image tokens
    enter_at_layer: fields.CountOrZero | None = None
    projection: Literal["linear", "mlp", "conv3x3"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _at_the_embeddings(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "cross_attention":
            return {"enter_at_layer": 0, **data}
        return data

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        keys = BRIDGE_KEYS[self.kind]
        for key in self.model_fields_set - {"kind", "standardize_features"} - keys:
            raise ValueError(f"{key} is no option of kind={self.kind}{fields.suggest(key, keys)}")
        return self

    @model_serializer(mode="wrap")
    def _of_kind(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        keys = {"kind", "standardize_features"} | BRIDGE_KEYS[self.kind]
        return {key: value for key, value in dump(self).items() if key in keys}


class DecodeSettings(fields.Section):
    """Settings of generation; names are those of `transformers`' GenerationConfig.

    Attributes:
        object_bonus: nats for the first name of what the encoder's ImageNet classifier recognizes
            (EfficientNet-Lite); with 8 almost every caption has it, 0 is off.
        known_objects: names without bonus, because training captions have them often.
    """

    place = "decode"
    num_beams: fields.Thousand = 3
    max_new_tokens: fields.Thousand = 40
    min_new_tokens: fields.ThousandOrZero = 0
    length_penalty: Annotated[fields.Number, Field(ge=-1_000, le=1_000)] = 1.0
    repetition_penalty: fields.Positive = 1.0
    no_repeat_ngram_size: fields.ThousandOrZero = 0
    do_sample: bool = False
    temperature: fields.Positive = 1.0
    top_p: Annotated[fields.Number, Field(gt=0, le=1)] = 1.0
    seed: fields.Seed = 0
    object_bonus: fields.Rate = 0.0
    known_objects: Annotated[tuple[str, ...], Field(strict=False)] = ()


class Recipe(fields.Section):
    """One experiment."""

    vision_encoder: VisionEncoderConfig = VisionEncoderConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    bridge: BridgeOptions = BridgeOptions()
    decode: DecodeSettings = DecodeSettings()

    # Data
    data_dir: Annotated[str, PLACE] = "data/flickr8k"
    captions_per_image: fields.Count = 1  # in one row
    max_caption_tokens: fields.Count = 128
    num_workers: Annotated[fields.CountOrZero, PLACE] = 2
    # Share of a split's captions, and of its images, that may be unreadable; they are skipped.
    max_bad_samples: Annotated[fields.Number, Field(ge=0, le=1)] = 0.01
    # auto: in data_dir/.features if that is measured to be quicker than encoding; a folder; off
    # (which YAML 1.1 reads as false).
    feature_cache: Annotated[str, PLACE, BeforeValidator(lambda value: value or "off")] = "auto"
    feature_cache_dtype: Literal["float16", "bfloat16", "int8", "float32"] = "float16"
    feature_cache_views: fields.CountOrZero = (
        0  # random crops per training image; 0: the whole image
    )

    # Objective and start
    # Patterns of parameter names, and the learning rate of each; null: learning_rate.
    trainable: dict[str, fields.Rate | None] = Field(default={"bridge.*": None}, min_length=1)
    # scst: self-critical training on CIDEr-D (Rennie et al. 2017), from `start_from`.
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    scst_samples: Annotated[int, Field(ge=2, le=1_000)] = 5  # per image; batch_size counts them
    scst_temperature: fields.Positive = 1.0
    start_from: Annotated[str | None, PLACE] = None  # a checkpoint of the same architecture
    # A vision encoder, for BLIP its own, to whose features a projection is fitted before step 1.
    distillation: fields.ModelName | None = None

    # Optimization
    learning_rate: fields.Rate = 1e-5
    min_lr: fields.Rate = 1e-6
    num_epochs: fields.Count = 12
    max_steps: fields.Count | None = None
    batch_size: fields.Count = 8  # captions
    tokens_per_batch: fields.Count | None = (
        None  # instead: rows of like length up to so many positions
    )
    gradient_accumulation_steps: fields.Count = 1
    gradient_clip_val: Annotated[fields.Number, Field(gt=0, le=1e6)] = 0.3
    weight_decay: fields.Rate = 0.01
    label_smoothing: fields.Share = 0.0  # Szegedy et al. 2016
    weight_averaging: Annotated[fields.Number, Field(gt=0, lt=1)] | None = (
        None  # decay, such as 0.999
    )
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: fields.CountOrZero = 0  # at most a tenth of all steps
    seed: fields.Seed = 0

    # Precision and devices
    amp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # float32: none
    gradient_checkpointing: bool = False
    compile: bool = False
    device: Annotated[str, PLACE] = "auto"

    # Validation, early stopping, checkpoints, logs
    validate_every: fields.EpochsOrSteps = "1 epoch"  # and the last step
    monitor: Literal["loss", "bleu4", "cider"] = "loss"  # decides the best checkpoint
    num_decoded_images: fields.CountOrZero | None = None  # in validation; null: 200, and 0 for loss
    early_stopping_patience: fields.Count | None = (
        3  # validations without a new best; null: no stop
    )
    # The latest checkpoint; "500 steps" keeps the newest three of single steps.
    save_every: Annotated[fields.Every, FREE] = "1 epoch"
    log_every_n_steps: Annotated[fields.Count, FREE] = 10
    num_validation_samples: Annotated[fields.CountOrZero, FREE] = 4
    max_validation_images: fields.Count | None = None
    checkpoint_dir: Annotated[str, PLACE] = "checkpoints"
    log_dir: Annotated[str, PLACE] = "logs"
    resume_from_checkpoint: Annotated[str | None, PLACE] = None  # or a folder, or auto

    @model_validator(mode="after")
    def _check(self) -> Self:
        texts = {key: text for key, text in flat(self.to_dict()).items() if isinstance(text, str)}
        if secret := next((key for key, text in texts.items() if holds_credential(text)), None):
            raise ValueError(
                f"{secret} holds a token or a password, and a recipe goes into checkpoints and "
                "reports: give the plain name or address, and the hub's token in HF_TOKEN"
            )
        if self.learning_rate == 0 and any(self.trainable.values()):
            raise ValueError("learning_rate must be above 0, as rates of trainable are")
        if self.distillation is not None and self.feature_cache_views:
            raise ValueError("distillation needs whole images: feature_cache_views=0")
        if self.monitor != "loss" and self.num_decoded_images == 0:
            raise ValueError(f"num_decoded_images must be above 0 with monitor={self.monitor}")
        scst = self.objective == "scst"
        if scst and (self.tokens_per_batch or self.label_smoothing):
            raise ValueError("objective=scst goes without tokens_per_batch and label_smoothing")
        divisor = "scst_samples" if scst else "captions_per_image"
        if self.tokens_per_batch is None and self.batch_size % getattr(self, divisor):
            raise ValueError(
                f"batch_size counts captions: {self.batch_size} is not a multiple of "
                f"{divisor}={getattr(self, divisor)}"
            )
        return self

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype of mixed precision; None without it."""
        return None if self.amp_dtype == "float32" else self.amp_dtype

    @property
    def decoded_images(self) -> int:
        """Number of images that each validation decodes and scores."""
        default = 0 if self.monitor == "loss" else 200
        return default if self.num_decoded_images is None else self.num_decoded_images

    @classmethod
    def keys_marked(cls, *marks: str) -> frozenset[str]:
        """Return keys that a resumed run may change: those marked `place`, `free` or both."""
        extras = {key: field.json_schema_extra for key, field in cls.model_fields.items()}
        return frozenset(
            key
            for key, extra in extras.items()
            if isinstance(extra, dict) and extra["resume"] in marks
        )

    def changes_since(self, before: Recipe) -> list[str]:
        """Return "key=now, was before" for each key that decides what is learned and differs."""
        free = self.keys_marked("place", "free")
        now, then = (
            flat({key: value for key, value in recipe.to_dict().items() if key not in free})
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

    Models are compared by the last part of their names: google/gemma-2-2b and models/gemma-2-2b are
    one model that was moved. A revision of None matches any other.
    """
    if key.endswith(".name") and has and wanted:
        has, wanted = ([Path(n).name for n in names.split(" + ")] for names in (has, wanted))
    return has == wanted or (key.endswith(".revision") and None in (has, wanted))


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
