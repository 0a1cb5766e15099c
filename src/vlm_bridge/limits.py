"""Limits on the values of recipes and options, checked where they are declared."""

from __future__ import annotations

from vlm_bridge.errors import ConfigurationError


def check_at_least(minimum: float, options: object, *names: str, prefix: str = "") -> None:
    """Raise ConfigurationError for the first named attribute that is set (not None) and below ``minimum``.

    Args:
        prefix: what stands before the name in a recipe, for example ``bridge.``.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:  # not `<`: that would let nan pass
            raise ConfigurationError(f"{prefix}{name} must be at least {minimum}, not {value}")


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
