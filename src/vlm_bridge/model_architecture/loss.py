"""Cross-entropy through a language-model head without logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Positions per chunk at most: 256 x 49,152 float32 logits are 48 MiB; 256 x 256,000 are 250 MiB.
CHUNK_POSITIONS = 256
MIN_CHUNK_POSITIONS = 16

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

    Divide the total by the global count of supervised tokens, not by V, when gradients are
    accumulated or several processes work together.

    Args:
        hidden_bth: [B, T, H], the state at position t predicts ``labels_bt[:, t]``.
        labels_bt: [B, T] token ids; ``IGNORE_INDEX`` where nothing is supervised.
        head: maps [V, H] to logits [V, vocabulary].
        head_is_trained: whether its parameters need gradients; frozen ones cost none.
        supervised_v: [V] indices of the supervised ones of the B x T positions. Finding them here
            makes the program wait for the device.
        weights_v: [V] factors of the token losses, of any sign (advantages of a policy gradient).
        label_smoothing: share of each target that is spread over the vocabulary (Szegedy et al.
            2016).
    """
    if supervised_v is None:
        supervised_v = (labels_bt != IGNORE_INDEX).flatten().nonzero()[:, 0]
    hidden_vh = hidden_bth.flatten(0, 1).index_select(0, supervised_v)
    labels_v = labels_bt.flatten().index_select(0, supervised_v)
    losses = _trained_head_losses if head_is_trained else _frozen_head_losses
    smoothed_v, token_losses_v = losses(hidden_vh, labels_v, head, label_smoothing)
    total = smoothed_v.sum() if weights_v is None else (smoothed_v * weights_v).sum()
    return CaptionLoss(total, token_losses_v.detach())


def positions_per_chunk(num_positions: int) -> int:
    """Return a quarter of the positions: few enough to save memory, enough for fast products."""
    return min(CHUNK_POSITIONS, max(MIN_CHUNK_POSITIONS, -(-num_positions // 4)))


def _token_losses(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Head, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smoothed losses [V] and the plain ones."""
    logits_vw = head(hidden_vh).float()
    if not label_smoothing:
        losses_v = F.cross_entropy(logits_vw, labels_v, reduction="none")
        return losses_v, losses_v
    log_probabilities_vw = logits_vw.log_softmax(-1)
    losses_v = F.nll_loss(log_probabilities_vw, labels_v, reduction="none")
    return torch.lerp(losses_v, -log_probabilities_vw.mean(-1), label_smoothing), losses_v


def _trained_head_losses(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Head, label_smoothing: float
) -> tuple[torch.Tensor, ...]:
    """Return `_token_losses` chunk by chunk; the backward pass computes each chunk again."""
    size = positions_per_chunk(len(labels_v))
    chunks = [
        checkpoint(_token_losses, hidden, labels, head, label_smoothing, use_reentrant=False)
        for hidden, labels in zip(hidden_vh.split(size), labels_v.split(size), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))  # type: ignore[arg-type]


def _frozen_head_losses(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Head, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wants_gradient = torch.is_grad_enabled() and hidden_vh.requires_grad
    return _FrozenHeadLosses.apply(hidden_vh, labels_v, head, label_smoothing, wants_gradient)


class _FrozenHeadLosses(torch.autograd.Function):
    """Smoothed and plain losses [V]; the gradient of the states is computed in the forward pass.

    The head is frozen, so the states alone need a gradient. Each chunk's logits are dropped
    once it is known, and never computed twice (Wijmans et al. 2024, "Cut Your Losses in
    Large-Vocabulary Language Models").
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
        smoothed_v, losses_v = hidden_vh.new_empty(2, len(labels_v), dtype=torch.float32)
        gradient_vh = torch.empty_like(hidden_vh) if wants_gradient else None
        size = positions_per_chunk(len(labels_v))
        for start in range(0, len(labels_v), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wants_gradient):
                hidden = hidden_vh[chunk].detach().requires_grad_(wants_gradient)
                smoothed, losses = _token_losses(hidden, labels_v[chunk], head, label_smoothing)
                if gradient_vh is not None:
                    (gradient_vh[chunk],) = torch.autograd.grad(smoothed.sum(), hidden)
            smoothed_v[chunk], losses_v[chunk] = smoothed.detach(), losses.detach()
        ctx.save_for_backward(gradient_vh)
        ctx.mark_non_differentiable(losses_v)
        return smoothed_v, losses_v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient_vh,) = ctx.saved_tensors
        weights_v1 = gradients[0].to(gradient_vh.dtype)[:, None]
        return gradient_vh * weights_v1, None, None, None, None
