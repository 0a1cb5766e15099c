"""Numbers in 8 bits: whole levels from -127 to 127, and a scale per row."""

from __future__ import annotations

import torch

INT8_MAX = 127


def to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation of each row (Jacob et al. 2018, without zero points; LLM.int8(), Dettmers et al. 2022).

    Args:
        values: [..., D], finite.

    Returns:
        Levels [..., D] in int8 and scales [..., 1] in float32, a row's largest magnitude over 127. Their product is
        off by half a scale at most.
    """
    values = values.float()
    scales = (values.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales).round().to(torch.int8), scales
