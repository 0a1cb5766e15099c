"""Cross-entropy through a language-model head without logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm_bridge.data_pipeline.loader import IGNORE_INDEX

# Positions per chunk at most: 256 x 49,152 float32 logits are 48 MiB; 256 x 256,000 are 250 MiB.
CHUNK_POSITIONS = 256

Head = Callable[[torch.Tensor], torch.Tensor]


class CaptionLoss(NamedTuple):
    """Loss of a batch, in nats.

    Attributes:
        total: sum over the supervised tokens, weighted and smoothed; differentiable.
        token_losses: [V], of each supervised token in row-major order, detached, neither weighted
            nor smoothed.
    """

    total: torch.Tensor
    token_losses: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_losses.numel()


def caption_cross_entropy(
    hidden_bth: torch.Tensor,
    labels_bt: torch.Tensor,
    head: Head,
    *,
    head_is_trained: bool = False,
    supervised_v: torch.Tensor | None = None,
    weights_v: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> CaptionLoss:
    """Return the cross-entropy of supervised positions.

    Divide the total by the global count of supervised tokens: that of all accumulated batches and
    processes.

    Args:
        hidden_bth: [B, T, H], the state at position t predicts ``labels_bt[:, t]``.
        labels_bt: [B, T] token ids; ``IGNORE_INDEX`` where nothing is supervised.
        head: maps [V, H] to logits [V, vocabulary].
        head_is_trained: whether its parameters need gradients; frozen ones cost none.
        supervised_v: [V] indices of the supervised positions; finding them waits for the device.
        weights_v: [V] factors of the token losses, of any sign (advantages of a policy gradient).
        label_smoothing: share of each target that is spread over the vocabulary.
    """
    if supervised_v is None:
        supervised_v = (labels_bt != IGNORE_INDEX).flatten().nonzero()[:, 0]
    hidden_vh = hidden_bth.flatten(0, 1).index_select(0, supervised_v)
    labels_v = labels_bt.flatten().index_select(0, supervised_v)
    if head_is_trained:  # the backward pass computes each chunk's logits again
        chunks = [
            checkpoint(_token_losses, *chunk, head, label_smoothing, use_reentrant=False)
            for chunk in _chunks(hidden_vh, labels_v)
        ]
        parts: Any = zip(*chunks, strict=True)
        smoothed_v, losses_v = map(torch.cat, parts)
    else:
        wants_gradient = torch.is_grad_enabled() and hidden_vh.requires_grad
        smoothed_v, losses_v = _FrozenHeadLosses.apply(
            hidden_vh, labels_v, head, label_smoothing, wants_gradient
        )
    total = smoothed_v.sum() if weights_v is None else (smoothed_v * weights_v).sum()
    return CaptionLoss(total, losses_v.detach())


def _chunks(*tensors_v: torch.Tensor) -> Any:
    return zip(*(tensor.split(CHUNK_POSITIONS) for tensor in tensors_v), strict=True)


def _token_losses(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Head, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smoothed losses [V] and the plain ones."""
    logits_vw = head(hidden_vh).float()
    losses_v = F.cross_entropy(logits_vw, labels_v, reduction="none")
    if not label_smoothing:
        return losses_v, losses_v
    spread_v = logits_vw.logsumexp(-1) - logits_vw.mean(-1)  # the mean loss of all tokens
    return torch.lerp(losses_v, spread_v, label_smoothing), losses_v


class _FrozenHeadLosses(torch.autograd.Function):
    """Smoothed and plain losses [V]; the gradient of the states is computed in the forward pass.

    The head is frozen, so the states alone need a gradient. Logits of a chunk are dropped once it
    is known, and never computed twice (as Wijmans et al. 2024, "Cut Your Losses").
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_vh: torch.Tensor,
        labels_v: torch.Tensor,
        head: Head,
        label_smoothing: float,
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts, gradients = [], []
        for states, labels in _chunks(hidden_vh, labels_v):
            with torch.set_grad_enabled(wants_gradient):
                states = states.detach().requires_grad_(wants_gradient)
                losses = _token_losses(states, labels, head, label_smoothing)
                if wants_gradient:
                    gradients += torch.autograd.grad(losses[0].sum(), states)
            parts.append(torch.stack(losses).detach())
        ctx.save_for_backward(torch.cat(gradients) if wants_gradient else None)
        smoothed_v, losses_v = torch.cat(parts, dim=1)
        ctx.mark_non_differentiable(losses_v)
        return smoothed_v, losses_v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient_vh,) = ctx.saved_tensors
        weights_v1 = gradients[0].to(gradient_vh.dtype)[:, None]
        return gradient_vh * weights_v1, None, None, None, None
