"""Limits on the values of recipes and options, checked where they are declared."""

from __future__ import annotations

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.parsing import shown

MAX_NAME_CHARACTERS = 1_000
"""Of a model's name or folder."""


def check_at_least(minimum: float, options: object, *names: str, prefix: str = "") -> None:
    """Raise ConfigurationError for the first named attribute that is set (not None) and below ``minimum``.

    Args:
        prefix: what stands before the name in a recipe, for example ``bridge.``.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:  # not `<`: that would let nan pass
            raise ConfigurationError(f"{prefix}{name} must be at least {minimum}, not {value}")


def check_at_most(maximum: float, options: object, *names: str, prefix: str = "") -> None:
    """Raise ConfigurationError for the first named attribute that is set and above ``maximum``; arguments as above."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value <= maximum:
            raise ConfigurationError(f"{prefix}{name} must be at most {maximum:,}, not {value}")


def check_seed(options: object, *, prefix: str = "") -> None:
    """Raise ConfigurationError unless ``seed`` is one that torch and NumPy take: from 0, below 2**63."""
    seed: int = getattr(options, "seed")  # noqa: B009 (an attribute of every class that has one)
    if not 0 <= seed < 2**63:
        raise ConfigurationError(f"{prefix}seed must be at least 0 and below 2**63, not {seed}")


def check_name(name: str, where: str) -> None:
    """Raise ConfigurationError for what is no name of a model: empty, endless, or with control characters."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise ConfigurationError(
            f"{where} must be a name or a folder of 1 to {MAX_NAME_CHARACTERS:,} characters, not {shown(name)}"
        )


def check_above_zero(options: object, *names: str, prefix: str = "") -> None:
    """Raise ConfigurationError for the first named attribute that is not above zero; arguments as above."""
    for name in names:
        value = getattr(options, name)
        if not value > 0:
            raise ConfigurationError(f"{prefix}{name} must be above 0, not {value}")


def check_dropout(dropout: float, name: str) -> None:
    """Raise ConfigurationError where a dropout probability is not in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"{name} must be at least 0 and below 1, not {dropout}")
