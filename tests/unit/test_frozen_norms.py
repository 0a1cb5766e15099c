"""Norms of a frozen language model: transformers' own numbers, and gradients that are theirs too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vlm_bridge.configuration import LanguageModelConfig
from vlm_bridge.model_architecture import frozen_norms
from vlm_bridge.model_architecture.decoder_loading import build_language_model
from vlm_bridge.model_architecture.frozen_norms import plain_norms, quicken_norms


def frozen_norm(width: int, dtype: torch.dtype, epsilon: float = 1e-6) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, epsilon)
    norm.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(1)) / 2 + 1
    return norm.to(dtype).requires_grad_(False)


def normed(norm: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a norm makes of x, and a gradient of it."""
    x = x.detach().requires_grad_()
    y = norm(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.fixture
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The states that took the quick way."""
    calls: list[torch.Tensor] = []
    ours = frozen_norms.rms_norm

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(x)
        return ours(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen_norms, "rms_norm", counted)
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e3])
def test_output_and_gradient_are_those_of_transformers(
    dtype: torch.dtype, tolerance: float, size: float, quick_calls: list[torch.Tensor]
) -> None:
    x = (torch.randn(2, 5, 576, generator=torch.Generator().manual_seed(3)) * size).to(dtype)
    norm = frozen_norm(576, dtype)
    plain = normed(norm, x)
    quicken_norms(norm)
    quick_calls.clear()
    quick = normed(norm, x)
    assert len(quick_calls) == 1
    for ours, theirs in zip(quick, plain, strict=True):
        scale = theirs.float().abs().max().clamp_min(1e-20)
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * scale


def test_other_formulas_and_unfit_widths_keep_their_own(quick_calls: list[torch.Tensor]) -> None:
    gemma = Gemma2RMSNorm(576)
    gemma.weight.data = torch.randn(576)
    root_is_rounded = frozen_norm(2 * 7 * 43, torch.bfloat16)  # 24.536: bfloat16 has 24.5
    for norm in (gemma.requires_grad_(False), root_is_rounded):
        quicken_norms(norm)
        quick_calls.clear()
        normed(norm, torch.randn(3, len(norm.weight)).to(norm.weight.dtype))
        assert not quick_calls


def test_only_gradients_through_frozen_norms_take_the_quick_way(quick_calls: list[torch.Tensor]) -> None:
    norm = frozen_norm(64, torch.float32)
    quicken_norms(norm)
    quick_calls.clear()
    x = torch.randn(3, 64)
    norm(x)
    with torch.no_grad():
        norm(x.clone().requires_grad_())
    norm.weight.requires_grad_(True)
    norm(x.clone().requires_grad_())
    assert not quick_calls
    norm.weight.requires_grad_(False)
    norm(x.clone().requires_grad_())
    assert len(quick_calls) == 1
    with plain_norms(norm):
        norm(x.clone().requires_grad_())
    assert len(quick_calls) == 1
    norm(x.clone().requires_grad_())
    assert len(quick_calls) == 2


def test_a_loaded_language_model_has_them(tiny_llama_dir: Path, quick_calls: list[torch.Tensor]) -> None:
    config = LanguageModelConfig(name=str(tiny_llama_dir), dtype="float32")
    model = build_language_model(config).requires_grad_(False)
    embedded = model.embed(torch.randint(3, 300, (2, 9))).requires_grad_()
    quick_calls.clear()
    states = model.hidden_states(inputs_embeds=embedded)
    assert len(quick_calls) == 2 * model.shape.num_layers + 1
    (ours,) = torch.autograd.grad(states.square().sum(), embedded)
    with plain_norms(model):
        plain_states = model.hidden_states(inputs_embeds=embedded)
    (plain,) = torch.autograd.grad(plain_states.square().sum(), embedded)
    torch.testing.assert_close(states, plain_states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
