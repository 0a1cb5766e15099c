"""The chunked cross-entropy through a frozen head is torch's own, without logits of a whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm_bridge.model_architecture import loss as loss_module
from vlm_bridge.model_architecture.loss import (
    CHUNK_POSITIONS,
    IGNORE_INDEX,
    MIN_CHUNK_POSITIONS,
    LinearHead,
    caption_cross_entropy,
)

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
    torch.testing.assert_close(
        token_losses, plain[labels.flatten() != IGNORE_INDEX], atol=1e-5, rtol=1e-5
    )
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


def linear_head(
    softcap: float | None = None, bias: bool = False, dtype=torch.float32
) -> LinearHead:
    weight = 3 * torch.randn(VOCABULARY, WIDTH)
    return LinearHead(
        weight.to(dtype), torch.randn(VOCABULARY).to(dtype) if bias else None, softcap
    )


def plain_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of token losses and gradient of the states as users write them: all logits in float32."""
    reference = hidden.detach().clone().requires_grad_()
    logits = head(reference).float()
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(total, reference)
    return total.detach(), gradient


@pytest.fixture(params=["one chunk", "several chunks", "blocks of a row"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Memory for a chunk and a block: all positions, or few of them."""
    if request.param != "one chunk":
        monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
        block_rows = 7 if request.param == "several chunks" else 0
        monkeypatch.setitem(loss_module.BLOCK_BYTES, "cpu", block_rows * VOCABULARY * 4)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_formula_of_a_linear_head_is_its_gradient(
    chunks: str, softcap: float | None, bias: bool
) -> None:
    head = linear_head(softcap, bias)
    hidden, labels = hidden_and_labels(4, 17)
    total, token_losses = caption_cross_entropy(hidden, labels, head)
    (total / 7).backward()
    plain, gradient = plain_loss(hidden, labels, head)
    torch.testing.assert_close(total.detach(), plain, atol=0, rtol=1e-5)
    torch.testing.assert_close(token_losses.sum(), plain, atol=0, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, gradient / 7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", ["stored in 16 bits", "autocast"])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_linear_head_in_16_bits(chunks: str, softcap: float | None, way: str) -> None:
    head = linear_head(softcap)
    hidden, labels = hidden_and_labels(4, 17)
    plain, gradient = plain_loss(hidden, labels, head)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            total, losses = caption_cross_entropy(hidden, labels, head)
    else:
        hidden = hidden.detach().bfloat16().requires_grad_()
        head = LinearHead(head.weight.bfloat16(), softcap=softcap)
        total, losses = caption_cross_entropy(hidden, labels, head)
    total.backward()
    assert total.dtype == losses.dtype == torch.float32
    assert hidden.grad.dtype == hidden.dtype
    assert total.item() == pytest.approx(plain.item(), rel=1e-2)
    assert (hidden.grad.float() - gradient).norm() < 1e-2 * gradient.norm()


def test_a_linear_head_is_exact_where_a_token_is_certain() -> None:
    """The gradient of a certain token is a small difference: it must not drown in the rounding of 16 bits."""
    head = LinearHead(torch.eye(VOCABULARY, WIDTH).bfloat16())
    hidden = (torch.eye(WIDTH)[:3] * 12).bfloat16()[None].requires_grad_()
    labels = torch.arange(3)[None]
    total, _ = caption_cross_entropy(hidden, labels, head)
    total.backward()
    exact = LinearHead(head.weight.double())
    plain, gradient = plain_loss(hidden.detach().double(), labels, exact)
    assert total.item() == pytest.approx(plain.item(), rel=1e-2)
    assert (hidden.grad.double() - gradient).norm() < 1e-2 * gradient.norm()


def test_a_linear_head_holds_no_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
    sizes: list[int] = []
    multiply = torch.mm

    def remember(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if right.shape[1] == VOCABULARY:
            sizes.append(len(left))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", remember)
    hidden, labels = hidden_and_labels(5, 30)
    caption_cross_entropy(hidden, labels, linear_head())[0].backward()
    assert max(sizes) == MIN_CHUNK_POSITIONS
    assert (
        sum(sizes) == (labels != IGNORE_INDEX).sum()
    )  # every supervised position once, and no other


def test_known_positions_of_a_linear_head_give_the_same_loss() -> None:
    hidden, labels = hidden_and_labels(2, 9)
    supervised = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
    found, known = (
        caption_cross_entropy(hidden, labels, linear_head(), supervised_v=positions)[1].shape
        for positions in (None, supervised)
    )
    assert found == known == supervised.shape


def test_a_linear_head_works_without_gradients_and_without_supervision() -> None:
    head = linear_head(softcap=1.5)
    hidden, labels = hidden_and_labels(2, 6)
    with torch.no_grad():
        total, losses = caption_cross_entropy(hidden, labels, head)
    assert not total.requires_grad
    torch.testing.assert_close(losses, caption_cross_entropy(hidden, labels, head)[1])
    nothing, none = caption_cross_entropy(hidden, torch.full_like(labels, IGNORE_INDEX), head)
    nothing.backward()
    assert nothing.item() == 0
    assert len(none) == 0


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
    torch.testing.assert_close(
        token_losses, plain[labels.flatten() != IGNORE_INDEX], atol=1e-5, rtol=1e-5
    )
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
    assert not any(shape[-1:] == (VOCABULARY,) for shape in kept), (
        "logits wait for the backward pass"
    )
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


def any_head(kind: str, softcap: float | None) -> tuple[LinearHead | Head | TrainedHead, bool]:
    if kind == "trained":
        return TrainedHead(), True
    return (linear_head(softcap, bias=True) if kind == "linear" else Head(softcap)), False


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["linear", "frozen", "trained"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_smoothing_are_in_the_sum_and_its_gradient(
    chunks: str, kind: str, softcap: float | None, smoothing: float, weighted: bool
) -> None:
    head, is_trained = any_head(kind, softcap)
    hidden, labels = hidden_and_labels(4, 17)
    supervised = labels.flatten() != IGNORE_INDEX
    weights = torch.randn(int(supervised.sum())) if weighted else None  # of either sign
    total, losses = caption_cross_entropy(
        hidden,
        labels,
        head,
        head_is_trained=is_trained,
        weights_v=weights,
        label_smoothing=smoothing,
    )
    (total / 7).backward()

    reference = hidden.detach().clone().requires_grad_()
    logits, targets = head(reference).flatten(0, 1)[supervised], labels.flatten()[supervised]
    plain = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = plain.sum() if weights is None else (weights * plain).sum()
    (expected / 7).backward()
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, reference.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        losses, F.cross_entropy(logits, targets, reduction="none").detach(), atol=1e-5, rtol=1e-5
    )


def test_a_kernel_is_not_asked_for_what_it_does_not_know() -> None:
    hidden, labels = hidden_and_labels(2, 6)
    head = linear_head()
    asked: list[int] = []

    def kernel(
        states: torch.Tensor, targets: torch.Tensor, _: LinearHead
    ) -> tuple[torch.Tensor, None]:
        asked.append(len(targets))
        return states.sum(), None

    caption_cross_entropy(hidden, labels, head, kernel=kernel, label_smoothing=0.1)
    caption_cross_entropy(
        hidden,
        labels,
        head,
        kernel=kernel,
        weights_v=torch.ones(int((labels != IGNORE_INDEX).sum())),
    )
    assert not asked
    caption_cross_entropy(hidden, labels, head, kernel=kernel)
    assert asked
