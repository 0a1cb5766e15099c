"""PVT-Tiny with CBAM, the vision encoder of the pvt-blip system's original code.

A pyramid of four stages as PVTv2-B0's (Wang et al. 2022) without the convolutions in its feed-forward layers; behind
every block a Convolutional Block Attention Module (Woo et al. 2018). Parameters have the original's names, so that
its weights load without renaming. As published: 3,326,160 parameters, 48,240 of them CBAM's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.model_architecture.tensor_files import (
    CONFIG_NAME,
    misfits,
    read_folder,
    shortened,
    write_folder,
)
from vlm_bridge.parsing import parse_json

PVT_CBAM = "pvt_cbam"
"""`model_type` in the config.json of its folders."""
PVT_HEADS = (1, 2, 5, 8)
"""Attention heads of the four stages of PVT (Wang et al. 2021) and PVTv2 (2022), and the proportion of their widths."""

Size = tuple[int, int]


@dataclass(frozen=True)
class PvtCbamConfig:
    """Sizes of the network; the defaults are the original's.

    Attributes:
        patch_sizes: kernels of the overlapping patches; strides are (kernel + 1) / 2.
        cbam: the spatial attention: `sequence`, a Conv1d over the tokens in their order (the original's); `map`, a
            Conv2d over their grid (Woo et al. 2018); None has no CBAM.
        cbam_reduction: width of a stage over the hidden width of its channel attention.
        image_size: default side of an image, in pixels.
    """

    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    num_attention_heads: tuple[int, ...] = PVT_HEADS
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    mlp_ratio: int = 4
    cbam: Literal["sequence", "map"] | None = None
    cbam_reduction: int = 8
    cbam_kernel: int = 7
    image_size: int = 384

    model_type: ClassVar[str] = PVT_CBAM

    def __post_init__(self) -> None:
        stages = (
            self.hidden_sizes, self.num_attention_heads, self.depths, self.sr_ratios, self.patch_sizes,
        )  # fmt: skip
        if {len(sizes) for sizes in stages} != {4}:
            raise ValueError("PVT has four stages: sizes of each kind must be four")
        if self.cbam not in (None, "sequence", "map"):
            raise ValueError(f"cbam is sequence, map or null, not {self.cbam!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": PVT_CBAM, **dataclasses.asdict(self)}

    @classmethod
    def from_folder(cls, folder: Path) -> PvtCbamConfig:
        """Read the config.json of a folder.

        Raises:
            OSError: it is missing.
            ValueError: it is no JSON object, or a key is unknown.
        """
        values = parse_json((folder / CONFIG_NAME).read_bytes())
        known = {field.name for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key != "model_type"
        }
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{folder / CONFIG_NAME} has unknown keys: {shortened(unknown)}")
        return cls(**given)

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> PvtCbamConfig:
        """Read the sizes from a state dict.

        Raises:
            KeyError: a tensor is missing.
            ValueError: the widths are not in PVT's proportion, and no tensor tells the attention heads.
        """
        firsts = [f"stage{number}.0." for number in range(1, 5)]
        widths = [state[f"{first}norm1.weight"].shape[0] for first in firsts]
        sizes = cls(
            hidden_sizes=tuple(widths),
            num_attention_heads=pvt_heads(widths),
            depths=tuple(_depth(state, number) for number in range(1, 5)),
            sr_ratios=tuple(
                state[f"{first}attn.sr.weight"].shape[-1]
                if f"{first}attn.sr.weight" in state
                else 1
                for first in firsts
            ),
            patch_sizes=tuple(
                state[f"patch{number}.proj.weight"].shape[-1] for number in range(1, 5)
            ),
            mlp_ratio=state[f"{firsts[0]}mlp.fc1.weight"].shape[0] // widths[0],
        )
        if not any(".cbam." in name for name in state):
            return sizes
        kernel = state[f"{firsts[0]}cbam.sa.conv.weight"]
        return dataclasses.replace(
            sizes,
            cbam="map" if kernel.ndim == 4 else "sequence",
            cbam_reduction=widths[-1] // state[f"{firsts[-1]}cbam.ca.fc.0.weight"].shape[0],
            cbam_kernel=kernel.shape[-1],
        )


def pvt_heads(widths: Sequence[int]) -> tuple[int, ...]:
    """Attention heads of a PVT with stages of these widths.

    Raises:
        ValueError: the widths are not in the proportion of every published PVT.
    """
    if [width * PVT_HEADS[0] for width in widths] != [widths[0] * heads for heads in PVT_HEADS]:
        raise ValueError(
            f"no tensor tells the attention heads of a PVT of widths {list(widths)}: name a model of this shape with "
            "pvt (--pvt)"
        )
    return PVT_HEADS


def _depth(state: Mapping[str, torch.Tensor], stage: int) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"stage{stage}.")})


class PvtCbam(nn.Module):
    """Images [B, 3, h, w], normalized by ImageNet's statistics -> a feature map [B, D, h/32, w/32].

    `norm` belongs to the original's state dict and is not applied there either.
    """

    def __init__(self, config: PvtCbamConfig):
        super().__init__()
        self.config = config
        channels = 3
        for index, width in enumerate(config.hidden_sizes):
            patch = OverlapPatches(channels, width, config.patch_sizes[index])
            blocks = [Block(config, index) for _ in range(config.depths[index])]
            self.add_module(f"patch{index + 1}", patch)
            self.add_module(f"stage{index + 1}", nn.ModuleList(blocks))
            channels = width
        self.norm = nn.LayerNorm(channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        map_bdhw = pixels_bchw
        for number in range(1, len(self.config.hidden_sizes) + 1):
            map_bdhw = self.get_submodule(f"patch{number}")(map_bdhw)
            size = (map_bdhw.shape[2], map_bdhw.shape[3])
            tokens_bnd = map_bdhw.flatten(2).transpose(1, 2)
            stage: Any = self.get_submodule(f"stage{number}")
            for block in stage:
                tokens_bnd = block(tokens_bnd, size)
            map_bdhw = tokens_bnd.transpose(1, 2).unflatten(2, size)
        return map_bdhw

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: a folder that `vision_encoder.name` may name."""
        write_folder(Path(folder), self.config.to_dict(), self.state_dict())


class OverlapPatches(nn.Module):
    """Overlapping patches (Wang et al. 2022): a strided convolution and a layer norm over channels."""

    def __init__(self, channels: int, width: int, kernel: int):
        super().__init__()
        self.proj = nn.Conv2d(
            channels, width, kernel, stride=(kernel + 1) // 2, padding=kernel // 2
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, map_bchw: torch.Tensor) -> torch.Tensor:
        patches_bdhw: torch.Tensor = self.proj(map_bchw)
        return self.norm(patches_bdhw.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A pre-norm transformer block; CBAM's output is added to its own."""

    def __init__(self, config: PvtCbamConfig, stage: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(width)
        self.attn = ReducedAttention(
            width, config.num_attention_heads[stage], config.sr_ratios[stage]
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, config.mlp_ratio)
        self.cbam = Cbam(width, config) if config.cbam else None

    def forward(self, x_bnd: torch.Tensor, size: Size) -> torch.Tensor:
        x_bnd = x_bnd + self.attn(self.norm1(x_bnd), size)
        x_bnd = x_bnd + self.mlp(self.norm2(x_bnd))
        return x_bnd if self.cbam is None else x_bnd + self.cbam(x_bnd, size)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x_bnd: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_bnd)))


class ReducedAttention(nn.Module):
    """Attention to keys and values of a grid that is ``reduction`` times smaller (Wang et al. 2021)."""

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
        key_bmd, value_bmd = self.kv(read_bmd).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(x_bnd), key_bmd, value_bmd)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Cbam(nn.Module):
    """Channel attention, then spatial attention: each scales the features by a sigmoid (Woo et al. 2018)."""

    def __init__(self, width: int, config: PvtCbamConfig):
        super().__init__()
        self.ca = ChannelAttention(width, config.cbam_reduction)
        self.sa = SpatialAttention(config.cbam_kernel, over_map=config.cbam == "map")

    def forward(self, x_bnd: torch.Tensor, size: Size) -> torch.Tensor:
        return self.sa(self.ca(x_bnd), size)


class ChannelAttention(nn.Module):
    """Scale each channel by what the mean and the maximum over all tokens say of it."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        hidden = max(1, width // reduction)
        self.fc = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, x_bnd: torch.Tensor) -> torch.Tensor:
        scores_bd = self.fc(x_bnd.mean(dim=1)) + self.fc(x_bnd.amax(dim=1))
        return x_bnd * scores_bd.sigmoid()[:, None]


class SpatialAttention(nn.Module):
    """Scale each token by a convolution over the mean and the maximum of its channels."""

    def __init__(self, kernel: int, *, over_map: bool):
        super().__init__()
        convolution = nn.Conv2d if over_map else nn.Conv1d
        self.conv = convolution(2, 1, kernel, padding=kernel // 2, bias=False)
        self.over_map = over_map

    def forward(self, x_bnd: torch.Tensor, size: Size) -> torch.Tensor:
        pooled_b2n = torch.stack((x_bnd.mean(dim=2), x_bnd.amax(dim=2)), dim=1)
        laid_out = pooled_b2n.unflatten(2, size) if self.over_map else pooled_b2n
        scores_bn = self.conv(laid_out).flatten(1)
        return x_bnd * scores_bn.sigmoid()[..., None]


class PvtCbamEncoder(nn.Module):
    """The network as a vision encoder: tokens [B, 144, 256] at 384 px, resized as BLIP does (bicubic)."""

    layers = None

    def __init__(self, model: PvtCbam, processor: Any, image_size: int):
        super().__init__()
        self.model = model
        self.processor = processor
        self.image_size = image_size
        try:
            with torch.device("meta"):
                probe = PvtCbam(model.config)(torch.empty(1, 3, image_size, image_size))
        except RuntimeError as error:
            raise ModelError(
                f"vision_encoder.image_size={image_size} does not fit PVT with CBAM: use a multiple of 64"
            ) from error
        _, self.embed_dim, rows, columns = probe.shape
        self.grid = (rows, columns)
        self.num_tokens = rows * columns

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> PvtCbamEncoder:
        """Load a folder that `PvtCbam.save_pretrained` and an image processor wrote; without weights for ``meta``.

        Raises:
            ModelError: a file is missing or damaged, tensors do not fit, or ``layers`` are asked for.
        """
        if config.layers is not None:
            raise ModelError(
                "vision_encoder.layers: PVT with CBAM has its last map only; leave it out"
            )
        folder = Path(config.name)
        try:
            sizes = PvtCbamConfig.from_folder(folder)
            with torch.device("meta"):
                model = PvtCbam(sizes)
            processor = None
            if not meta:
                _load_weights(model, read_folder(folder)[1], folder)
                processor = image_processor(folder, config.resample)
        except (OSError, ValueError, TypeError, CheckpointError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"cannot load the vision encoder {config.name!r}: {first_line}"
            ) from error
        return cls(model, processor, config.image_size or sizes.image_size)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = {"height": self.image_size, "width": self.image_size}
        return self.processor(list(images), return_tensors="pt", size=size)["pixel_values"]

    def seen_area(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return 0, 0, *size

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self.model(pixels_bchw.to(self.model.dtype)).flatten(2).transpose(1, 2)


def model_type_of(folder: str | Path) -> str:
    """The `model_type` in the config.json of a folder; empty where there is none."""
    try:
        config = parse_json((Path(folder) / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def image_processor(folder: Path | None = None, resample: str | None = None) -> Any:
    """PVT's image processor: resize to a square, ImageNet's mean and standard deviation.

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


def _load_weights(model: PvtCbam, weights: Mapping[str, torch.Tensor], where: Path) -> None:
    if problems := misfits(weights, model.state_dict()):
        raise CheckpointError(f"{where} does not fit its {CONFIG_NAME}: {shortened(problems)}")
    model.load_state_dict(weights, assign=True)
