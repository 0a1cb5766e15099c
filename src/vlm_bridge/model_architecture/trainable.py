"""Which parameters are trained, declared as patterns of their names; all others are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from vlm_bridge.errors import ConfigurationError


class TrainedParameter(NamedTuple):
    """A parameter, its (first) name, and the pattern that decides its learning rate."""

    name: str
    parameter: torch.nn.Parameter
    pattern: str


def trained_parameters(model: Any, patterns: Mapping[str, float | None]) -> list[TrainedParameter]:
    """Return the parameters that a shell pattern matches, in the model's order.

    The first pattern that matches decides. A parameter with several names (a head tied to the
    embeddings) is matched by any of them.

    Raises:
        ConfigurationError: a pattern matches nothing, or reaches into the vision encoder.
    """
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for parameter, aliases in names.items():
        matching = (p for p in patterns if any(fnmatchcase(alias, p) for alias in aliases))
        if (pattern := next(matching, None)) is not None:
            found.append(TrainedParameter(aliases[0], parameter, pattern))
            if aliases[0].startswith("vision_encoder."):
                raise ConfigurationError(
                    f"trainable: {pattern!r} reaches into the vision encoder, which stays frozen: "
                    "its features are computed once"
                )
    used = {trained.pattern for trained in found}
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ConfigurationError(
            f"trainable: no parameter is left for the pattern {unused[0]!r} (names begin with "
            "bridge. or language_model.causal_lm.)"
        )
    return found


def choose_trainable(model: Any, patterns: Mapping[str, float | None]) -> None:
    """Let gradients reach the parameters that patterns match and no others.

    Raises:
        ConfigurationError: as `trained_parameters`; or weights are stored in too few bits to be
            trained, or random ones (the bridge, layers that no checkpoint held) would stay random.
    """
    trained = trained_parameters(model, patterns)
    model.requires_grad_(False)
    for name, parameter, _ in trained:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"trainable: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}, "
                "in which small updates are lost: use language_model.dtype=float32 (amp_dtype "
                "still computes in 16 bits)"
            )
        parameter.requires_grad_(True)
    fresh = {f"language_model.causal_lm.{name}" for name in model.language_model.fresh_parameters}
    untrained = sorted(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and (name in fresh or name.startswith("bridge."))
    )
    if untrained:
        raise ConfigurationError(
            f"trainable: {len(untrained)} parameters start at random and would stay so (first: "
            f"{untrained[0]}): name them too, for example bridge.* or "
            "language_model.*crossattention*"
        )
