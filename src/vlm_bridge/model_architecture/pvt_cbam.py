"""The networks of the pvt-blip system: PVT-Tiny with CBAM, and PVT before BLIP's text decoder.

`PvtCbam` is the encoder of the original code: a pyramid of four stages as PVTv2-B0's (Wang et al.
2022) without the convolutions in its feed-forward layers. Behind every block stands a Convolutional
Block Attention Module (Woo et al. 2018). Parameters have the original's names, so that its weights
load without renaming. As published: 3,326,160 parameters, 48,240 of them CBAM's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vlm_bridge.errors import ModelError, UsageError

PVT_CBAM = "pvt_cbam"  # `model_type` in the config.json of its folders
# Of the four stages; every published PVT (Wang et al. 2021, 2022) has these heads and reductions.
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)
PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride
MLP_RATIO = 4
CBAM_REDUCTION, CBAM_KERNEL = 8, 7
Size = tuple[int, int]
ProjectionKind = Literal["linear", "mlp", "conv3x3"]
PROMPT = "a picture of"  # what BLIP's captions continue (Li et al. 2022)
NO_REPEAT_NGRAM_SIZE = 3  # of the recipes `blip-pvt-*`
# Means and deviations by which `BlipProcessor` normalizes, and every published PVT.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    def of(cls, state: Mapping[str, torch.Tensor]) -> PvtCbamConfig:
        """Read the sizes from a state dict. Raises LookupError."""
        blocks = {tuple(name.split(".")[:2]) for name in state if name.startswith("stage")}
        stages = [f"stage{number}" for number in range(1, 5)]
        widths = tuple(state[f"{stage}.0.norm1.weight"].shape[0] for stage in stages)
        depths = tuple(sum(stage == of for of, _ in blocks) for stage in stages)
        has_cbam = any(".cbam." in name for name in state)
        return cls(widths, depths, "sequence" if has_cbam else None)


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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": PVT_CBAM, **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors", {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, meta: bool = False) -> PvtCbam:
        """Load a folder of `save_pretrained`; on the meta device, without its weights.

        Raises:
            OSError, ValueError, LookupError, RuntimeError: missing, damaged, or they do not fit.
        """
        values = json.loads(Path(folder, "config.json").read_bytes())
        sizes = {field.name: values[field.name] for field in fields(PvtCbamConfig)}
        with torch.device("meta"):
            model = cls(PvtCbamConfig(**sizes))
        if not meta:
            model.load_state_dict(load_file(Path(folder, "model.safetensors")), assign=True)
        return model


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


def image_processor(resample: str = "bicubic") -> Any:
    """Return PVT's image processor: resize to 384 x 384 px, ImageNet's mean and deviation.

    Args:
        resample: `bilinear` or `bicubic`.
    """
    from transformers import PvtImageProcessorPil

    size = {"height": PvtCbamConfig.image_size, "width": PvtCbamConfig.image_size}
    return PvtImageProcessorPil(size=size, resample=Image.Resampling[resample.upper()])


class PvtBlip(nn.Module):
    """PVT in the place of BLIP's vision encoder: takes the pixels of `BlipProcessor`.

    Its state dict is a combined file in our layout. The encoder is frozen and stays in evaluation
    mode.

    Attributes:
        visual_encoder: transformers' PvtModel or PvtV2Model, or `PvtCbam`.
        text_decoder: BlipTextLMHeadModel, which cross-attends to states [B, N, W].
        visual_proj: D -> W; None where it was never trained.
        prompt_ids: tokens of `PROMPT`, without special ones.
    """

    def __init__(
        self, visual_encoder: Any, text_decoder: Any, visual_proj: Any, prompt_ids: list[int]
    ):
        super().__init__()
        self.visual_encoder: Any = visual_encoder.requires_grad_(False)
        self.text_decoder: Any = text_decoder
        self.visual_proj: Any = visual_proj
        self.prompt_ids = prompt_ids

    def train(self, mode: bool = True) -> PvtBlip:
        super().train(mode)
        self.visual_encoder.eval()
        return self

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the states [B, N, W] that the decoder reads, of pixels as in `feature_map`."""
        if self.visual_proj is None:
            raise ModelError(
                "no projection between PVT and BLIP's decoder: fine-tune first "
                "(scripts/finetune_combined.py makes one)"
            )
        map_bdhw = self.feature_map(pixel_values)
        takes_maps = isinstance(self.visual_proj, nn.Conv2d)
        return _tokens(self.visual_proj(map_bdhw if takes_maps else _tokens(map_bdhw)))

    def feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return PVT's map [B, D, h/32, w/32] of pixels [B, 3, h, w] that `BlipProcessor` made."""
        # Renormalize in one step of double precision: rounding of pixels grows in the layers.
        statistics = torch.tensor((*CLIP, *IMAGENET), dtype=torch.float64)
        clip_mean, clip_std, mean, std = statistics[..., None, None]
        scale, shift = clip_std / std, (clip_mean - mean) / std
        pixels_bchw = torch.addcmul(shift.to(pixel_values), pixel_values, scale.to(pixel_values))
        output = self.visual_encoder(pixels_bchw.to(self.visual_encoder.dtype))
        features = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        if features.ndim == 4:
            return features
        side = isqrt(features.shape[1])  # PvtModel's tokens; a class token stands before the grid
        return features[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the decoder over captions that see images.

        Args:
            pixel_values: [B, 3, h, w] as `BlipProcessor` makes them.
            input_ids: [B, T].
            labels: [B, T], usually the input ids; the decoder shifts them. Pads are not supervised.
            encoder_hidden_states: projected images, a map [B, W, h, w] or tokens [B, N, W]; None
                makes them of the pixels.
            options: the decoder's, such as ``attention_mask`` [B, T].

        Returns:
            The decoder's output: ``loss`` (nats per token) and ``logits`` [B, T, vocabulary].
        """
        if encoder_hidden_states is None:
            if pixel_values is None:
                raise UsageError("give pixel_values, or encoder_hidden_states made of them")
            encoder_hidden_states = self.encode(pixel_values)
        if labels is not None:
            labels = labels.masked_fill(labels == self.text_decoder.config.pad_token_id, -100)
        return self.text_decoder(
            input_ids=input_ids,
            labels=labels,
            encoder_hidden_states=_tokens(encoder_hidden_states).to(self.text_decoder.dtype),
            is_decoder=True,
            **options,
        )

    @torch.no_grad()
    def generate(self, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Caption images by the decoder's own `generate`.

        Args:
            pixel_values: [B, 3, h, w] as `BlipProcessor` makes them.
            options: transformers'; `max_length` counts the start token and the prompt too.

        Returns:
            Token ids [B, T]: the start token and the caption without the prompt.
        """
        states_bnw = self.encode(pixel_values)
        config = self.text_decoder.config
        start_ids = torch.tensor([[config.bos_token_id, *self.prompt_ids]])
        input_ids = start_ids.to(pixel_values.device).repeat(len(pixel_values), 1)
        ids_bt = self.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            encoder_hidden_states=states_bnw.to(self.text_decoder.dtype),
            bos_token_id=config.bos_token_id,
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            **{"no_repeat_ngram_size": NO_REPEAT_NGRAM_SIZE, **options},
        )
        return torch.cat((ids_bt[:, :1], ids_bt[:, input_ids.shape[1] :]), dim=1)


def _tokens(features: torch.Tensor) -> torch.Tensor:
    """Return a map [B, D, h, w] as tokens [B, N, D]; tokens stay as they are."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


class MapLinear(nn.Linear):
    """A linear layer over the channels of maps [B, D, h, w]; it takes tokens [..., D] too."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            return super().forward(features.movedim(1, -1)).movedim(-1, 1)
        return super().forward(features)


def projection_for(encoder_config: Any, kind: ProjectionKind, width: int) -> nn.Module:
    """Build a random projection from an encoder's features to a width."""
    vision_dim = encoder_config.hidden_sizes[-1]
    if kind == "conv3x3":
        return nn.Conv2d(vision_dim, width, kernel_size=3, padding=1)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width))
    linear = MapLinear if encoder_config.model_type == PVT_CBAM else nn.Linear
    return linear(vision_dim, width)
