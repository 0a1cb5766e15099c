"""How the features of one image lie on disk: a record of fixed size, in one of four number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vlm_bridge.quantization import to_int8

FeatureDtype = Literal["float16", "bfloat16", "int8", "float32"]
SCALE_BYTES = 4


@dataclass(frozen=True)
class FeatureFormat:
    """Features [N, D] of an image as bytes.

    Floating-point numbers are stored as they are; `int8` gives every token a float32 scale, behind the values.
    """

    num_tokens: int
    dim: int
    dtype: FeatureDtype = "float16"

    @property
    def record_bytes(self) -> int:
        """Bytes of one image."""
        if self.dtype == "int8":
            return self.num_tokens * (self.dim + SCALE_BYTES)
        return self.num_tokens * self.dim * self._torch_dtype.itemsize

    def pack(self, features_bnd: torch.Tensor) -> np.ndarray:
        """Features [B, N, D] -> records [B, ``record_bytes``] of bytes.

        Raises:
            OverflowError: a feature is not a finite number, or becomes infinite in this format.
        """
        if not torch.isfinite(features_bnd).all():
            raise OverflowError("are not finite numbers")
        if self.dtype == "int8":
            levels_bnd, scales_bn1 = to_int8(features_bnd)
            return np.concatenate([_bytes_of(levels_bnd), _bytes_of(scales_bn1)], axis=1)
        stored_bnd = features_bnd.to(self._torch_dtype)
        if not torch.isfinite(stored_bnd).all():
            raise OverflowError(f"do not fit into {self.dtype}")
        return _bytes_of(stored_bnd)

    def unpack(self, records: np.ndarray) -> torch.Tensor:
        """Records [B, ``record_bytes``] -> features [B, N, D]: in the stored type, of `int8` in float32."""
        shape = len(records), self.num_tokens, self.dim
        if self.dtype == "int8":
            num_values = self.num_tokens * self.dim
            levels_bnd = torch.from_numpy(records[:, :num_values].view(np.int8).reshape(shape))
            scales_bn = torch.from_numpy(records[:, num_values:].copy().view(np.float32))
            return levels_bnd * scales_bn[..., None]
        return (
            torch.from_numpy(records.view(f"i{self._torch_dtype.itemsize}"))
            .view(self._torch_dtype)
            .view(shape)
        )

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _bytes_of(values: torch.Tensor) -> np.ndarray:
    """A tensor [B, ...] as the bytes of each of its rows."""
    return values.contiguous().flatten(1).view(torch.uint8).cpu().numpy()
