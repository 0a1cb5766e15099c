"""Records hold features as exactly as their format promises."""

from __future__ import annotations

import pytest
import torch

from vlm_bridge.data_pipeline.feature_format import FeatureFormat

TOKENS, DIM = 5, 12


def features(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(7, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


def round_trip(values: torch.Tensor, dtype) -> torch.Tensor:
    format = FeatureFormat(TOKENS, DIM, dtype)
    records = format.pack(values)
    assert records.shape == (len(values), format.record_bytes)
    return format.unpack(records)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_are_stored_as_they_are(dtype: str) -> None:
    values = features()
    assert torch.equal(round_trip(values, dtype), values.to(getattr(torch, dtype)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_is_off_by_half_a_step_of_each_token(scale: float) -> None:
    values = (
        features(scale) * torch.logspace(-3, 3, TOKENS)[:, None]
    )  # tokens of very different size
    restored = round_trip(values, "int8")
    half_a_step = values.abs().amax(-1, keepdim=True) / 127 / 2
    assert restored.dtype == torch.float32
    assert ((restored - values).abs() <= half_a_step * 1.001).all()


def test_a_token_of_zeros_stays_one() -> None:
    values = features()
    values[2, 1] = 0
    assert not round_trip(values, "int8")[2, 1].any()


def test_int8_takes_half_the_room() -> None:
    halves, whole, bytes_ = (
        FeatureFormat(49, 1280, d).record_bytes for d in ("float16", "float32", "int8")
    )
    assert halves == 49 * 1280 * 2
    assert whole == 2 * halves
    assert bytes_ == 49 * (1280 + 4)


def test_no_images_are_no_records() -> None:
    assert round_trip(features()[:0], "int8").shape == (0, TOKENS, DIM)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError, match="do not fit into float16"):
        round_trip(features(1e5), "float16")
    assert torch.isfinite(round_trip(features(1e5), "bfloat16")).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_what_is_no_number_is_refused(dtype: str) -> None:
    values = features()
    values[1, 2, 3] = float("nan")
    with pytest.raises(OverflowError, match="not finite"):
        round_trip(values, dtype)
