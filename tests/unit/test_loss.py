"""The chunked cross-entropy is torch's own, without logits of a whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.model_architecture.loss import (
    CHUNK_POSITIONS,
    IGNORE_INDEX,
    CaptionLoss,
    caption_cross_entropy,
)

VOCABULARY, WIDTH = 50, 8


class Head(nn.Module):
    """A head that records how many positions it gets: frozen and soft-capped, or trained."""

    def __init__(self, softcap: float | None = None, *, trained: bool = False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCABULARY)
        self.softcap = softcap
        self.trained = trained
        self.requires_grad_(trained)
        self.calls: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(hidden.numel() // WIDTH)
        return self.linear(3 * hidden)

    def capped(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


HEADS = {
    "frozen": Head,
    "capped": lambda: Head(softcap=1.5),
    "trained": lambda: Head(trained=True),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Head:
    return HEADS[request.param]()


def hidden_and_labels(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, VOCABULARY, (rows, length))
    labels[torch.rand(rows, length) < 0.3] = IGNORE_INDEX
    return torch.randn(rows, length, WIDTH, requires_grad=True), labels


def loss_of(hidden: torch.Tensor, labels: torch.Tensor, head: Head, **options) -> CaptionLoss:
    trained = head.parameters() if head.trained else ()
    return caption_cross_entropy(
        hidden, labels, head, softcap=head.softcap, trained=trained, **options
    )


@pytest.mark.parametrize("length", [17, 1 + CHUNK_POSITIONS], ids=["short", "chunked"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_cross_entropy(
    head: Head, length: int, smoothing: float, weighted: bool
) -> None:
    hidden, labels = hidden_and_labels(4, length)
    supervised = labels.flatten() != IGNORE_INDEX
    weights = torch.randn(int(supervised.sum())) if weighted else None  # of either sign
    total, losses = loss_of(hidden, labels, head, weights_v=weights, label_smoothing=smoothing)
    (total / 7).backward()  # a factor that is not 1, as dividing by a token count gives
    gradients = [parameter.grad for parameter in head.parameters()]

    head.zero_grad(set_to_none=True)
    reference = hidden.detach().clone().requires_grad_()
    logits, targets = head.capped(reference).flatten(0, 1)[supervised], labels.flatten()[supervised]
    plain = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = plain.sum() if weights is None else (weights * plain).sum()
    (expected / 7).backward()
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, reference.grad, atol=1e-6, rtol=1e-4)
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(-1) == 0).equal(labels == IGNORE_INDEX)
    unsmoothed = F.cross_entropy(logits, targets, reduction="none").detach()
    torch.testing.assert_close(losses, unsmoothed, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)
    assert not losses.requires_grad


def test_logits_of_the_whole_batch_are_never_made_nor_kept(head: Head) -> None:
    hidden, labels = hidden_and_labels(5, CHUNK_POSITIONS)
    supervised = int((labels != IGNORE_INDEX).sum())
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = loss_of(hidden, labels, head)
    of_head = [(WIDTH, VOCABULARY), *(parameter.shape for parameter in head.parameters())]
    assert not [shape for shape in kept if shape[-1] == VOCABULARY and shape not in of_head]
    total.backward()
    assert max(head.calls) <= CHUNK_POSITIONS < supervised
    assert sum(head.calls) == supervised  # every supervised position once, and no other


def test_works_without_gradients_without_supervision_and_at_known_positions(head: Head) -> None:
    hidden, labels = hidden_and_labels(2, 6)
    with torch.no_grad():
        total, losses = loss_of(hidden, labels, head)
    assert not total.requires_grad
    again = loss_of(hidden, labels, head)
    torch.testing.assert_close((total, losses), (again.total.detach(), again.token_losses))
    supervised = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
    assert loss_of(hidden, labels, head, supervised_v=supervised).token_losses.equal(losses)
    nothing, none = loss_of(hidden, torch.full_like(labels, IGNORE_INDEX), head)
    nothing.backward()
    assert nothing.item() == 0
    assert len(none) == 0


@pytest.mark.parametrize("way", ["stored in 16 bits", "autocast"])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_in_16_bits(softcap: float | None, way: str) -> None:
    head = Head(softcap)
    hidden, labels = hidden_and_labels(4, 17)
    exact = loss_of(hidden, labels, head).total
    exact.backward()
    assert hidden.grad is not None
    gradient, hidden.grad = hidden.grad, None
    if way == "stored in 16 bits":
        hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        total, losses = loss_of(hidden, labels, head)
    total.backward()
    assert total.dtype == losses.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == hidden.dtype
    assert total.item() == pytest.approx(exact.item(), rel=1e-2)
    assert (hidden.grad.float() - gradient).norm() < 1e-2 * gradient.norm()


def test_16_bits_are_exact_where_a_token_is_certain() -> None:
    """The gradient of a certain token is a small difference, which rounding must not swallow."""
    weight = torch.eye(VOCABULARY, WIDTH).bfloat16()
    hidden = (torch.eye(WIDTH)[:3] * 12).bfloat16().requires_grad_()
    labels = torch.arange(3)
    total, _ = caption_cross_entropy(hidden[None], labels[None], lambda states: states @ weight.T)
    total.backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().T, labels, reduction="sum").backward()
    assert hidden.grad is not None and exact.grad is not None
    assert (hidden.grad.double() - exact.grad).norm() < 1e-2 * exact.grad.norm()
