"""What of a captioner is trained, declared as patterns of parameter names. Everything else is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from vlm_bridge.errors import ConfigurationError


class TrainedParameter(NamedTuple):
    """A parameter, its name, and the learning rate of its pattern (None: the recipe's)."""

    name: str
    parameter: torch.nn.Parameter
    learning_rate: float | None


def trained_parameters(model: Any, patterns: Mapping[str, float | None]) -> list[TrainedParameter]:
    """The parameters whose name a pattern matches, in the model's order; the first pattern that matches decides.

    Args:
        patterns: shell patterns (``bridge.*``, ``language_model.*crossattention*``) and their learning rates.

    Raises:
        ConfigurationError: a pattern matches nothing, or reaches into the vision encoder.
    """
    found, used = [], set()
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        if name.startswith("vision_encoder."):
            raise ConfigurationError(
                f"trainable: {pattern!r} reaches into the vision encoder, which stays frozen: its features are "
                "computed once"
            )
        used.add(pattern)
        found.append(TrainedParameter(name, parameter, patterns[pattern]))
    if unused := [pattern for pattern in patterns if pattern not in used]:
        known = sorted({".".join(name.split(".")[:4]) for name, _ in model.named_parameters()})
        raise ConfigurationError(
            f"trainable: no parameter is left for the pattern {unused[0]!r} (names begin with "
            f"{', '.join(known[:6])} ...)"
        )
    return found


def choose_trainable(model: Any, patterns: Mapping[str, float | None]) -> None:
    """Let gradients reach what the patterns name and nothing else.

    Raises:
        ConfigurationError: as `trained_parameters`; or weights are stored in too few bits to be trained, or layers that
            no checkpoint held would stay random.
    """
    trained = trained_parameters(model, patterns)
    model.requires_grad_(False)
    for name, parameter, _ in trained:
        if parameter.dtype in (torch.bfloat16, torch.float16) or not parameter.is_floating_point():
            raise ConfigurationError(
                f"trainable: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}, in which small "
                "updates are lost: use language_model.dtype=float32 (use_amp still computes in 16 bits)"
            )
        parameter.requires_grad_(True)
    _check_fresh_are_trained(model, {name for name, _, _ in trained})


def _check_fresh_are_trained(model: Any, trained: set[str]) -> None:
    fresh = {f"language_model.causal_lm.{name}" for name in model.language_model.fresh_parameters}
    shared = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    if untrained := sorted(name for name in fresh if name in by_name and id(by_name[name]) not in shared):
        raise ConfigurationError(
            f"{len(untrained)} parameters of the language model are in no checkpoint and would stay random (first: "
            f"{untrained[0]}): name them under trainable, for example language_model.*crossattention*"
        )
