"""Cross-entropy through a language-model head that never holds logits for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Positions per chunk at most: 256 x 49,152 float32 logits are 48 MiB; 256 x 256,000 are 250 MiB.
CHUNK_POSITIONS = 256
MIN_CHUNK_POSITIONS = 16


def positions_per_chunk(num_positions: int) -> int:
    """A quarter of the positions: few enough to matter in small batches, many enough for quick matrix products."""
    return min(CHUNK_POSITIONS, max(MIN_CHUNK_POSITIONS, -(-num_positions // 4)))


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Sum of token losses; the hidden-state gradient is computed chunk by chunk in the forward pass.

    The head is frozen, so the only gradient anyone needs is that of the hidden states. Having it ready when
    each chunk's logits exist means that the logits can be dropped at once (the idea of Wijmans et al. 2024,
    "Cut Your Losses in Large-Vocabulary Language Models", and Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Callable, wants_gradient: bool
    ):
        losses = torch.empty(len(labels_v), dtype=torch.float32, device=hidden_vh.device)
        gradient = torch.empty_like(hidden_vh) if wants_gradient else None
        size = positions_per_chunk(len(labels_v))
        for start in range(0, len(labels_v), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wants_gradient):
                hidden = hidden_vh[chunk].detach().requires_grad_(wants_gradient)
                chunk_losses = F.cross_entropy(head(hidden).float(), labels_v[chunk], reduction="none")
                if gradient is not None:
                    (gradient[chunk],) = torch.autograd.grad(chunk_losses.sum(), hidden)
            losses[chunk] = chunk_losses.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, _losses_gradient: torch.Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None


def _trained_head_cross_entropy(
    hidden_vh: torch.Tensor, labels_v: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a head that learns too: each chunk's logits are made again in the backward pass."""

    def chunk_losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="none")

    size = positions_per_chunk(len(labels_v))
    losses = torch.cat(
        [
            checkpoint(chunk_losses, hidden, labels, use_reentrant=False)  # type: ignore[misc]
            for hidden, labels in zip(hidden_vh.split(size), labels_v.split(size), strict=True)
        ]
    )
    return losses.sum(), losses.detach()


def caption_cross_entropy(
    hidden_bth: torch.Tensor,
    labels_bt: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    head_is_trained: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of supervised positions only.

    Args:
        hidden_bth: [B, T, H], the state at position t predicts ``labels_bt[:, t]`` (labels come shifted).
        labels_bt: [B, T] token ids; ``IGNORE_INDEX`` where nothing is supervised.
        head: maps [V, H] to logits [V, vocabulary].
        head_is_trained: whether its parameters need gradients; frozen ones get none, and cost none.

    Returns:
        The sum of token losses in nats (differentiable in ``hidden_bth``) and the detached losses [V] of the V
        supervised positions in row-major order. Divide by the global count of supervised tokens, not by V, when
        gradients are accumulated or several processes work together.
    """
    supervised = labels_bt != IGNORE_INDEX
    hidden_vh = hidden_bth[supervised]
    if head_is_trained and torch.is_grad_enabled():
        return _trained_head_cross_entropy(hidden_vh, labels_bt[supervised], head)
    wants_gradient = torch.is_grad_enabled() and hidden_vh.requires_grad
    total, losses = _FrozenHeadCrossEntropy.apply(hidden_vh, labels_bt[supervised], head, wants_gradient)
    return total, losses
