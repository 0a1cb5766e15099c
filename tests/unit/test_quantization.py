"""Numbers in 8 and 4 bits."""

from __future__ import annotations

import pytest
import torch

from vlm_bridge.data_pipeline.features import to_int8
from vlm_bridge.formats import GROUP, from_int4, to_int4


@pytest.fixture
def values() -> torch.Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-6, 1.0, 300.0])[:, None]
    return torch.randn(3, 4 * GROUP, generator=generator) * sizes


def test_int8_is_off_by_half_a_scale(values: torch.Tensor) -> None:
    levels, scales = to_int8(values)
    assert (levels.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert ((levels * scales - values).abs() <= scales * 0.5001).all()
    torch.testing.assert_close((levels * scales).abs().amax(-1), values.abs().amax(-1))


def test_int4_packs_two_a_byte_and_keeps_the_largest_of_each_group(values: torch.Tensor) -> None:
    packed, scales = to_int4(values)
    assert (packed.shape, packed.dtype) == ((3, 2 * GROUP), torch.uint8)
    assert (scales.shape, scales.dtype) == ((3, 4), torch.bfloat16)
    restored = from_int4(packed, scales).unflatten(-1, (-1, GROUP))
    groups = values.unflatten(-1, (-1, GROUP))
    assert ((restored - groups).abs() <= scales.float().abs()[..., None] * 1.01).all()
    largest = groups.abs().argmax(-1, keepdim=True)
    kept = restored.gather(-1, largest)
    torch.testing.assert_close(kept, groups.gather(-1, largest), rtol=2**-8, atol=0)


def test_levels_and_zeros_stay_equal() -> None:
    exact = torch.arange(-8.0, 8.0).repeat(2, GROUP // 16) * 0.25
    assert torch.equal(from_int4(*to_int4(exact)), exact)
    zeros = torch.zeros(2, GROUP)
    assert torch.equal(from_int4(*to_int4(zeros)), zeros)
    levels, scales = to_int8(zeros)
    assert torch.equal(levels * scales, zeros)
