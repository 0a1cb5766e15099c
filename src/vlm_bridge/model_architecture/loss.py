"""Cross-entropy through a language-model head that never holds logits for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Positions per chunk at most: 256 x 49,152 float32 logits are 48 MiB; 256 x 256,000 are 250 MiB.
CHUNK_POSITIONS = 256
MIN_CHUNK_POSITIONS = 16
# Of a linear head: its weights are read twice a chunk, so that a chunk is as large as memory allows, while the softmax
# of a block at a time stays within the processor's caches (`python -m benchmarks.head_loss` tries other sizes).
CHUNK_BYTES = {"cpu": 128 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
CHUNK_ROWS_ON_CPU = 320  # of a small vocabulary; more do not make its products quicker
BLOCK_BYTES = {"cpu": 4 * 2**20}
BLOCK_BYTES_ELSEWHERE = 32 * 2**20


@dataclass(frozen=True)
class LinearHead:
    """A frozen head that is one matrix product: ``states @ weight.T + bias``, soft-capped where ``softcap`` is given.

    Attributes:
        weight: [vocabulary, H].
        bias: [vocabulary].
        softcap: c of ``c * tanh(logits / c)`` (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of states [..., H]."""
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


Head = LinearHead | Callable[[torch.Tensor], torch.Tensor]
Kernel = Callable[
    [torch.Tensor, torch.Tensor, LinearHead], tuple[torch.Tensor, torch.Tensor | None]
]
"""From states [V, H], labels [V] and a linear head to the sum of token losses, differentiable in the states, and the
detached losses [V] where the kernel knows them."""


@overload
def caption_cross_entropy(
    hidden_bth: torch.Tensor,
    labels_bt: torch.Tensor,
    head: Head,
    *,
    head_is_trained: bool = ...,
    supervised_v: torch.Tensor | None = ...,
    weights_v: torch.Tensor | None = ...,
    label_smoothing: float = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def caption_cross_entropy(
    hidden_bth: torch.Tensor,
    labels_bt: torch.Tensor,
    head: Head,
    *,
    head_is_trained: bool = ...,
    supervised_v: torch.Tensor | None = ...,
    weights_v: torch.Tensor | None = ...,
    label_smoothing: float = ...,
    kernel: Kernel | None,
) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def caption_cross_entropy(
    hidden_bth: torch.Tensor,
    labels_bt: torch.Tensor,
    head: Head,
    *,
    head_is_trained: bool = False,
    supervised_v: torch.Tensor | None = None,
    weights_v: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    kernel: Kernel | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of supervised positions only.

    Args:
        hidden_bth: [B, T, H], the state at position t predicts ``labels_bt[:, t]`` (labels come shifted).
        labels_bt: [B, T] token ids; ``IGNORE_INDEX`` where nothing is supervised.
        head: maps [V, H] to logits [V, vocabulary]. The gradient of a `LinearHead` is written down instead of traced.
        head_is_trained: whether its parameters need gradients; frozen ones get none, and cost none.
        supervised_v: [V], the supervised ones of the B x T positions. To find them, the program has to wait for
            the device; who made the labels knows them already.
        weights_v: [V], factors of the token losses in the sum (of any sign: advantages of a policy gradient).
        label_smoothing: share of each target that is spread over the whole vocabulary (Szegedy et al. 2016).
        kernel: what runs instead of `frozen_head_cross_entropy` where a gradient through a linear head is wanted;
            kernels know neither weights nor smoothing.

    Returns:
        The sum of token losses in nats (differentiable in ``hidden_bth``), weighted and smoothed, and the detached
        losses [V] of the V supervised positions in row-major order, neither weighted nor smoothed (None from a kernel
        that gives their sum alone). Divide the sum by the global count of supervised tokens, not by V, when gradients
        are accumulated or several processes work together.
    """
    if supervised_v is None:
        supervised_v = (labels_bt != IGNORE_INDEX).flatten().nonzero()[:, 0]
    hidden_vh = hidden_bth.flatten(0, 1).index_select(0, supervised_v)
    labels_v = labels_bt.flatten().index_select(0, supervised_v)
    if head_is_trained and torch.is_grad_enabled():
        return _trained_head_cross_entropy(hidden_vh, labels_v, head, weights_v, label_smoothing)
    wants_gradient = torch.is_grad_enabled() and hidden_vh.requires_grad
    is_plain = weights_v is None and not label_smoothing
    if (
        kernel is not None
        and is_plain
        and wants_gradient
        and isinstance(head, LinearHead)
        and len(labels_v)
    ):
        return kernel(hidden_vh, labels_v, head)
    return frozen_head_cross_entropy(hidden_vh, labels_v, head, weights_v, label_smoothing)


def frozen_head_cross_entropy(
    hidden_vh: torch.Tensor,
    labels_v: torch.Tensor,
    head: Head,
    weights_v: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of token losses, differentiable in states [V, H], and the detached losses [V]; in chunks, with any head.

    Weights and smoothing are those of `caption_cross_entropy`: they are in the sum alone.
    """
    wants_gradient = torch.is_grad_enabled() and hidden_vh.requires_grad
    total, losses = _FrozenHeadCrossEntropy.apply(
        hidden_vh, labels_v, head, weights_v, label_smoothing, wants_gradient
    )
    return total, losses


def logits_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What a head computes in: autocast's type where that is on, else that of the states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Sum of token losses; the hidden-state gradient is computed chunk by chunk in the forward pass.

    The head is frozen, so the only gradient anyone needs is that of the hidden states. Having it ready when
    each chunk's logits exist means that the logits can be dropped at once (the idea of Wijmans et al. 2024,
    "Cut Your Losses in Large-Vocabulary Language Models", and Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_vh: torch.Tensor,
        labels_v: torch.Tensor,
        head: Head,
        weights_v: torch.Tensor | None,
        label_smoothing: float,
        wants_gradient: bool,
    ):
        way = _by_formula if isinstance(head, LinearHead) else _by_autograd
        losses, smoothed, gradient = way(
            hidden_vh.detach(), labels_v, head, label_smoothing, wants_gradient
        )  # type: ignore[arg-type]
        if weights_v is not None:
            smoothed = smoothed * weights_v
            if gradient is not None:  # of states rather than of logits, which are many more
                gradient *= weights_v.to(gradient.dtype)[:, None]
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return smoothed.sum(), losses

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, _losses_gradient: torch.Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None, None, None


def _by_formula(
    hidden_vh: torch.Tensor,
    labels_v: torch.Tensor,
    head: LinearHead,
    label_smoothing: float,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses [V], the same smoothed, and the smoothed ones' gradient [V, H]: (softmax - target) @ weight, written over
    the logits it is made of.

    The buffers are made once: fresh memory for each chunk costs more than what is computed in it.
    """
    dtype = logits_dtype(hidden_vh)
    exact = torch.promote_types(dtype, torch.float32)
    states, weight = hidden_vh.to(dtype), head.weight.to(dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    count, vocabulary = len(labels_v), len(weight)
    chunk_rows = linear_head_chunk(count, vocabulary, states)
    block_rows = min(
        chunk_rows, max(1, _bytes(BLOCK_BYTES, states) // (vocabulary * exact.itemsize))
    )
    logits = states.new_empty(chunk_rows, vocabulary)
    work = states.new_empty(block_rows, vocabulary, dtype=exact)
    losses = states.new_empty(count, dtype=exact)
    smoothed = torch.empty_like(losses) if label_smoothing else losses
    gradient = torch.empty_like(states) if wants_gradient else None
    for start in range(0, count, max(chunk_rows, 1)):
        chunk = slice(start, start + chunk_rows)
        chunk_logits = logits[: len(labels_v[chunk])]
        if bias is None:
            torch.mm(states[chunk], weight.T, out=chunk_logits)
        else:
            torch.addmm(bias, states[chunk], weight.T, out=chunk_logits)
        of_chunk = (chunk_logits, labels_v[chunk], losses[chunk], smoothed[chunk])
        for block, labels, block_losses, block_smoothed in zip(
            *(tensor.split(block_rows) for tensor in of_chunk), strict=True
        ):
            plain, spread = _replace_by_gradient(
                block, labels, head.softcap, label_smoothing, work[: len(block)]
            )
            block_losses.copy_(plain)
            if spread is not None:
                torch.lerp(plain, spread, label_smoothing, out=block_smoothed)
        if gradient is not None:
            torch.mm(chunk_logits, weight, out=gradient[chunk])
    return losses, smoothed, None if gradient is None else gradient.to(hidden_vh.dtype)


def _replace_by_gradient(
    logits_rv: torch.Tensor,
    labels_r: torch.Tensor,
    softcap: float | None,
    label_smoothing: float,
    work_rv: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write over logits the gradient of their losses. ``work_rv`` is memory to compute in.

    The softmax is written down, in place: torch's own, and the loss from it, go over the vocabulary more often.

    Returns:
        The losses [R] of the labels and, for smoothing, the mean loss [R] of all tokens.
    """
    values, ratio = work_rv.copy_(logits_rv), None
    if softcap is not None:
        ratio = torch.div(values, softcap).tanh_()
        torch.mul(ratio, softcap, out=values)
    label_r1 = labels_r[:, None]
    of_label_r1 = values.gather(1, label_r1)
    mean_r1 = values.mean(-1, keepdim=True) if label_smoothing else None
    largest_r1 = values.amax(-1, keepdim=True)
    sum_r1 = values.sub_(largest_r1).exp_().sum(-1, keepdim=True)
    log_sum_r1 = sum_r1.log() + largest_r1
    # Subtracted before anything is rounded: where a token is certain, the difference is all there is.
    target = torch.full_like(sum_r1, label_smoothing - 1.0)
    gradient = values.div_(sum_r1).scatter_add_(1, label_r1, target)
    if label_smoothing:
        gradient.sub_(label_smoothing / gradient.shape[1])
    if ratio is not None:  # times 1 - ratio ** 2, the slope of the softcap
        gradient.addcmul_(gradient * ratio, ratio, value=-1)
    logits_rv.copy_(gradient)
    spread_r1 = None if mean_r1 is None else log_sum_r1 - mean_r1
    return (log_sum_r1 - of_label_r1)[:, 0], None if spread_r1 is None else spread_r1[:, 0]


def linear_head_chunk(count: int, vocabulary: int, states: torch.Tensor) -> int:
    """Positions of a chunk: all of them, unless their logits are more than memory is to hold."""
    most = _bytes(CHUNK_BYTES, states) // (vocabulary * states.dtype.itemsize)
    if states.device.type == "cpu":
        most = min(most, CHUNK_ROWS_ON_CPU)
    return min(count, max(MIN_CHUNK_POSITIONS, most))


def _bytes(by_device: dict[str, int], tensor: torch.Tensor) -> int:
    elsewhere = CHUNK_BYTES_ELSEWHERE if by_device is CHUNK_BYTES else BLOCK_BYTES_ELSEWHERE
    return by_device.get(tensor.device.type, elsewhere)


def _by_autograd(
    hidden_vh: torch.Tensor,
    labels_v: torch.Tensor,
    head: Head,
    label_smoothing: float,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same for a head of any kind."""
    losses = torch.empty(len(labels_v), dtype=torch.float32, device=hidden_vh.device)
    smoothed = torch.empty_like(losses) if label_smoothing else losses
    gradient = torch.empty_like(hidden_vh) if wants_gradient else None
    size = positions_per_chunk(len(labels_v))
    for start in range(0, len(labels_v), size):
        chunk = slice(start, start + size)
        with torch.set_grad_enabled(wants_gradient):
            hidden = hidden_vh[chunk].detach().requires_grad_(wants_gradient)
            plain, chunk_losses = _token_losses(head(hidden), labels_v[chunk], label_smoothing)
            if gradient is not None:
                (gradient[chunk],) = torch.autograd.grad(chunk_losses.sum(), hidden)
        losses[chunk], smoothed[chunk] = plain.detach(), chunk_losses.detach()
    return losses, smoothed, gradient


def _token_losses(
    logits_vw: torch.Tensor, labels_v: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [V], and the same smoothed."""
    if not label_smoothing:
        losses = F.cross_entropy(logits_vw.float(), labels_v, reduction="none")
        return losses, losses
    log_probabilities = logits_vw.float().log_softmax(-1)
    losses = F.nll_loss(log_probabilities, labels_v, reduction="none")
    return losses, torch.lerp(losses, -log_probabilities.mean(-1), label_smoothing)


def positions_per_chunk(num_positions: int) -> int:
    """A quarter of the positions: few enough to matter in small batches, many enough for quick matrix products."""
    return min(CHUNK_POSITIONS, max(MIN_CHUNK_POSITIONS, -(-num_positions // 4)))


def _trained_head_cross_entropy(
    hidden_vh: torch.Tensor,
    labels_v: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    weights_v: torch.Tensor | None,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a head that learns too: each chunk's logits are made again in the backward pass."""

    def chunk_losses(
        hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _token_losses(head(hidden), labels, label_smoothing)

    size = positions_per_chunk(len(labels_v))
    chunks = [
        checkpoint(chunk_losses, hidden, labels, use_reentrant=False)  # type: ignore[misc]
        for hidden, labels in zip(hidden_vh.split(size), labels_v.split(size), strict=True)
    ]
    losses, smoothed = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    total = smoothed.sum() if weights_v is None else (smoothed * weights_v).sum()
    return total, losses.detach()
