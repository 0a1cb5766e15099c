"""Which implementation computes the loss behind a frozen linear head in training; all give the same loss."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.loss import (
    IGNORE_INDEX,
    Kernel,
    LinearHead,
    frozen_head_cross_entropy,
    logits_dtype,
)

TIMED_RUNS = 3


def choose_kernel(
    name: str, head: LinearHead | None, device: torch.device, dtype: torch.dtype
) -> Kernel | None:
    """The implementation that a recipe's ``loss_kernel`` names.

    `own` is `frozen_head_cross_entropy`; `torch` is `linear_cross_entropy` of torch 2.13 and later; `liger` is Liger
    Kernel's (Hsu et al. 2024). `auto` takes `own` on CPUs (`benchmarks.head_loss` compares them);
    on CUDA, where Liger Kernel is installed, the quicker of the two on the first batch.

    Args:
        head: None where it is more than a matrix, quantised or trained: `own` alone works there.
        dtype: what the head computes in (`logits_dtype`).

    Returns:
        None where `frozen_head_cross_entropy` runs without further ado.

    Raises:
        ConfigurationError: the implementation that is asked for does not work here.
    """
    kernels: dict[str, Kernel] = {"torch": torch_cross_entropy, "liger": liger_cross_entropy}
    if name in kernels:
        if obstacle := _obstacle(name, head, device, dtype):
            raise ConfigurationError(f"loss_kernel={name} {obstacle}: use loss_kernel=auto")
        return kernels[name]
    if name == "auto" and _obstacle("liger", head, device, dtype) is None:
        return QuickestKernel((frozen_head_cross_entropy, liger_cross_entropy))
    return None


def _obstacle(
    name: str, head: LinearHead | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why `torch` or `liger` cannot be used, or None."""
    if head is None:
        return "needs a head that is one matrix, neither quantised nor trained"
    if name == "liger":
        if device.type != "cuda":
            return "needs a CUDA GPU"
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        return None if has_liger else "needs Liger Kernel (pip install liger-kernel)"
    if not hasattr(F, "linear_cross_entropy"):
        return f"needs torch 2.13 or later, not {torch.__version__}"
    if head.softcap is not None:
        return "cannot soft-cap logits, as this language model does"
    if dtype != torch.float32:  # measured: the sum of 512 token losses was 2% off
        return "would add token losses up in 16 bits"
    return None


def torch_cross_entropy(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, None]:
    """A `Kernel`: torch's own, in chunks that it chooses."""
    dtype = logits_dtype(hidden_vh)
    total = F.linear_cross_entropy(
        hidden_vh.to(dtype),
        head.weight.to(dtype),
        labels_v,
        linear_bias=None if head.bias is None else head.bias.to(dtype),
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return total, None


def liger_cross_entropy(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, None]:
    """A `Kernel`: Liger Kernel's, whose gradient is written over the logits in one pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    dtype = logits_dtype(hidden_vh)
    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=head.softcap
    )
    bias = None if head.bias is None else head.bias.to(dtype)
    return loss(head.weight.to(dtype), hidden_vh.to(dtype), labels_v, bias), None


class QuickestKernel:
    """A `Kernel` that times some on the first batch it is given, and is the quickest of them from then on."""

    def __init__(self, candidates: Sequence[Kernel]):
        self.candidates = candidates
        self.chosen: Kernel | None = None

    def __call__(
        self, hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: LinearHead
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.chosen is None:
            self.chosen = min(
                self.candidates, key=lambda kernel: _seconds(kernel, hidden_vh, labels_v, head)
            )
        return self.chosen(hidden_vh, labels_v, head)


def _seconds(
    kernel: Kernel, hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: LinearHead
) -> float:
    """The shortest of some runs, forward and backward; the first, which may compile, is not counted."""
    seconds = []
    for _ in range(1 + TIMED_RUNS):
        hidden = hidden_vh.detach().requires_grad_()
        started = _now(hidden.device)
        kernel(hidden, labels_v, head)[0].backward()
        seconds.append(_now(hidden.device) - started)
    return min(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
