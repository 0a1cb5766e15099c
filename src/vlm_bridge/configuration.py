"""Recipes: strict dataclasses <-> YAML, with dotted KEY=VALUE overrides. One YAML file is one experiment.

Training keys are flat and carry the published names; the three models are nested. An unknown key or a value of
the wrong type is an error that names the key, the place and the nearest known key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm_bridge.credentials import holds_credential
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.limits import (
    check_above_zero,
    check_at_least,
    check_at_most,
    check_name,
    check_seed,
)
from vlm_bridge.parsing import MAX_YAML_CHARACTERS, parse_yaml, shown

DEFAULT_RECIPE = "training-default"
"""The recipe of a training that names none: the published DINOv2 + Gemma-2 system."""
MODEL_SECTIONS = frozenset({"vision_encoder", "language_model", "bridge", "decode"})
PUBLISHED_NAMES = {
    "vision_model_name": "vision_encoder.name",
    "language_model_name": "language_model.name",
    "bridge_num_heads": "bridge.num_heads",
    "bridge_dropout": "bridge.dropout",
    "max_length": "max_caption_tokens",
}
"""Names of the published system's flat layout that are other names here; its training keys are the same."""
MAX_KEY_CHARACTERS = 100
"""A longer key is cut in messages, and one with control characters is quoted."""
PUBLISHED_BUT_IDLE = frozenset({"early_stopping_min_delta", "pin_memory"})
"""Its names that are accepted and change nothing. There, any new best resets the count of early stopping, whatever the
first says; what goes to a GPU is always pinned here."""


MAX_ENCODERS = 8
MAX_IMAGE_SIZE = 2_048
"""Pixels a side; encoders in use have 224 to 1,024."""
MAX_PROMPT_CHARACTERS = 10_000
MAX_BEAMS = 1_000
MAX_NEW_TOKENS = 1_000
MAX_RETURN_SEQUENCES = 1_000
MAX_COUNT = 2**31 - 1
"""Of steps, images, tokens and the like."""
MAX_RATE = 1_000.0
"""Of learning rates, weight decay, temperatures and the like."""
MAX_CLIP = 1e6
"""Of the gradient norm: so much clips nothing."""


@dataclass(frozen=True)
class VisionEncoderConfig:
    """The frozen vision encoder: `efficientnet-lite0`, 1 or 2, or a Hugging Face name (revision pins it) or folder.

    Attributes:
        name: of several encoders, joined by ` + `, the features are concatenated, on the grid of the first. Each has
            its own size and last layer then.
        layers: which layers' features to concatenate; None means the last one's (see the encoder's class).
        resample: how images are resized; None is the image processor's own way.
    """

    name: str = "efficientnet-lite0"
    revision: str | None = None
    image_size: int | None = None
    layers: tuple[int, ...] | None = None
    resample: Literal["bilinear", "bicubic"] | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "vision_encoder.name")
        check_at_least(1, self, "image_size", prefix="vision_encoder.")
        check_at_most(MAX_IMAGE_SIZE, self, "image_size", prefix="vision_encoder.")
        if len(self.names) > MAX_ENCODERS:
            raise ConfigurationError(
                f"vision_encoder.name joins {len(self.names)} encoders; at most {MAX_ENCODERS} go together"
            )
        if self.layers is not None and not self.layers:
            raise ConfigurationError(
                "vision_encoder.layers must name at least one layer; leave it out for the last"
            )
        if len(self.names) > 1:
            for key in ("revision", "image_size", "layers", "resample"):
                if getattr(self, key) is not None:
                    raise ConfigurationError(
                        f"vision_encoder.{key} is for one encoder: leave it out beside {self.name!r}"
                    )

    @property
    def names(self) -> list[str]:
        return self.name.split(" + ")

    @property
    def parts(self) -> list[VisionEncoderConfig]:
        """Each encoder's own configuration."""
        names = self.names
        return [self] if len(names) == 1 else [VisionEncoderConfig(name) for name in names]


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model: `smollm2-135m-instruct`, a GGUF file, or a Hugging Face name or folder.

    A BLIP captioning model gives its text decoder. It is frozen, but for what a recipe's `trainable` names.

    Attributes:
        add_cross_attention: give a GPT-2 or BERT that has none layers of cross-attention, which must be trained.
        dtype: how the frozen weights are stored; `auto` keeps the checkpoint's own type.
        attention: transformers' attention implementation. `auto` takes `eager` where scores are soft-capped (Gemma 2)
            and on CPUs, where it measured 1.3x faster than `sdpa` on short masked rows in bfloat16; else `sdpa`.
        prompt: text put before every caption, in training and captioning alike; never supervised.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    prompt: str = ""
    add_cross_attention: bool = False

    def __post_init__(self) -> None:
        check_name(self.name, "language_model.name")
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise ConfigurationError(
                f"language_model.prompt has {len(self.prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read"
            )


@dataclass(frozen=True)
class BridgeConfig:
    """The trained bridge: its kind, the kind's own options (in YAML beside `kind`), and feature standardisation.

    Attributes:
        standardize_features: subtract the mean and divide by the standard deviation of every feature channel,
            both measured on training images before the first step and kept in the checkpoint.
    """

    kind: str = "prefix"
    standardize_features: bool = True
    options: Any = None


@dataclass(frozen=True)
class DecodeSettings:
    """How captions are generated; the names are those of `transformers`' GenerationConfig, but for one.

    Attributes:
        object_bonus: nats that a caption gains when it first names what the encoder's ImageNet classifier recognises
            (`object_names`): 8 makes almost every caption do so. For EfficientNet-Lite; 0 is off.
        known_objects: what training captions name often enough; the bonus leaves it alone, for the bridge knows better
            (`python -m benchmarks.known_objects` lists them).
    """

    num_beams: int = 3
    max_new_tokens: int = 40
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    object_bonus: float = 0.0
    known_objects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "known_objects", tuple(self.known_objects))  # files have lists
        check_at_least(1, self, "num_beams", "max_new_tokens", prefix="decode.")
        check_at_most(MAX_BEAMS, self, "num_beams", prefix="decode.")
        check_at_most(
            MAX_NEW_TOKENS,
            self,
            "max_new_tokens",
            "min_new_tokens",
            "no_repeat_ngram_size",
            prefix="decode.",
        )
        check_at_least(
            0, self, "min_new_tokens", "no_repeat_ngram_size", "object_bonus", prefix="decode."
        )
        check_at_least(-MAX_RATE, self, "length_penalty", prefix="decode.")
        check_at_most(
            MAX_RATE,
            self,
            "length_penalty",
            "repetition_penalty",
            "temperature",
            "object_bonus",
            prefix="decode.",
        )
        check_seed(self, prefix="decode.")
        check_above_zero(self, "temperature", "top_p", "repetition_penalty", prefix="decode.")
        if self.top_p > 1:
            raise ConfigurationError(f"decode.top_p is a probability: at most 1, not {self.top_p}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict in the YAML layout."""
        return _without_tuples(dataclasses.asdict(self))


@dataclass(frozen=True)
class DistillationConfig:
    """A stage before the caption loss: fit the projection so that its image tokens match a teacher's features.

    Attributes:
        teacher: a vision encoder as wide as the projection's output; for BLIP's decoder, BLIP's own.
        steps: optimiser steps of ``batch_size`` images.
    """

    teacher: str
    revision: str | None = None
    image_size: int | None = None
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "batch_size", "image_size", prefix="distillation.")
        check_at_most(MAX_COUNT, self, "steps", "batch_size", prefix="distillation.")
        check_at_most(MAX_IMAGE_SIZE, self, "image_size", prefix="distillation.")
        check_above_zero(self, "learning_rate", prefix="distillation.")
        check_at_most(MAX_RATE, self, "learning_rate", prefix="distillation.")
        check_name(self.teacher, "distillation.teacher")


@dataclass(frozen=True)
class Recipe:
    """One experiment. Defaults are those of the published training recipe where it has a value.

    Attributes:
        trainable: patterns of parameter names and the learning rate of each (null: `learning_rate`); the schedule
            scales them all. What no pattern matches stays frozen.
        tokens_per_batch: fill batches with rows of like length up to this many positions, pads included, instead of
            counting captions: `batch_size` is not read then.
        shuffle_buffer: 0 shuffles all training images in every epoch. With a number N, an epoch reads shard after shard
            (a caption folder is one) in an order of its own and shuffles images within windows of N: pictures are then
            read nearly in the order of the disk. N should be many times ``batch_size``.
        compile: compile the language model for training, once; it has to earn the minutes that compiling takes.
        monitor: what decides the best checkpoint and early stopping: the validation loss, or a score of captions that
            are decoded for the first ``num_decoded_images`` of validation.
        max_bad_samples: share of a split's captions, and of its pictures, that may be unreadable. They are set aside,
            named in ``log_dir``, and never replaced; above the share training does not start.
        feature_cache: where the encoder's features are kept. `auto`: in ``data_dir``/.features, where measuring says
            that reading them is quicker than encoding; a folder: there, unasked; `off`: nowhere, pictures are encoded
            in every step.
        feature_cache_dtype: how they are stored; `int8` with a scale per token is half the size of the 16-bit ones, and
            `float32` twice: the encoder's own numbers, for those who want a training from a cache to be the same to the
            last digit.
        feature_cache_pooling: 2 averages the encoder's grid over 2 x 2 tokens, for the bridge and for captioning
            alike: a quarter of the features. It belongs to the architecture, with a cache or without.
        feature_cache_views: random crops, mirrored or not, that each training image is seen through, one an epoch in
            turn, fixed by ``seed``; 0 shows the whole image. Validation always does.
        text_state_cache: compute the layers below ``bridge.enter_at_layer`` once per training caption and keep what
            leaves them beside the features: two bytes per token and unit of the language model's width.
        loss_kernel: what computes the loss behind a frozen head: `own`, `torch` (2.13 and later), `liger` (CUDA), or
            `auto`, the quickest that works here.
        label_smoothing: share of each target that training spreads over the whole vocabulary (0.1 in Szegedy et al.
            2016 and in most captioners); validation is not smoothed.
        amp_dtype: of mixed precision; `float32` is none, as ``use_amp: false``.
        early_stopping_min_delta: a validation counts as better only by more than this; 0 takes any new best.
        warmup_steps: of a linear rise from zero, but never more than a tenth of all steps.
        weight_averaging: decay of an exponential moving average of what is trained, such as 0.999; validation,
            captions and all checkpoints' weights are the average's. Null: the last weights themselves.
        objective: `cross_entropy` of the human captions, or `scst`: self-critical sequence training (Rennie et al.
            2017), in which the model's own samples are made likelier by how much their CIDEr-D, with the training
            split's document frequencies, exceeds a baseline. It wants `start_from` and a small learning rate.
        scst_samples: captions drawn for each image of a step; `batch_size` counts them.
        scst_baseline: `leave_one_out`, the mean reward of an image's other samples (Kool et al. 2019; Luo 2020), or
            `greedy`, the reward of its greedy caption (Rennie et al. 2017).
        scst_temperature: of the samples. At 1 they are the model's own, most of them poor after cross-entropy, and much
            of the training goes into making it surer; below 1, better captions are told from good ones.
        start_from: a checkpoint whose weights a new run starts from; of the same architecture.
        save_every_n_minutes: save the latest checkpoint that often, inside epochs too; ``save_every_n_steps`` keeps
            checkpoints of single steps, the newest ``keep_step_checkpoints`` of them.
        resume_from_checkpoint: a checkpoint, a folder of them, or `auto`: the newest sound one in ``checkpoint_dir``,
            and a new run where there is none.
        max_skipped_steps: a step whose loss or gradient is not finite changes nothing; after so many of them in a row,
            training stops. Overflows of float16 count once the loss scale can be lowered no more.
        halve_batch_on_oom: when memory runs out in a step, make it, and those that follow, in twice as many
            micro-batches of half the size: its captions and its loss stay the same. In one process.
    """

    vision_encoder: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    distillation: DistillationConfig | None = None

    # Data
    data_dir: str = "data/flickr8k"
    captions_per_image: int = 1
    max_caption_tokens: int = 128
    num_workers: int = 2
    shuffle_buffer: int = 0
    max_bad_samples: float = 0.01
    feature_cache: str = "auto"
    feature_cache_dtype: Literal["float16", "bfloat16", "int8", "float32"] = "float16"
    feature_cache_pooling: Literal[1, 2] = 1
    feature_cache_views: int = 0
    text_state_cache: bool = False

    # Optimisation
    trainable: dict[str, float | None] = field(default_factory=lambda: {"bridge.*": None})
    learning_rate: float = 1e-5
    min_lr: float = 1e-6
    num_epochs: int = 12
    max_steps: int | None = None
    batch_size: int = 8
    tokens_per_batch: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_clip_val: float = 0.3
    max_skipped_steps: int = 10
    halve_batch_on_oom: bool = False
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    weight_averaging: float | None = None
    use_scheduler: bool = True
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    seed: int = 0

    # What is optimised, and from where
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    scst_samples: int = 5
    scst_baseline: Literal["leave_one_out", "greedy"] = "leave_one_out"
    scst_temperature: float = 1.0
    start_from: str | None = None

    # Precision and devices
    use_amp: bool = True
    amp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    loss_kernel: Literal["auto", "own", "torch", "liger"] = "auto"
    quantize_language_model: Literal["none", "int8", "nf4"] = "none"
    device: str = "auto"

    # Validation, early stopping, checkpoints, logs
    monitor: Literal["loss", "bleu4", "cider"] = "loss"
    decode_every_n_steps: int | None = None
    num_decoded_images: int = 200
    save_every_n_steps: int | None = None
    save_every_n_minutes: float | None = None
    keep_step_checkpoints: int = 3
    use_early_stopping: bool = True
    early_stopping_patience: int = 3
    early_stopping_min_delta: float = 0.0
    val_every_n_epochs: int = 1
    save_every_n_epochs: int = 1
    log_every_n_steps: int = 10
    generate_samples_every_n_epochs: int = 1
    num_validation_samples: int = 4
    max_validation_images: int | None = None
    checkpoint_dir: str = "checkpoints"
    log_dir: str = "logs"
    resume_from_checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "captions_per_image", "max_caption_tokens", "num_epochs", "max_steps", "batch_size",
            "tokens_per_batch", "gradient_accumulation_steps", "early_stopping_patience", "val_every_n_epochs",
            "save_every_n_epochs", "log_every_n_steps", "generate_samples_every_n_epochs",
            "max_validation_images", "decode_every_n_steps", "num_decoded_images", "save_every_n_steps",
            "keep_step_checkpoints", "scst_samples", "max_skipped_steps",
        )  # fmt: skip
        check_at_least(
            0, self, "num_workers", "shuffle_buffer", "feature_cache_views", "learning_rate", "min_lr", "weight_decay",
            "warmup_steps", "early_stopping_min_delta", "num_validation_samples",
        )  # fmt: skip
        check_above_zero(self, "gradient_clip_val", "scst_temperature")
        check_seed(self)
        self._check_upper_bounds()
        if secret := _key_of_credential(self.to_dict()):
            raise ConfigurationError(
                f"{secret} holds a token or a password, and a recipe goes into checkpoints and reports: give the plain "
                "name or address, and the hub's token in HF_TOKEN"
            )
        if not 0 <= self.max_bad_samples <= 1:
            raise ConfigurationError(
                f"max_bad_samples is a share: from 0 to 1, not {self.max_bad_samples}"
            )
        if self.save_every_n_minutes is not None:
            check_above_zero(self, "save_every_n_minutes")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"label_smoothing is a share: at least 0 and below 1, not {self.label_smoothing}"
            )
        if self.weight_averaging is not None and not 0 < self.weight_averaging < 1:
            raise ConfigurationError(
                f"weight_averaging is a decay between 0 and 1, such as 0.999, not {self.weight_averaging}"
            )
        if self.loss_kernel in ("torch", "liger") and (
            self.objective == "scst" or self.label_smoothing
        ):
            raise ConfigurationError(
                f"loss_kernel={self.loss_kernel} knows neither weighted nor smoothed losses: use loss_kernel=auto with "
                "objective=scst or label_smoothing"
            )
        if not self.trainable:
            raise ConfigurationError("trainable names nothing: `bridge.*: null` trains the bridge")
        rates = {pattern: rate for pattern, rate in self.trainable.items() if rate is not None}
        if bad := [pattern for pattern, rate in rates.items() if not 0 <= rate <= MAX_RATE]:
            raise ConfigurationError(
                f"trainable: the learning rate of {bad[0]!r} must be at least 0 and at most {MAX_RATE:g}"
            )
        if self.learning_rate == 0 and any(self.trainable.values()):
            raise ConfigurationError(
                "trainable has learning rates, which follow the schedule of learning_rate: it must be above 0"
            )
        if self.distillation is not None and self.feature_cache_views:
            raise ConfigurationError(
                "distillation compares two encoders on the same picture: it needs feature_cache_views=0"
            )
        if self.objective == "scst":
            self._check_scst()
        elif self.tokens_per_batch is None and self.batch_size % self.captions_per_image:
            raise ConfigurationError(
                f"batch_size counts captions: {self.batch_size} is not a multiple of captions_per_image="
                f"{self.captions_per_image}"
            )

    def _check_upper_bounds(self) -> None:
        """Refuse what no training means: infinite rates, and counts that no machine integer holds."""
        check_at_most(
            MAX_RATE, self, "learning_rate", "min_lr", "weight_decay", "scst_temperature", "early_stopping_min_delta"
        )  # fmt: skip
        check_at_most(MAX_CLIP, self, "gradient_clip_val")
        counts = [
            field.name
            for field in dataclasses.fields(self)
            if type(getattr(self, field.name)) is int and field.name != "seed"
        ]
        check_at_most(MAX_COUNT, self, *counts, "save_every_n_minutes")

    def _check_scst(self) -> None:
        if self.scst_baseline == "leave_one_out" and self.scst_samples == 1:
            raise ConfigurationError(
                "scst_baseline=leave_one_out needs other samples of an image: scst_samples must be at least 2"
            )
        if self.batch_size % self.scst_samples:
            raise ConfigurationError(
                f"batch_size counts sampled captions with objective=scst: {self.batch_size} is not a multiple of "
                f"scst_samples={self.scst_samples}"
            )
        for key in ("tokens_per_batch", "text_state_cache", "label_smoothing"):
            if getattr(self, key):
                raise ConfigurationError(
                    f"{key} is for captions that are known beforehand: leave it out with objective=scst"
                )

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype of mixed precision; None where everything is computed in the weights' own."""
        return self.amp_dtype if self.use_amp and self.amp_dtype != "float32" else None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict in the YAML layout (a bridge's options stand beside its kind)."""
        plain = dataclasses.asdict(self)
        options = plain["bridge"].pop("options")
        plain["bridge"].update(options or {})
        return {
            **plain,
            **{key: _without_tuples(plain[key]) for key in ("vision_encoder", "decode")},
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _without_tuples(section: dict[str, Any]) -> dict[str, Any]:
    """YAML and JSON have lists."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in section.items()
    }


def load_recipe(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], object] = lambda line: None,
) -> Recipe:
    """Read a recipe and apply ``dotted.key=value`` overrides (values are YAML).

    A file without any model section is in the flat layout of the published system: its keys change the recipe
    `training-default`.

    Args:
        say: told in one line when a file is read that way.

    Raises:
        ConfigurationError: the file is missing or not YAML, a key is unknown, a type is wrong or a value impossible.
    """
    data = _read_yaml(Path(path)) if path is not None else {}
    if data and not MODEL_SECTIONS & data.keys():
        data = _from_published_layout(data, str(path), say)
    for override in overrides:
        _apply_override(data, override)
    return recipe_from_dict(data, where=str(path) if path else "the command line")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"no recipe at {path}; recipes that ship are in config/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the recipe {path}: {error}") from None
    try:
        data = parse_yaml(text) or {}
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid YAML, or no recipe: {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must hold keys and values, not a {type(data).__name__}")
    return data


def _from_published_layout(
    flat: Mapping[str, Any], where: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """The default recipe with the values of a flat file put over it."""
    data = _read_yaml(shipped_recipe(DEFAULT_RECIPE))
    system = [
        data["vision_encoder"]["name"],
        data["bridge"]["kind"],
        data["language_model"]["name"],
    ]
    idle = sorted(PUBLISHED_BUT_IDLE & flat.keys())
    without_meaning = f"; without meaning here: {', '.join(idle)}" if idle else ""
    say(
        f"{where} names no models: those of {DEFAULT_RECIPE} are used ({' + '.join(system)}){without_meaning}"
    )
    for key, value in flat.items():
        if key in PUBLISHED_NAMES:
            section, _, name = PUBLISHED_NAMES[key].rpartition(".")
            (data[section] if section else data)[name] = value
        elif key not in PUBLISHED_BUT_IDLE:
            data[key] = value
    if data.get("device", "auto") is None:  # as published: null lets the program choose
        data["device"] = "auto"
    if data.get("use_amp") is False or data.get("amp_dtype") == "float32":
        # There the models are loaded in float32, and mixed precision alone computes in less.
        data["language_model"]["dtype"] = data["feature_cache_dtype"] = "float32"
    return data


def published_recipe(settings: Any, where: str, say: Callable[[str], object]) -> Recipe:
    """The recipe `training-default` with the settings of the published system's code, as its checkpoints hold them.

    Raises:
        ConfigurationError: as `load_recipe`.
    """
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{where}: its config must be a mapping, not {shown(settings)}")
    return recipe_from_dict(_from_published_layout(settings, where, say), where=where)


def shipped_recipe(name: str) -> Path:
    """Path of a recipe that ships: in the installed package, or in ``config/`` of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "config", package.parents[1] / "config"):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigurationError(f"no recipe named {name!r} ships with vlm-bridge")


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with ``dotted.key=value`` overrides applied. Raises ConfigurationError as `load_recipe` does."""
    data = recipe.to_dict()
    for override in overrides:
        _apply_override(data, override)
    return recipe_from_dict(data, where="the command line")


def recipe_from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from the YAML layout. Raises ConfigurationError as `load_recipe` does."""
    data = dict(data)
    if "bridge" in data:
        data["bridge"] = _bridge_layout(data["bridge"], where)
    recipe = _build(Recipe, data, where, prefix="")
    if recipe.bridge.options is None:
        bridge = _build(
            BridgeConfig, _bridge_layout({"kind": recipe.bridge.kind}, where), where, "bridge."
        )
        recipe = dataclasses.replace(recipe, bridge=bridge)
    return recipe


def _bridge_layout(data: Any, where: str) -> dict[str, Any]:
    """Move a bridge's own options from beside `kind` into an options object of that kind."""
    from vlm_bridge.model_architecture.bridges import BRIDGES

    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{where}: bridge must be a mapping with a `kind`, not {shown(data)}"
        )
    kind = data.get("kind", BridgeConfig.kind)
    if not isinstance(kind, str) or kind not in BRIDGES:
        raise ConfigurationError(
            f"{where}: bridge.kind={shown(kind)} is unknown{_suggest(shown(kind), BRIDGES)}"
        )
    options_class, _ = BRIDGES[kind]
    shared = {f.name for f in dataclasses.fields(BridgeConfig)} - {"options"}
    own = {key: value for key, value in data.items() if key not in shared}
    options = _build(options_class, own, where, "bridge.", also_known=shared)
    return {**{key: value for key, value in data.items() if key in shared}, "options": options}


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
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigurationError(
                f"{shown(override)}: {parent if parent.isprintable() else shown(parent)} is a value, not a section"
            )
        node = child
    node[last] = value


def _build(
    cls: type, data: Any, where: str, prefix: str, also_known: set[str] | None = None
) -> Any:
    if dataclasses.is_dataclass(data) and isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{where}: {prefix.rstrip('.') or 'a recipe'} must be a mapping, not {shown(data)}"
        )
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key not in known:
            is_plain = isinstance(key, str) and key.isprintable() and len(key) <= MAX_KEY_CHARACTERS
            name = key if is_plain else shown(key)
            suggestion = _suggest(name, known | (also_known or set()))
            raise ConfigurationError(f"{where}: unknown key {prefix}{name}{suggestion}")
        values[key] = _coerce(value, hints[key], where, prefix + key)
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str, key: str) -> Any:
    if hint is Any:
        return value
    if isinstance(value, int) and value.bit_length() > 64:
        raise ConfigurationError(
            f"{where}: {key} is {shown(value)}, and no setting is beyond 64 bits"
        )
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, key + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(value == argument and type(value) is type(argument) for argument in arguments):
            return value
        raise ConfigurationError(
            f"{where}: {key}={shown(value)} must be one of {', '.join(map(str, arguments))}"
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _coerce(value, inner, where, key)
    if origin is dict:
        if isinstance(value, Mapping):
            return {
                str(k): _coerce(v, arguments[1], where, f"{key}[{shown(k)}]")
                for k, v in value.items()
            }
        raise ConfigurationError(f"{where}: {key}={shown(value)} must be a mapping")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(
                _coerce(item, arguments[0], where, f"{key}[{i}]") for i, item in enumerate(value)
            )
        raise ConfigurationError(f"{where}: {key}={shown(value)} must be a list")
    if hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as text.
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                return float(value)
    elif hint is str and value is False and key == "feature_cache":
        return "off"  # YAML 1.1 reads a bare `off` as false
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigurationError(f"{where}: {key}={shown(value)} must be of type {hint.__name__}")


def _key_of_credential(node: Mapping[str, Any], prefix: str = "") -> str | None:
    for key, value in node.items():
        if isinstance(value, Mapping) and (found := _key_of_credential(value, f"{prefix}{key}.")):
            return found
        if isinstance(value, str) and holds_credential(value):
            return prefix + key
    return None


def _suggest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, [str(k) for k in known], n=1)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f" (known: {', '.join(sorted(map(str, known)))})"
    )
