"""Sections of a recipe as pydantic models, and one-line errors for their fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import shown

MAX_ENCODERS = 8
MAX_RETURN_SEQUENCES = 1_000
MAX_COUNT = 2**31 - 1
MAX_RATE = 1_000.0


def _to_float(value: object) -> object:
    """YAML 1.1 reads 1e-4 (no dot) as text."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_to_float)]
Rate = Annotated[Number, Field(ge=0, le=MAX_RATE)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ImageSize = Annotated[int, Field(ge=1, le=2_048)]
ModelName = Annotated[str, Field(min_length=1, max_length=1_000, pattern=r"^\P{C}*$")]


class Interval(NamedTuple):
    """How often something is done: a count of `epoch`, `step` or `minute`."""

    count: float
    unit: str

    def __str__(self) -> str:
        count = int(self.count) if self.count.is_integer() else self.count
        return f"{count} {self.unit}{'' if count == 1 else 's'}"


def parse_interval(text: str) -> Interval:
    """Read "2 epochs", "500 steps" or "30 minutes". Raises ValueError for anything else."""
    number, _, unit = text.partition(" ")
    unit = unit.removesuffix("s")
    try:
        count = float(number)
    except ValueError:
        count = 0.0
    whole = count.is_integer() and unit in ("epoch", "step")
    if not 0 < count <= MAX_COUNT or not (whole or unit == "minute"):
        raise ValueError("must be an interval such as '1 epoch', '500 steps' or '30 minutes'")
    return Interval(count, unit)


class Section(BaseModel):
    """Base of a recipe and its sections: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    place: ClassVar[str] = ""

    @classmethod
    def build(cls, data: object, where: str = "") -> Self:
        """Validate the YAML layout. Raises ConfigurationError for the first mistake."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigurationError(_explain(cls, error, where)) from None

    def replace(self, **changes: object) -> Self:
        """Return a validated copy. Raises ConfigurationError as `build` does."""
        return self.build({**dict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the YAML layout."""
        return self.model_dump(mode="json")


class VisionEncoderConfig(Section):
    """Frozen vision encoder: `efficientnet-lite0`, 1 or 2, or a Hugging Face name or folder.

    Attributes:
        name: several names joined by ` + ` concatenate features on the grid of the first encoder.
        layers: layers whose features are concatenated; None means the last one.
        resample: None keeps the image processor's own interpolation.
    """

    place = "vision_encoder"
    name: ModelName = "efficientnet-lite0"
    revision: str | None = None
    image_size: ImageSize | None = None
    layers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    resample: Literal["bilinear", "bicubic"] | None = None

    @model_validator(mode="after")
    def _check_several(self) -> Self:
        if len(self.names) > MAX_ENCODERS:
            raise ValueError(f"name joins {len(self.names)} encoders; at most {MAX_ENCODERS}")
        if len(self.names) > 1:
            for key in ("revision", "image_size", "layers", "resample"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for one encoder: leave it out beside {self.name!r}")
        return self

    @property
    def names(self) -> list[str]:
        return self.name.split(" + ")

    @property
    def parts(self) -> list[VisionEncoderConfig]:
        """Configuration of each encoder."""
        names = self.names
        return [self] if len(names) == 1 else [VisionEncoderConfig(name=name) for name in names]


class LanguageModelConfig(Section):
    """Language model: `smollm2-135m-instruct`, a GGUF file, or a Hugging Face name or folder.

    A BLIP captioning model contributes its text decoder.

    Attributes:
        dtype: of the stored weights; `auto` keeps the checkpoint's own type, `int8` (Dettmers et
            al. 2022) and `nf4` (QLoRA, 2023) quantize linear layers on NVIDIA GPUs.
        attention: transformers' implementation; `auto` takes `eager` for soft-capped scores
            (Gemma 2) and on CPUs, where it is 1.3x faster than `sdpa` on short rows, else `sdpa`.
        prompt: text before every caption, in training and captioning; never supervised.
        add_cross_attention: add trainable cross-attention layers to GPT-2 or BERT.
    """

    place = "language_model"
    name: ModelName = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    prompt: Annotated[str, Field(max_length=10_000)] = ""
    add_cross_attention: bool = False

    @property
    def quantization(self) -> str | None:
        """`int8`, `nf4` or None."""
        return self.dtype if self.dtype in ("int8", "nf4") else None


class BridgeOptions(Section):
    """Keys that every kind of bridge has.

    Attributes:
        standardize_features: normalize every feature channel by the mean and standard deviation
            of training images; both are kept in the checkpoint.
    """

    place = "bridge"
    kind: str
    standardize_features: bool = True


class ResamplerOptions(BridgeOptions):
    """Keys of bridges that read an image through a small transformer of learned queries.

    Attributes:
        num_queries: vectors per image.
        depth: layers.
        width: hidden size; None means the language model's.
        feed_forward_multiplier: hidden size of feed-forward layers, as a multiple of the width.
        position_embeddings: learned positions of image tokens, for convolutional encoders.
        dropout: on both residual branches and on image tokens, in training.
    """

    num_queries: Annotated[int, Field(ge=1, le=100_000)] = 16
    depth: Annotated[int, Field(ge=1, le=100)] = 2
    width: Annotated[int, Field(ge=1, le=100_000)] | None = None
    num_heads: Annotated[int, Field(ge=1, le=100_000)] = 8
    feed_forward_multiplier: Annotated[int, Field(ge=1, le=100)] = 4
    position_embeddings: bool = False
    dropout: Share = 0.0


class PrefixOptions(ResamplerOptions):
    """Options of `prefix`: ``num_queries`` soft tokens before the text."""

    kind: Literal["prefix"] = "prefix"


class DeepPrefixOptions(ResamplerOptions):
    """Options of `deep_prefix`.

    Attributes:
        enter_at_layer: first layer (from 0) that sees the image; None means a third of the way up.
            No gradient flows below it.
    """

    kind: Literal["deep_prefix"] = "deep_prefix"
    enter_at_layer: CountOrZero | None = None


class CrossAttentionOptions(BridgeOptions):
    """Options of `cross_attention`; defaults are those of the published DINOv2 + Gemma-2 system.

    Attributes:
        enter_at_layer: layer (from 0) before which the text attends to the image; 0, as published,
            edits embeddings. No gradient flows below it.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    num_heads: Annotated[int, Field(ge=1, le=100_000)] = 8
    feed_forward_multiplier: Annotated[int, Field(ge=1, le=100)] = 4
    dropout: Share = 0.0
    enter_at_layer: CountOrZero = 0


class ProjectionOptions(BridgeOptions):
    """Options of `projection`.

    Attributes:
        projection: `linear` (published for PVTv2-B0), `mlp` (two layers with GELU), or `conv3x3`
            (published, 3.5 M parameters) over the grid of image tokens.
        position_embeddings: learned positions of image tokens.
    """

    kind: Literal["projection"] = "projection"
    projection: Literal["linear", "mlp", "conv3x3"] = "linear"
    position_embeddings: bool = False
    dropout: Share = 0.0


BRIDGE_OPTIONS: dict[str, type[BridgeOptions]] = {
    "cross_attention": CrossAttentionOptions,
    "deep_prefix": DeepPrefixOptions,
    "prefix": PrefixOptions,
    "projection": ProjectionOptions,
}


def _default_kind(data: object) -> object:
    return {"kind": "prefix", **data} if isinstance(data, Mapping) and "kind" not in data else data


AnyBridgeOptions = Annotated[
    CrossAttentionOptions | DeepPrefixOptions | PrefixOptions | ProjectionOptions,
    Field(discriminator="kind"),
    BeforeValidator(_default_kind),
]


class DecodeSettings(Section):
    """How captions are generated; names are those of `transformers`' GenerationConfig.

    Attributes:
        object_bonus: nats that a caption gains when it first names what the encoder's ImageNet
            classifier recognizes (EfficientNet-Lite); 8 makes almost every caption do so, 0 is off.
        known_objects: names without bonus, because training captions have them often
            (`python -m benchmarks.known_objects` lists them).
    """

    place = "decode"
    num_beams: Annotated[int, Field(ge=1, le=1_000)] = 3
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000)] = 40
    min_new_tokens: Annotated[int, Field(ge=0, le=1_000)] = 0
    length_penalty: Annotated[Number, Field(ge=-MAX_RATE, le=MAX_RATE)] = 1.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=MAX_RATE)] = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1_000)] = 0
    do_sample: bool = False
    temperature: Annotated[Number, Field(gt=0, le=MAX_RATE)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    object_bonus: Rate = 0.0
    known_objects: Annotated[tuple[str, ...], Field(strict=False)] = ()


class DistillationConfig(Section):
    """Stage before the caption loss: fit the projection's image tokens to a teacher's features.

    Attributes:
        teacher: vision encoder as wide as the projection's output; for BLIP's decoder, BLIP's own.
        steps: optimizer steps of 32 images.
    """

    place = "distillation"
    teacher: ModelName
    steps: Count = 1000
    learning_rate: Annotated[Number, Field(gt=0, le=MAX_RATE)] = 1e-3


_SECTIONS: dict[str, type[Section]] = {
    section.place: section
    for section in (VisionEncoderConfig, LanguageModelConfig, DecodeSettings, DistillationConfig)
}
_LIMITS = {
    "greater_than_equal": "at least {ge:,}",
    "greater_than": "above {gt:,}",
    "less_than_equal": "at most {le:,}",
    "less_than": "below {lt:,}",
    "finite_number": "finite",
    "literal_error": "one of {expected}",
    "too_short": "of at least {min_length} item",
    "string_pattern_mismatch": "a text without control characters",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length:,} characters",
}
_TYPES = {"int": "int", "float": "float", "bool": "bool", "string": "str", "tuple": "a list"}


def _explain(cls: type[Section], error: ValidationError, where: str) -> str:
    """Return one line for the first mistake: where, key, value, and what it must be."""
    first = error.errors(include_url=False)[0]
    kind, place, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    owner = cls
    if place[:1] == ("bridge",) and len(place) > 1:  # pydantic adds the kind of the bridge
        owner, place = BRIDGE_OPTIONS[str(place[1])], ("bridge", *place[2:])
    elif len(place) > 1:
        owner = _SECTIONS.get(str(place[0]), cls)
    names = [str(name) for name in place]
    plain = [name if name.isprintable() and len(name) <= 100 else shown(name) for name in names]
    key = ".".join([cls.place, *plain] if cls.place else plain)
    if kind in ("extra_forbidden", "invalid_key"):
        problem = f"unknown key {key}{_suggest(names[-1], owner.model_fields)}"
    elif kind == "missing":
        problem = f"{key} is missing"
    elif kind == "value_error" and isinstance(value, str):
        problem = f"{key}={shown(value)} {context['error']}"
    elif kind == "value_error":
        problem = f"{key}{'.' if key else ''}{context['error']}"
    elif kind == "union_tag_invalid":
        tag = context["tag"]
        problem = f"{key}.kind={shown(tag)} is unknown{_suggest(tag, BRIDGE_OPTIONS)}"
    elif kind in _LIMITS:
        must = _LIMITS[kind].format(**context)
        problem = f"{key}={shown(value)} must be {must}"
    elif name := _TYPES.get(kind.split("_")[0]):
        problem = f"{key}={shown(value)} must be of type {name}"
    else:
        problem = f"{key or 'a recipe'} must be a mapping, not {shown(value)}"
    return f"{where}: {problem}" if where else problem


def _suggest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"
