"""Numbers in 8 or 4 bits: whole levels, and a scale per row or per group of a row."""

from __future__ import annotations

import torch

GROUP = 64  # numbers of a row that share a scale in 4 bits


def to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row symmetrically (LLM.int8(), Dettmers et al. 2022).

    Values are [..., D] and finite.

    Returns:
        Levels [..., D] in int8 and scales [..., 1] in float32; the product is off by half a scale.
    """
    values = values.float()
    scales = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales).round().to(torch.int8), scales


def to_int4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each `GROUP` of a row to 16 levels, as llama.cpp's Q4_0: the largest is level -8.

    Values are [..., D] and finite, D a multiple of `GROUP`.

    Returns:
        Two levels a byte [..., D / 2] in uint8, and signed scales [..., D / `GROUP`] in bfloat16.
    """
    groups = values.float().unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).bfloat16()
    levels = (groups / scales.float()).nan_to_num().round().clamp(-8, 7)
    nibbles = (levels + 8).to(torch.uint8).flatten(-2)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales.squeeze(-1)


def from_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return values [..., D] of `to_int4`. Raises RuntimeError if shapes do not agree."""
    levels = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float() - 8
    return (levels.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)
