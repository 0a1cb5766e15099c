"""Which implementation of the loss runs, and that each gives the same one."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture import loss_kernels
from vlm_bridge.model_architecture.loss import (
    IGNORE_INDEX,
    LinearHead,
    caption_cross_entropy,
    frozen_head_cross_entropy,
)
from vlm_bridge.model_architecture.loss_kernels import (
    QuickestKernel,
    choose_kernel,
    liger_cross_entropy,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEAD = LinearHead(torch.linspace(-1, 1, 50 * 8).reshape(50, 8).sin())
CAPPED = LinearHead(HEAD.weight, softcap=1.5)


def test_on_a_cpu_the_choice_is_made() -> None:
    assert choose_kernel("auto", HEAD, CPU, torch.bfloat16) is None
    assert choose_kernel("own", CAPPED, CPU, torch.float32) is None
    assert choose_kernel("auto", None, CUDA, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "head", "device", "dtype", "reason"),
    [
        ("liger", HEAD, CPU, torch.float32, "CUDA"),
        ("liger", None, CUDA, torch.float32, "one matrix"),
        ("torch", None, CPU, torch.float32, "one matrix"),
        ("torch", CAPPED, CPU, torch.float32, "soft-cap"),
        ("torch", HEAD, CPU, torch.bfloat16, "16 bits"),
    ],
)
def test_what_does_not_work_is_refused_in_one_line(
    name: str,
    head: LinearHead | None,
    device: torch.device,
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", object(), raising=False)
    with pytest.raises(ConfigurationError, match=rf"^loss_kernel={name} .*{reason}[^\n]*$"):
        choose_kernel(name, head, device, dtype)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install liger-kernel"):
        choose_kernel("liger", HEAD, CUDA, torch.bfloat16)
    assert choose_kernel("auto", HEAD, CUDA, torch.bfloat16) is None
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(ConfigurationError, match=r"torch 2\.13"):
        choose_kernel("torch", HEAD, CPU, torch.float32)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_torchs_kernel_gives_our_loss_and_gradient() -> None:
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :4] = IGNORE_INDEX
    results = []
    for kernel in (None, choose_kernel("torch", HEAD, CPU, torch.float32)):
        hidden = torch.linspace(-2, 2, 3 * 7 * 8).reshape(3, 7, 8).cos().requires_grad_()
        total, _ = caption_cross_entropy(hidden, labels, HEAD, kernel=kernel)
        (total / 17).backward()
        results.append((total.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_ligers_kernel_is_called_as_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedLoss:  # with the arguments of LigerFusedLinearCrossEntropyLoss, in plain torch
        def __init__(self, *, ignore_index: int, reduction: str, softcap: float | None):
            self.of_logits = {"ignore_index": ignore_index, "reduction": reduction}
            self.softcap = softcap

        def __call__(self, lin_weight, _input, target, bias=None):
            return F.cross_entropy(
                LinearHead(lin_weight, bias, self.softcap)(_input), target, **self.of_logits
            )

    package = ModuleType("liger_kernel")
    transformers = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=FusedLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    hidden, labels = torch.randn(5, 8), torch.randint(0, 50, (5,))
    total, losses = liger_cross_entropy(hidden, labels, CAPPED)
    assert losses is None
    torch.testing.assert_close(total, frozen_head_cross_entropy(hidden, labels, CAPPED)[0])


def test_the_quickest_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = 0.0

    def kernel(name: str, seconds: float):
        def run(hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead):
            nonlocal clock
            calls.append(name)
            clock += seconds
            return frozen_head_cross_entropy(hidden, labels, head)

        return run

    monkeypatch.setattr(loss_kernels.time, "perf_counter", lambda: clock)
    quickest = QuickestKernel([kernel("slow", 2.0), kernel("quick", 1.0)])
    hidden, labels = torch.randn(4, 8, requires_grad=True), torch.randint(0, 50, (4,))
    for _ in range(2):
        total, _ = quickest(hidden, labels, HEAD)
    assert calls[-2:] == ["quick", "quick"]
    assert calls.count("slow") == loss_kernels.TIMED_RUNS + 1
    total.backward()  # what was tried left nothing in the gradient
    reference = hidden.detach().requires_grad_()
    frozen_head_cross_entropy(reference, labels, HEAD)[0].backward()
    torch.testing.assert_close(hidden.grad, reference.grad)
