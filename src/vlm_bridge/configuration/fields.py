"""Base and field types of recipes: strict pydantic models whose mistakes are one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import shown


class Interval(NamedTuple):
    """How often something is done: every ``count`` of a unit, `epoch`, `step` or `minute`."""

    count: float
    unit: str


def parse_interval(text: str) -> Interval:
    """Read an `EpochsOrSteps` or `Every`, such as "1 epoch", "500 steps" or "30 minutes"."""
    count, unit = text.split(" ")
    return Interval(float(count), unit.removesuffix("s"))


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
Small = Annotated[int, Field(ge=1, le=100)]
Thousand = Annotated[int, Field(ge=1, le=1_000)]
ThousandOrZero = Annotated[int, Field(ge=0, le=1_000)]
Size = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
EpochsOrSteps = Annotated[str, Field(pattern=r"^[1-9]\d{0,8} (epoch|step)s?$")]
Every = Annotated[str, Field(pattern=r"^([1-9]\d{0,8} (epoch|step)|\d{1,9}(\.\d+)? minute)s?$")]
# Without control characters.
ModelName = Annotated[str, Field(min_length=1, max_length=1_000, pattern=r"^\P{C}*$")]


class Section(BaseModel):
    """Base of a recipe and its sections: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    place: ClassVar[str] = ""
    sections: ClassVar[dict[str, type[Section]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        Section.sections[cls.place] = cls

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
        place, value = [cls.place, *first["loc"]] if cls.place else first["loc"], first["input"]
        names = [str(name) for name in place]
        plain = (name if name.isprintable() and len(name) <= 100 else shown(name) for name in names)
        key = ".".join(plain)
        if first["type"] in ("extra_forbidden", "invalid_key"):
            owner = Section.sections.get(names[-2], cls) if len(names) > 1 else cls
            return f"unknown key {key}{suggest(names[-1], owner.model_fields)}"
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
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found
