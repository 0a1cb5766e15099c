"""PVT-Tiny with CBAM, the vision encoder of the pvt-blip system's original code.

A pyramid of four stages as PVTv2-B0's (Wang et al. 2022) without the convolutions in its
feed-forward layers. Behind every block stands a Convolutional Block Attention Module (Woo et al.
2018). Parameters have the original's names, so that its weights load without renaming. As
published: 3,326,160 parameters, 48,240 of them CBAM's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vlm_bridge.model_architecture.tensor_files import CONFIG_NAME, write_folder
from vlm_bridge.parsing import parse_json

PVT_CBAM = "pvt_cbam"  # `model_type` in the config.json of its folders
# Of the four stages; every published PVT (Wang et al. 2021, 2022) has these heads and reductions.
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)
PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride
MLP_RATIO = 4
CBAM_REDUCTION, CBAM_KERNEL = 8, 7
Size = tuple[int, int]


@dataclass(frozen=True)
class PvtCbamConfig:
    """Sizes of the network; the defaults are the original's.

    Attributes:
        cbam: `sequence` has CBAM as the original: its spatial attention is a Conv1d over the
            tokens in their order. None has no CBAM.
        image_size: default side of an image, in pixels.
    """

    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    cbam: Literal["sequence"] | None = None
    image_size: int = 384

    model_type = PVT_CBAM

    @classmethod
    def from_folder(cls, folder: Path) -> PvtCbamConfig:
        """Read the config.json of a folder. Raises OSError, ValueError or LookupError."""
        values = parse_json((folder / CONFIG_NAME).read_bytes())
        if values["cbam"] not in (None, "sequence") or len(values["depths"]) != 4:
            raise ValueError(f"{folder / CONFIG_NAME} has no cbam or depths of a PVT with CBAM")
        sizes = tuple(values["hidden_sizes"]), tuple(values["depths"])
        return cls(*sizes, values["cbam"], values["image_size"])

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> PvtCbamConfig:
        """Read the sizes from a state dict. Raises LookupError or ValueError."""
        widths = tuple(state[f"stage{stage}.0.norm1.weight"].shape[0] for stage in range(1, 5))
        check_heads(widths)
        depths = tuple(
            len({name.split(".")[1] for name in state if name.startswith(f"stage{stage}.")})
            for stage in range(1, 5)
        )
        has_cbam = any(".cbam." in name for name in state)
        return cls(widths, depths, "sequence" if has_cbam else None)


def check_heads(widths: Sequence[int]) -> None:
    """Raise ValueError if widths of stages are not in the proportion of every published PVT."""
    if any(width != widths[0] * heads for width, heads in zip(widths, HEADS, strict=True)):
        raise ValueError(
            f"no tensor tells the attention heads of a PVT of widths {list(widths)}: name a model "
            "of this shape with pvt (--pvt)"
        )


class PvtCbam(nn.Module):
    """Images [B, 3, h, w], normalized by ImageNet's statistics -> a map [B, D, h/32, w/32].

    `norm` belongs to the original's state dict and is not applied there either.
    """

    def __init__(self, config: PvtCbamConfig):
        super().__init__()
        self.config = config
        channels = 3
        for stage, width in enumerate(config.hidden_sizes):
            blocks = [Block(config, stage) for _ in range(config.depths[stage])]
            self.add_module(f"patch{stage + 1}", OverlapPatches(channels, width, *PATCHES[stage]))
            self.add_module(f"stage{stage + 1}", nn.ModuleList(blocks))
            channels = width
        self.norm = nn.LayerNorm(channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        map_bdhw = pixels_bchw
        for stage in range(1, 5):
            map_bdhw = self.get_submodule(f"patch{stage}")(map_bdhw)
            size = (map_bdhw.shape[2], map_bdhw.shape[3])
            tokens_bnd = map_bdhw.flatten(2).transpose(1, 2)
            for block in self.get_submodule(f"stage{stage}").children():
                tokens_bnd = block(tokens_bnd, size)
            map_bdhw = tokens_bnd.transpose(1, 2).unflatten(2, size)
        return map_bdhw

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: a folder that `vision_encoder.name` may name."""
        config = {"model_type": PVT_CBAM, **asdict(self.config)}
        write_folder(Path(folder), config, self.state_dict())


class OverlapPatches(nn.Module):
    """A strided convolution and a layer norm over channels (Wang et al. 2022)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, map_bchw: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(map_bchw).movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A pre-norm transformer block; CBAM's output is added to its own."""

    def __init__(self, config: PvtCbamConfig, stage: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(width)
        self.attn = ReducedAttention(width, HEADS[stage], REDUCTIONS[stage])
        self.norm2 = nn.LayerNorm(width)
        wide, narrow = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=wide, gelu=nn.GELU(), fc2=narrow))
        self.cbam = Cbam(width) if config.cbam else None

    def forward(self, x_bnd: torch.Tensor, size: Size) -> torch.Tensor:
        x_bnd = x_bnd + self.attn(self.norm1(x_bnd), size)
        x_bnd = x_bnd + self.mlp(self.norm2(x_bnd))
        return x_bnd if self.cbam is None else x_bnd + self.cbam(x_bnd)


class ReducedAttention(nn.Module):
    """Attention to a grid that is ``reduction`` times smaller (Wang et al. 2021)."""

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = nn.Conv2d(width, width, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else None
        self.proj = nn.Linear(width, width)

    def forward(self, x_bnd: torch.Tensor, size: Size) -> torch.Tensor:
        read_bmd = x_bnd
        if self.sr is not None and self.norm is not None:
            reduced_bdhw = self.sr(x_bnd.transpose(1, 2).unflatten(2, size))
            read_bmd = self.norm(reduced_bdhw.flatten(2).transpose(1, 2))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(x_bnd), *self.kv(read_bmd).chunk(2, dim=-1))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Cbam(nn.Module):
    """Scale features by channel attention, then by spatial attention (Woo et al. 2018).

    Each is a sigmoid of what a small network makes of means and maxima.
    """

    def __init__(self, width: int):
        super().__init__()
        hidden = max(1, width // CBAM_REDUCTION)
        shrink, grow = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        conv = nn.Conv1d(2, 1, CBAM_KERNEL, padding=CBAM_KERNEL // 2, bias=False)
        self.ca = nn.ModuleDict({"fc": nn.Sequential(shrink, nn.ReLU(), grow)})
        self.sa = nn.ModuleDict({"conv": conv})

    def forward(self, x_bnd: torch.Tensor) -> torch.Tensor:
        channels = self.ca["fc"]
        x_bnd = x_bnd * (channels(x_bnd.mean(1)) + channels(x_bnd.amax(1))).sigmoid()[:, None]
        pooled_b2n = torch.stack((x_bnd.mean(dim=2), x_bnd.amax(dim=2)), dim=1)
        return x_bnd * self.sa["conv"](pooled_b2n).squeeze(1).sigmoid()[..., None]


def image_processor(folder: Path | None = None, resample: str | None = None) -> Any:
    """Return PVT's image processor: resize to a square, ImageNet's mean and standard deviation.

    Args:
        folder: whose settings it has; None has bicubic resampling to 384 px.
        resample: `bilinear` or `bicubic` in the place of the settings' own.
    """
    from transformers import PvtImageProcessorPil

    options: dict[str, Any] = {"resample": Image.Resampling[resample.upper()]} if resample else {}
    if folder is not None:
        return PvtImageProcessorPil.from_pretrained(folder, **options)
    size = {"height": PvtCbamConfig.image_size, "width": PvtCbamConfig.image_size}
    options.setdefault("resample", Image.Resampling.BICUBIC)
    return PvtImageProcessorPil(size=size, **options)
