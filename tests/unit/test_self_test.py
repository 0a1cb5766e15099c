"""The self-test of `vlm-bridge doctor`: it passes here, and fails where a library does not do its part."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationMixin

from vlm_bridge.model_architecture.self_test import SYSTEMS, self_test


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_trains_and_captions(system: str) -> None:
    before = torch.get_rng_state()
    self_test(system)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_generate_that_refuses_is_found(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("The following model_kwargs are not used by the model")

    monkeypatch.setattr(GenerationMixin, "generate", refuse)
    with pytest.raises(ValueError, match="model_kwargs"):
        self_test(system)


def test_a_step_that_changes_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    with pytest.raises(RuntimeError, match="changed no weight"):
        self_test("lite")
