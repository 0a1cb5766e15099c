"""Recipes: strict pydantic models in YAML, with dotted KEY=VALUE overrides.

One YAML file is one experiment. Training keys are flat and have the published names; the parts of
the model are nested. Keys of earlier versions and of the published system are translated.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from vlm_bridge.credentials import holds_credential
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import MAX_YAML_CHARACTERS, parse_yaml, shown

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "training-default"

ATTENTION = frozenset({"num_heads", "feed_forward_multiplier", "dropout"})
RESAMPLER = ATTENTION | {"num_queries", "depth", "width", "position_embeddings"}
BRIDGE_KEYS: dict[str, frozenset[str]] = {
    "prefix": RESAMPLER,
    "deep_prefix": RESAMPLER | {"enter_at_layer"},
    "cross_attention": ATTENTION | {"enter_at_layer"},
    "projection": frozenset({"projection", "position_embeddings", "dropout"}),
}

LORA = "language_model.*.lora_*"  # the pattern of adapters' names under `trainable`

# What a resumed run may change: "place" is where things are on this machine, "free" is what a run
# logs and keeps. All other keys decide what is learned.
PLACE = Field(json_schema_extra={"resume": "place"})
FREE = Field(json_schema_extra={"resume": "free"})


_OWN_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_own_code(name: str) -> bool:
    """Return whether a name is `module:Class`, a bridge or encoder in code of the user's own."""
    return _OWN_CODE.fullmatch(name) is not None


def _known_kind(kind: str) -> str:
    if kind not in BRIDGE_KEYS and not is_own_code(kind):
        kinds = ", ".join(map(repr, sorted(BRIDGE_KEYS)))
        raise ValueError(f"should be one of {kinds}, or module:Class of your own")
    return kind


def parse_interval(text: str) -> tuple[float, str]:
    """Return count and unit, without an s, of "1 epoch", "500 steps" or "30 minutes"."""
    count, unit = text.split(" ")
    return float(count), unit.removesuffix("s")


def _to_float(value: object) -> object:
    """YAML 1.1 reads 1e-4 (no dot) as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_to_float)]
Positive = Annotated[Number, Field(gt=0, le=1_000)]
Rate = Annotated[Number, Field(ge=0, le=1_000)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Thousand = Annotated[int, Field(ge=1, le=1_000)]
ThousandOrZero = Annotated[int, Field(ge=0, le=1_000)]
Size = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
EpochsOrSteps = Annotated[str, Field(pattern=r"^[1-9]\d{0,8} (epoch|step)s?$")]
Every = Annotated[str, Field(pattern=r"^([1-9]\d{0,8} (epoch|step)|\d{1,9}(\.\d+)? minute)s?$")]
# Without control characters.
ModelName = Annotated[str, Field(min_length=1, max_length=1_000, pattern=r"^\P{C}*$")]


class Section(BaseModel):
    """Frozen model, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    place: ClassVar[str] = ""  # the key of the section in a recipe

    @classmethod
    def build(cls, data: object, where: str = "") -> Self:
        """Validate the YAML layout. Raises ConfigurationError for the first mistake."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = cls._explain(error)
            raise ConfigurationError(f"{where}: {problem}" if where else problem) from None

    def replace(self, **changes: object) -> Self:
        """Return a validated copy. Raises ConfigurationError as `build` does."""
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return self.build({**given, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the YAML layout."""
        return self.model_dump(mode="json")

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        """Return the first mistake in one line: key, value, and what it should be."""
        first = error.errors(include_url=False)[0]
        value, names = first["input"], [str(name) for name in (cls.place, *first["loc"])]
        names = names if cls.place else names[1:]
        key = ".".join(n if n.isprintable() and len(n) <= 100 else shown(n) for n in names)
        if first["type"] in ("extra_forbidden", "invalid_key"):
            inner = [
                section for section in Section.__subclasses__() if section.place in names[-2:-1]
            ]
            return f"unknown key {key}{suggest(names[-1], (inner or [cls])[0].model_fields)}"
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if isinstance(value, BaseModel | dict) and first["type"] == "value_error":
            return f"{key}.{message}" if key else message  # of several keys of a section
        return f"{key or 'a recipe'}={shown(value)} {message[0].lower()}{message[1:]}"


def suggest(key: str, known: Iterable[str]) -> str:
    """Return the nearest known key, or all of them, as the end of an error message."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        is_inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if is_inner else {f"{prefix}{key}": value}
    return found


class VisionEncoderConfig(Section):
    """Frozen vision encoder: `efficientnet-lite0`, 1 or 2, or a Hugging Face name or folder.

    `module:Class` is an encoder in code of the user's own.
    Features of several names joined by ` + `, and of ``layers``, are concatenated.

    Attributes:
        resize_first: side of a square in pixels, to which EfficientNet-Lite's images are resized
            before: all images are then as sharp as the small ones of a training.
    """

    place = "vision_encoder"
    name: ModelName = "efficientnet-lite0"
    revision: str | None = None
    image_size: Annotated[int, Field(ge=1, le=2_048)] | None = None
    layers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    resample: Literal["bilinear", "bicubic"] | None = None  # null: the image processor's own
    resize_first: Annotated[int, Field(ge=1, le=2_048)] | None = None

    @model_validator(mode="after")
    def _check_several(self) -> Self:
        given = self.model_fields_set - {"name", "resize_first"}
        if len(self.names) > 1 and (keys := [k for k in given if getattr(self, k) is not None]):
            raise ValueError(f"{keys[0]} is for one encoder: leave it out beside {self.name!r}")
        return self

    @property
    def names(self) -> list[str]:
        return self.name.split(" + ")

    @property
    def parts(self) -> list[VisionEncoderConfig]:
        return [self.replace(name=name) for name in self.names]


class LoraOptions(Section):
    """LoRA adapters (Hu et al. 2022) beside linear layers of the language model, through peft.

    They are trained, and saved with the bridge.

    Attributes:
        target_modules: ends of the names of layers, or `all-linear`; null: what peft has for the
            family, mostly the queries and values of attention.
    """

    place = "lora"
    r: Size = 8  # rank
    alpha: Size = 16  # what the adapters add is multiplied by alpha / r
    dropout: Share = 0.0  # of what they read
    target_modules: Annotated[
        tuple[ModelName, ...] | None,
        Field(strict=False, min_length=1),
        BeforeValidator(lambda names: [names] if isinstance(names, str) else names),
    ] = None


class LanguageModelConfig(Section):
    """Language model: `smollm2-135m-instruct`, a GGUF file, or a Hugging Face name or folder.

    A BLIP captioning model contributes its text decoder. Stored in ``dtype``, of which `int8`
    (Dettmers et al. 2022) and `nf4` (QLoRA, 2023) quantize linear layers on NVIDIA GPUs.
    """

    place = "language_model"
    name: ModelName = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    # auto: eager for soft-capped scores (Gemma 2) and on CPUs, where it is faster, else sdpa.
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    prompt: Annotated[str, Field(max_length=10_000)] = ""  # before every caption, not supervised
    add_cross_attention: bool = False  # to GPT-2 or BERT, to be trained
    lora: LoraOptions | None = None

    @property
    def quantization(self) -> str | None:
        return self.dtype if self.dtype in ("int8", "nf4") else None


class BridgeOptions(Section):
    """Options of a bridge. Each kind has some of them, see `BRIDGE_KEYS`.

    Attributes:
        kind: `module:Class`: a bridge in code of the user's own, which may have all options;
            `prefix`: soft tokens before the text; `deep_prefix`: keys and values for the layers
            from ``enter_at_layer`` on; `cross_attention`: the text attends to the image before
            that layer; `projection`: encoder states for a decoder that cross-attends.
        enter_at_layer: None means a third of the way up; 0, the default of `cross_attention`,
            edits embeddings.
    """

    place = "bridge"
    kind: Annotated[str, AfterValidator(_known_kind)] = "prefix"
    standardize_features: bool = True  # by mean and deviation of channels of training images
    num_queries: Size = 16  # vectors per image
    depth: Thousand = 2
    width: Size | None = None  # null: the language model's
    num_heads: Size = 8
    feed_forward_multiplier: Thousand = 4
    position_embeddings: bool = False  # of image tokens, for convolutional encoders
    dropout: Share = 0.0  # on residual branches and on image tokens
    enter_at_layer: CountOrZero | None = None
    projection: Literal["linear", "mlp", "conv3x3"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _at_the_embeddings(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "cross_attention":
            return {"enter_at_layer": 0, **data}
        return data

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        keys = BRIDGE_KEYS.get(self.kind, self.model_fields_set)
        for key in self.model_fields_set - {"kind", "standardize_features"} - keys:
            raise ValueError(f"{key} is no option of kind={self.kind}{suggest(key, keys)}")
        return self

    @model_serializer(mode="wrap")
    def _of_kind(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        keys = {"kind", "standardize_features"} | BRIDGE_KEYS.get(self.kind, dump(self).keys())
        return {key: value for key, value in dump(self).items() if key in keys}


class DecodeSettings(Section):
    """Settings of generation; names are those of `transformers`' GenerationConfig.

    The object that EfficientNet-Lite's classifiers see with a probability of ``object_threshold``
    (0: off) is named in the image's prompt, as ``prompt_words`` are in training; but not
    ``known_objects``, frequent in training captions. Of images unlike those of training
    (``confidence.unlike_below``), ``unlike_object_threshold`` is enough.
    """

    place = "decode"
    num_beams: Thousand = 3
    max_new_tokens: Thousand = 40
    min_new_tokens: ThousandOrZero = 0
    length_penalty: Annotated[Number, Field(ge=-1_000, le=1_000)] = 1.0
    repetition_penalty: Positive = 1.0
    no_repeat_ngram_size: ThousandOrZero = 0
    do_sample: bool = False
    temperature: Positive = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    object_threshold: Annotated[Number, Field(ge=0, le=1)] = 0.0
    unlike_object_threshold: Annotated[Number, Field(ge=0, le=1)] = 1.0
    known_objects: Annotated[tuple[str, ...], Field(strict=False)] = ()


class ConfidenceOptions(Section):
    """How the confidence that a caption names the right subject is computed.

    Attributes:
        remembered_images: training images whose mean features are kept; what counts is an image's
            similarity to the nearest.
        unlike_below: images of less similarity are unlike the training images.
        weights: log-odds: a constant, per nat of the caption's score, per unit of similarity;
            `benchmarks.confidence` fits them to labeled captions.
        unsure_below: captions of less confidence are marked as unsure.
    """

    place = "confidence"
    remembered_images: Size = 256
    unlike_below: Share = 0.0
    weights: Annotated[tuple[Number, Number, Number], Field(strict=False)] = (0.0, 0.0, 0.0)
    unsure_below: Share = 0.0


class Recipe(Section):
    """One experiment."""

    vision_encoder: VisionEncoderConfig = VisionEncoderConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    bridge: BridgeOptions = BridgeOptions()
    decode: DecodeSettings = DecodeSettings()
    confidence: ConfidenceOptions | None = None

    # Data
    data_dir: Annotated[str, PLACE] = "data/flickr8k"
    captions_per_image: Count = 1  # in one row
    max_caption_tokens: Count = 128
    # Words that captions of a training image share, in its prompt: at most so many. Captioning puts
    # those of `decode.object_threshold` there.
    prompt_words: Annotated[int, Field(ge=0, le=10)] = 0
    # Other weights of the bridge for images whose prompt names an object, kept as a difference:
    # `vlm-bridge average --named-apart-from` makes them.
    prompt_delta: bool = False
    num_workers: Annotated[CountOrZero, PLACE] = 2
    # Share of a split's captions, and of its images, that may be unreadable; they are skipped.
    max_bad_samples: Annotated[Number, Field(ge=0, le=1)] = 0.01
    # auto: in data_dir/.features if that is measured to be quicker than encoding; a folder; off
    # (which YAML 1.1 reads as false).
    feature_cache: Annotated[str, PLACE, BeforeValidator(lambda value: value or "off")] = "auto"
    feature_cache_dtype: Literal["float16", "bfloat16", "int8", "float32"] = "float16"
    feature_cache_views: CountOrZero = 0  # random crops per training image; 0: the whole image

    # Objective and start
    # Patterns of parameter names, and the learning rate of each; null: learning_rate.
    trainable: dict[str, Rate | None] = Field(default={"bridge.*": None}, min_length=1)
    # scst: self-critical training on CIDEr-D (Rennie et al. 2017), from `start_from`.
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    scst_samples: Annotated[int, Field(ge=2, le=1_000)] = 5  # per image; batch_size counts them
    scst_temperature: Positive = 1.0
    start_from: Annotated[str | None, PLACE] = None  # a checkpoint of the same architecture

    # Optimization
    learning_rate: Rate = 1e-5
    min_lr: Rate = 1e-6
    num_epochs: Count = 12
    max_steps: Count | None = None
    batch_size: Count = 8  # captions
    tokens_per_batch: Count | None = None  # instead: rows of like length up to so many positions
    gradient_accumulation_steps: Count = 1
    gradient_clip_val: Annotated[Number, Field(gt=0, le=1e6)] = 0.3
    weight_decay: Rate = 0.01
    label_smoothing: Share = 0.0  # Szegedy et al. 2016
    weight_averaging: Annotated[Number, Field(gt=0, lt=1)] | None = None  # decay, such as 0.999
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: CountOrZero = 0  # at most a tenth of all steps
    seed: Seed = 0

    # Precision and devices
    amp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # float32: none
    gradient_checkpointing: bool = False
    compile: bool = False
    device: Annotated[str, PLACE] = "auto"

    # Validation, early stopping, checkpoints, logs
    validate_every: EpochsOrSteps = "1 epoch"  # and the last step
    monitor: Literal["loss", "bleu4", "cider"] = "loss"  # decides the best checkpoint
    num_decoded_images: CountOrZero | None = None  # in validation; null: 200, and 0 for loss
    early_stopping_patience: Count | None = 3  # validations without a new best; null: no stop
    # The latest checkpoint; "500 steps" keeps the newest three of single steps.
    save_every: Annotated[Every, FREE] = "1 epoch"
    log_every_n_steps: Annotated[Count, FREE] = 10
    num_validation_samples: Annotated[CountOrZero, FREE] = 4
    max_validation_images: Count | None = None
    checkpoint_dir: Annotated[str, PLACE] = "checkpoints"
    log_dir: Annotated[str, PLACE] = "logs"
    resume_from_checkpoint: Annotated[str | None, PLACE] = None  # or a folder, or auto

    @model_validator(mode="after")
    def _check(self) -> Self:
        texts = {key: text for key, text in flat(self.to_dict()).items() if isinstance(text, str)}
        if secret := next((key for key, text in texts.items() if holds_credential(text)), None):
            raise ValueError(
                f"{secret} holds a token or a password, and a checkpoint shows its recipe: give "
                "the plain name or address, and the hub's token in HF_TOKEN"
            )
        if self.learning_rate == 0 and any(self.trainable.values()):
            raise ValueError("learning_rate must be above 0, as rates of trainable are")
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

    @classmethod
    def load(cls, recipe: Recipe | str | Path, **changes: Any) -> Recipe:
        """Read a recipe file, or one that ships by its name: `Recipe.load("lite-flickr8k")`.

        Args:
            changes: keys of the recipe: ``max_steps=100, bridge={"num_queries": 8}``.

        Raises:
            ConfigurationError: no such recipe, or the first mistake.
        """
        if isinstance(recipe, Recipe):
            return override_recipe(recipe, changes) if changes else recipe
        return load_recipe(recipe, changes)

    @property
    def autocast_dtype(self) -> str | None:
        return None if self.amp_dtype == "float32" else self.amp_dtype

    @property
    def own_code(self) -> list[str]:
        """Names of classes in code of the user's own."""
        return [
            name for name in (*self.vision_encoder.names, self.bridge.kind) if is_own_code(name)
        ]

    @property
    def trained(self) -> dict[str, float | None]:
        """Patterns of trained parameters: `trainable`, and LORA where no pattern has adapters."""
        name = "language_model.causal_lm.layer.lora_A.default.weight"
        named = any(fnmatchcase(name, pattern) for pattern in self.trainable)
        has_more = self.language_model.lora is not None and not named
        return {**self.trainable, LORA: None} if has_more else self.trainable

    @property
    def decoded_images(self) -> int:
        """Number of images that each validation decodes and scores."""
        default = 0 if self.monitor == "loss" else 200
        return default if self.num_decoded_images is None else self.num_decoded_images

    @classmethod
    def keys_marked(cls, *marks: str) -> frozenset[str]:
        """Return keys that a resumed run may change: those marked `place`, `free` or both."""
        extras = ((key, field.json_schema_extra) for key, field in cls.model_fields.items())
        return frozenset(
            key for key, extra in extras if isinstance(extra, dict) and extra["resume"] in marks
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
            if (key in now) != (key in then) or not same_setting(key, then[key], now[key])
        ]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def same_setting(key: str, has: Any, wanted: Any) -> bool:
    """Compare two values of a key: models by the last part of their names, None is any revision."""
    if key.endswith(".name") and has and wanted:
        has, wanted = ([Path(n).name for n in names.split(" + ")] for names in (has, wanted))
    return has == wanted or (key.endswith(".revision") and None in (has, wanted))


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
REMOVED_FROM_DECODE = ("object_bonus",)  # `object_threshold` took its place
OUTPUT_DIR = "output_dir"  # folder of a run, short for `run_folders`
MODEL_SECTIONS = frozenset({"vision_encoder", "language_model", "bridge", "decode"})


def load_recipe(
    path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """Read a recipe and apply ``dotted.key=value`` overrides, whose values are YAML, or a mapping.

    The recipe is a file, or the name of one that ships. A file without any model section is in the
    flat layout of the published system: its keys change the recipe `training-default`. Raises
    ConfigurationError for the first mistake.
    """
    where = str(path) if path is not None else "the command line"
    data = _read_yaml(find_recipe(path)) if path is not None else {}
    if data and not MODEL_SECTIONS & data.keys():
        data = _from_published_layout(data, where)
    _apply_overrides(data, overrides)
    return Recipe.build(_upgrade(data, where), where)


def override_recipe(recipe: Recipe, overrides: Sequence[str] | Mapping[str, Any]) -> Recipe:
    """Apply ``dotted.key=value`` overrides. Raises ConfigurationError as `load_recipe` does."""
    data = recipe.to_dict()
    _apply_overrides(data, overrides)
    return recipe_from_dict(data, where="the command line")


def recipe_from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from the YAML layout. Raises ConfigurationError as `load_recipe` does."""
    return Recipe.build(_upgrade(data) if isinstance(data, Mapping) else data, where)


def published_recipe(settings: Any, where: str) -> Recipe:
    """Put settings of a checkpoint of the published system over the recipe `training-default`."""
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{where}: its config must be a mapping, not {shown(settings)}")
    return recipe_from_dict(_from_published_layout(settings, where), where)


def nearest_key(option: str) -> str | None:
    """Return the recipe key that an option such as ``--data-dir`` resembles, or None."""
    sections = {section.place: section for section in Section.__subclasses__() if section.place}
    keys = [*Recipe.model_fields.keys() - sections, OUTPUT_DIR]
    keys += [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)} | {key: key for key in keys}
    wanted = option.lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(wanted, by_name, n=1)
    return by_name[close[0]] if close else None


def shipped_recipes() -> dict[str, Path]:
    """Return recipes that ship, by name: in the package, or in ``config/`` of a checkout."""
    package = Path(__file__).parent
    folders = (package.parents[1] / "config", package / "config")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """Return the path of a recipe that ships. Raises ConfigurationError for an unknown name."""
    known = shipped_recipes()
    if name not in known:
        raise ConfigurationError(f"no recipe named {name!r} ships with vlm-bridge")
    return known[name]


def run_folders(output_dir: object) -> dict[str, str]:
    """Return the keys of a recipe that place a run in one folder."""
    if not isinstance(output_dir, str):
        raise ConfigurationError(f"{OUTPUT_DIR}={shown(output_dir)} should be a folder")
    return {"checkpoint_dir": f"{output_dir}/checkpoints", "log_dir": f"{output_dir}/logs"}


def find_recipe(given: str | Path) -> Path:
    """Return the path of a recipe file, or of the shipped recipe of that name.

    Raises ConfigurationError, naming the nearest recipe, where there is neither.
    """
    path, shipped = Path(given), shipped_recipes()
    name = path.name.removesuffix(".yaml")
    if not path.is_file() and path.name == str(given) and name in shipped:
        return shipped[name]
    if path.exists():
        return path
    files = {file.stem: str(file) for file in path.parent.glob("*.y*ml")}
    known = {name: _from_here(file) for name, file in shipped.items()} | files
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else f"shipped: {', '.join(shipped)}"
    raise ConfigurationError(f"no recipe at {path}; {hint}")


def _from_here(file: Path) -> str:
    """Return a shipped recipe's path below the current folder, or else its name."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else file.stem


def _read_yaml(path: Path) -> dict[str, Any]:
    logger.debug("reading recipe %s", path)
    try:
        with path.open(encoding="utf-8") as file:
            data = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1)) or {}
    except (OSError, ValueError) as error:  # not UTF-8, too
        raise ConfigurationError(f"cannot read the recipe {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must hold keys and values, not a {type(data).__name__}")
    run = run_folders(data.pop(OUTPUT_DIR)) if OUTPUT_DIR in data else {}
    return run | data


def _from_published_layout(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Put the values of a flat file over the default recipe."""
    data = _upgrade({**_read_yaml(shipped_recipe(DEFAULT_RECIPE)), **flat}, where)
    logger.info("%s names no models: its keys change the recipe %s", where, DEFAULT_RECIPE)
    data["device"] = data["device"] or "auto"  # as published: null lets the program choose
    if data["amp_dtype"] == "float32":
        # There the models are loaded in float32, and mixed precision alone computes in less.
        data["language_model"]["dtype"] = data["feature_cache_dtype"] = "float32"
    return data


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> None:
    is_parsed = isinstance(overrides, Mapping)
    changes = flat(overrides).items() if is_parsed else map(_parse_override, overrides)
    # First the folder of a run, so that single folders given beside it win.
    for key, value in sorted(changes, key=lambda change: change[0] != OUTPUT_DIR):
        value = str(value) if isinstance(value, Path) else value
        for folder, path in (run_folders(value) if key == OUTPUT_DIR else {key: value}).items():
            _put(data, folder, path)


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"{shown(override)} is not KEY=VALUE, as learning_rate=1e-4 is")
    try:
        return key, parse_yaml(text)
    except ValueError:
        raise ConfigurationError(f"the value in {shown(override)} is not valid YAML") from None


def _put(data: dict[str, Any], key: str, value: object) -> None:
    """Set the value of a dotted key."""
    # A pattern of parameter names has dots of its own: trainable.language_model.*=1e-5
    *parents, last = key.split(".", 1 if key.startswith("trainable.") else -1)
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigurationError(f"{shown(key)}: {parent} is a value, not a section")
    data[last] = value


def _upgrade(data: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Translate the keys of a recipe; log those that are ignored, unless ``where`` is None."""
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    if new.get("decode_every_n_steps", 1) is None and new.get("monitor") == "loss":
        new.pop("num_decoded_images", None)  # it had an effect with the other monitors only
    for key, translate in TRANSLATED.items():
        if key in new:
            for target, value in translate(new.pop(key)).items():
                _put(new, target, value)
    ignored = [key for key, todays in REMOVED.items() if new.pop(key, todays) != todays]
    if isinstance(decode := new.get("decode"), dict):
        ignored += [key for key in REMOVED_FROM_DECODE if decode.pop(key, None)]
    if ignored and where:
        logger.info("%s: ignored, as no longer supported: %s", where, ", ".join(ignored))
    return new
