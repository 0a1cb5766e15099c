"""Cross-entropy through a language-model head without logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm_bridge.data_pipeline.loader import IGNORE_INDEX

# Positions per chunk: 512, or what 64 MiB of logits in 16 bits hold of a small vocabulary.
CHUNK_POSITIONS, CHUNK_LOGITS = 512, 2**25
# Logits in float32 at a time: what a CPU's cache holds (4 MiB); 256 MiB on a GPU.
CPU_BLOCK, GPU_BLOCK = 2**20, 2**26

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
    softcap: float | None = None,
    trained: Iterable[nn.Parameter] = (),
    supervised_v: torch.Tensor | None = None,
    weights_v: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_positions: int = CHUNK_POSITIONS,
) -> CaptionLoss:
    """Return the cross-entropy of supervised positions.

    Divide the total by the global count of supervised tokens: that of all accumulated batches and
    processes.

    Args:
        hidden_bth: [B, T, H], the state at position t predicts ``labels_bt[:, t]``.
        labels_bt: [B, T] token ids; ``IGNORE_INDEX`` where nothing is supervised.
        head: maps [V, H] to logits [V, vocabulary], which it does not keep.
        softcap: c for logits c * tanh(logits / c), as Gemma 2's; None for none.
        trained: parameters of the head that need gradients.
        supervised_v: [V] indices of the supervised positions; finding them waits for the device.
        weights_v: [V] factors of the token losses, of any sign (advantages of a policy gradient).
        label_smoothing: share of each target that is spread over the vocabulary.
        chunk_positions: supervised positions whose logits are held at a time.
    """
    if supervised_v is None:
        supervised_v = (labels_bt != IGNORE_INDEX).flatten().nonzero()[:, 0]
    hidden_vh = hidden_bth.flatten(0, 1).index_select(0, supervised_v)
    labels_v = labels_bt.flatten().index_select(0, supervised_v)
    if weights_v is None:
        weights_v = torch.ones(len(labels_v), device=labels_v.device)
    trained = tuple(trained)
    has_gradient = torch.is_grad_enabled() and (hidden_vh.requires_grad or bool(trained))
    options = {"softcap": softcap, "smoothing": label_smoothing, "has_gradient": has_gradient}
    total, losses_v = _HeadLoss.apply(
        hidden_vh, labels_v, weights_v, head, chunk_positions, options, *trained
    )
    return CaptionLoss(total, losses_v)


class _HeadLoss(torch.autograd.Function):
    """Weighted sum of the losses, and the plain losses [V].

    The forward pass computes the gradients of states and head. Logits of a chunk are dropped once
    these are known, and never computed twice (as Wijmans et al. 2024, "Cut Your Losses").
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_vh: torch.Tensor,
        labels_v: torch.Tensor,
        weights_v: torch.Tensor,
        head: Head,
        chunk_positions: int,
        options: dict[str, Any],
        *trained: nn.Parameter,
    ) -> tuple[torch.Tensor, ...]:
        total, losses, of_hidden = hidden_vh.new_zeros((), dtype=torch.float32), [], []
        has_gradient, of_head = options["has_gradient"], []
        chunks = -(-len(hidden_vh) // chunk_positions) or 1
        parts = (tensor.tensor_split(chunks) for tensor in (hidden_vh, labels_v, weights_v))
        for states, labels, weights in zip(*parts, strict=True):
            with torch.set_grad_enabled(has_gradient):
                states = states.detach().requires_grad_(has_gradient)
                logits_vw = head(states)
            smoothed_v, plain_v = _losses(logits_vw.detach(), labels, weights, **options)
            total += smoothed_v @ weights
            losses.append(plain_v)
            if has_gradient:
                found = torch.autograd.grad(logits_vw, (states, *trained), logits_vw.detach())
                of_hidden.append(found[0])
                added = [sum_.add_(more) for sum_, more in zip(of_head, found[1:], strict=False)]
                of_head = added or list(found[1:])
        ctx.save_for_backward(*([torch.cat(of_hidden), *of_head] if has_gradient else []))
        losses_v = torch.cat(losses)
        ctx.mark_non_differentiable(losses_v)
        return total, losses_v

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[Any, ...]:
        # In place: of a trained head, there may be as many as there are words.
        hidden, *head = (saved.mul_(of_outputs[0].to(saved.dtype)) for saved in ctx.saved_tensors)
        return hidden, None, None, None, None, None, *head


def _losses(
    logits_vw: torch.Tensor, labels_v: torch.Tensor, weights_v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [V], smoothed and plain, and write the gradient over the logits."""
    block = CPU_BLOCK if logits_vw.device.type == "cpu" else GPU_BLOCK
    rows = min(max(1, block // logits_vw.shape[1]), max(1, len(logits_vw)))
    scratch = logits_vw.new_empty((2, rows, logits_vw.shape[1]), dtype=torch.float32)
    parts = zip(*(tensor.split(rows) for tensor in (logits_vw, labels_v, weights_v)), strict=True)
    found = [
        _block_losses(*part, scratch=scratch[:, : len(part[0])], **options) for part in parts
    ]
    smoothed, plain = zip(*found, strict=True)
    return torch.cat(smoothed), torch.cat(plain)


def _block_losses(
    logits_vw: torch.Tensor,
    labels_v: torch.Tensor,
    weights_v: torch.Tensor,
    *,
    scratch: torch.Tensor,
    softcap: float | None,
    smoothing: float,
    has_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute in place: a pass over cached memory costs a tenth of one over fresh memory.

    Softmax ignores a constant, so c * tanh(x / c) is as good as c * tanh(x / c) + c, which is
    2c * sigmoid(2x / c) and six times as quick on a CPU.
    """
    labels_v1, weights_v1 = labels_v[:, None], weights_v[:, None]
    x_vw, sigmoid_vw = scratch
    x_vw.copy_(logits_vw)
    if softcap is not None:
        torch.sigmoid(x_vw.mul_(2 / softcap), out=sigmoid_vw)
        torch.mul(sigmoid_vw, 2 * softcap, out=x_vw)
    x_vw -= x_vw.amax(-1, keepdim=True)
    own_v1 = x_vw.gather(1, labels_v1)
    mean_v1 = x_vw.mean(-1, keepdim=True) if smoothing else 0.0
    sum_v1 = x_vw.exp_().sum(-1, keepdim=True)
    plain_v1 = sum_v1.log() - own_v1
    # The mean loss of all tokens gets the share of ``smoothing``.
    smoothed_v1 = plain_v1 + smoothing * (own_v1 - mean_v1)
    if has_gradient:
        x_vw *= weights_v1 / sum_v1
        if smoothing:
            x_vw -= smoothing / x_vw.shape[1] * weights_v1
        x_vw.scatter_add_(1, labels_v1, (smoothing - 1) * weights_v1)
        if softcap is not None:  # the derivative is 4 * sigmoid * (1 - sigmoid)
            x_vw *= sigmoid_vw.addcmul_(sigmoid_vw, sigmoid_vw, value=-1).mul_(4)
        logits_vw.copy_(x_vw)
    return smoothed_v1[:, 0], plain_v1[:, 0]
