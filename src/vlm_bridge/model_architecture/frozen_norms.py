"""RMS norms of a frozen language model, back-propagated through in a third of the time on a CPU.

transformers writes one as seven operations, each with its own pass over memory and its own gradient, some of them in
twice the precision: a seventh of a small language model's layer. torch's weight normalisation (Salimans & Kingma 2016)
divides rows by their length in one pass forward and one backward, and an RMS norm is no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

AGREES_WITHIN = 1e-5
"""Relative, in float32: another formula (Gemma's ``1 + weight``) is far beyond it."""
WIDTH_WITHIN = 1e-3
"""How well the root of the width must be known in the type of the states: an eighth of what bfloat16 rounds away."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x ** 2) + epsilon)`` over the last of [..., H] (Zhang & Sennrich 2019).

    Rounded where transformers' Llama rounds it.
    """
    rows = x.flatten(0, -2)
    width = x.shape[-1]
    # One more column holds epsilon: the length of a row is the root of mean + epsilon then, times that of the width.
    rows = torch.cat((rows, rows.new_full((len(rows), 1), math.sqrt(width * epsilon))), dim=1)
    lengths = rows.new_full((len(rows), 1), math.sqrt(width))
    normed = torch._weight_norm(rows, lengths, 0)  # type: ignore[reportPrivateImportUsage]
    return normed[:, :width].view(x.shape) * weight


def quicken_norms(language_model: nn.Module) -> None:
    """Let the RMS norms of a language model take the quicker way wherever a gradient passes through them on a CPU.

    Norms of any class are tried on random numbers first: those that compute something else stay as they are.
    """
    computes_it: dict[type, bool] = {}
    for module in language_model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or _epsilon(module) is None or module.weight.is_meta:
            continue
        if kind not in computes_it:
            computes_it[kind] = _agrees(module)
        if computes_it[kind]:
            module.forward = partial(_forward, module, module.forward)


@contextmanager
def plain_norms(language_model: nn.Module) -> Iterator[None]:
    """Norms as transformers computes them: what ours is compared with."""
    quick = {
        module: module.__dict__.pop("forward") for module in language_model.modules() if _is_quick(module)
    }
    try:
        yield
    finally:
        for module, forward in quick.items():
            module.forward = forward


def _is_quick(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


def _forward(module: Any, plain: Any, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    is_apt = x.device.type == "cpu" and x.dtype == weight.dtype and not weight.requires_grad
    if is_apt and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return rms_norm(x, weight, _epsilon(module))  # type: ignore[arg-type]
    return plain(x)


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _agrees(module: Any) -> bool:
    if not hasattr(torch, "_weight_norm"):  # of torch.nn.utils.weight_norm, not of the public interface
        return False
    weight = module.weight
    root = torch.tensor(math.sqrt(len(weight)), dtype=torch.float64)
    if abs(root.to(weight.dtype).double() / root - 1) > WIDTH_WITHIN:
        return False
    drawn = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    x = drawn.to(weight.device, weight.dtype)
    tolerance = max(AGREES_WITHIN, torch.finfo(weight.dtype).eps)
    return torch.allclose(rms_norm(x, weight, _epsilon(module)), module(x), rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]
