"""The chunked cross-entropy through a frozen head is torch's own, without logits of a whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.model_architecture.loss import CHUNK_POSITIONS, IGNORE_INDEX, caption_cross_entropy

VOCABULARY, WIDTH = 50, 8


class Head:
    """A frozen linear head, soft-capped or not, that remembers how many positions it was given at a time."""

    def __init__(self, softcap: float | None = None):
        self.linear = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        self.softcap = softcap
        self.calls: list[int] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(hidden.numel() // WIDTH)
        logits = self.linear(3 * hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hidden_and_labels(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, VOCABULARY, (rows, length))
    labels[torch.rand(rows, length) < 0.3] = IGNORE_INDEX
    return torch.randn(rows, length, WIDTH, requires_grad=True), labels


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("length", [5, 1 + CHUNK_POSITIONS], ids=["one chunk", "several chunks"])
def test_equals_plain_cross_entropy(length: int, softcap: float | None) -> None:
    head = Head(softcap)
    hidden, labels = hidden_and_labels(4, length)
    total, token_losses = caption_cross_entropy(hidden, labels, head)
    # A factor that is not 1, as dividing by a token count gives.
    (total / 7).backward()

    reference = hidden.detach().clone().requires_grad_()
    logits = head(reference).flatten(0, 1)
    plain = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    (plain.sum() / 7).backward()

    torch.testing.assert_close(total, plain.sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_losses, plain[labels.flatten() != IGNORE_INDEX], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, reference.grad, atol=1e-5, rtol=1e-5)


def test_logits_of_the_whole_batch_never_exist() -> None:
    head = Head()
    hidden, labels = hidden_and_labels(5, CHUNK_POSITIONS)
    caption_cross_entropy(hidden, labels, head)[0].backward()
    assert len(head.calls) > 1
    assert max(head.calls) <= CHUNK_POSITIONS
    # Every supervised position once, and no position that is not supervised.
    assert sum(head.calls) == (labels != IGNORE_INDEX).sum()


def test_unsupervised_positions_get_no_gradient() -> None:
    hidden, labels = hidden_and_labels(2, 9)
    caption_cross_entropy(hidden, labels, Head())[0].backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(-1) == 0).equal(labels == IGNORE_INDEX)


def test_works_without_gradients_and_without_supervision() -> None:
    hidden, labels = hidden_and_labels(2, 6)
    with torch.no_grad():
        total, _ = caption_cross_entropy(hidden, labels, Head())
    assert not total.requires_grad
    nothing, losses = caption_cross_entropy(hidden, torch.full_like(labels, IGNORE_INDEX), Head())
    nothing.backward()
    assert nothing.item() == 0
    assert len(losses) == 0


class TrainedHead(nn.Module):
    """A head that learns: a transform, a tied-like matrix and a bias; remembers the positions it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.calls: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(hidden.numel() // WIDTH)
        return self.linear(torch.tanh(self.transform(3 * hidden)))


@pytest.mark.parametrize("length", [5, 1 + CHUNK_POSITIONS], ids=["one chunk", "several chunks"])
def test_a_trained_head_gets_the_gradients_of_plain_cross_entropy(length: int) -> None:
    head = TrainedHead()
    hidden, labels = hidden_and_labels(4, length)
    total, token_losses = caption_cross_entropy(hidden, labels, head, head_is_trained=True)
    (total / 7).backward()
    gradients = [parameter.grad for parameter in head.parameters()]

    head.zero_grad(set_to_none=True)
    reference = hidden.detach().clone().requires_grad_()
    plain = F.cross_entropy(
        head(reference).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    (plain.sum() / 7).backward()
    torch.testing.assert_close(total, plain.sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(token_losses, plain[labels.flatten() != IGNORE_INDEX], atol=1e-5, rtol=1e-5)
    assert not token_losses.requires_grad
    torch.testing.assert_close(hidden.grad, reference.grad, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


def test_a_trained_head_never_makes_nor_keeps_the_whole_logits() -> None:
    head = TrainedHead()
    hidden, labels = hidden_and_labels(5, CHUNK_POSITIONS)
    supervised = int((labels != IGNORE_INDEX).sum())
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = caption_cross_entropy(hidden, labels, head, head_is_trained=True)
    assert not any(shape[-1:] == (VOCABULARY,) for shape in kept), "logits wait for the backward pass"
    total.backward()
    assert max(head.calls) <= CHUNK_POSITIONS < supervised
    assert sum(head.calls) == 2 * supervised  # once forward, once again on the way back


def test_a_trained_head_works_without_gradients_and_without_supervision() -> None:
    head = TrainedHead()
    hidden, labels = hidden_and_labels(2, 6)
    with torch.no_grad():
        total, losses = caption_cross_entropy(hidden, labels, head, head_is_trained=True)
    assert not total.requires_grad
    with_gradients, same = caption_cross_entropy(hidden, labels, head, head_is_trained=True)
    torch.testing.assert_close(total, with_gradients.detach())
    torch.testing.assert_close(losses, same)
    nothing, none = caption_cross_entropy(
        hidden, torch.full_like(labels, IGNORE_INDEX), head, head_is_trained=True
    )
    nothing.backward()
    assert nothing.item() == 0
    assert len(none) == 0
