"""Bridges: the part that is trained. One file a family, and a dict from kind to class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm_bridge.configuration import BridgeOptions
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.own_code import import_own


class TextShape(NamedTuple):
    """Sizes of a decoder.

    Attributes:
        width: H, of its embeddings.
        cross_attention_width: W, of the encoder states that its cross-attention reads, if any.
    """

    width: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    cross_attention_width: int | None = None


@dataclass
class KeyValuePrefix:
    """Keys and values [B, layers, 2, heads, P, head_dim] for the layers from ``first_layer`` on.

    Keys carry no rotary embedding: an image has no place in the text.
    """

    states: torch.Tensor
    first_layer: int
    layers_that_read: set[int] = field(default_factory=set)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return keys and values [B, heads, P, head_dim] of a layer, or None below the first."""
        self.layers_that_read.add(layer)
        if layer < self.first_layer:
            return None
        keys, values = self.states[:, layer - self.first_layer].unbind(1)
        return keys, values


@dataclass(frozen=True)
class ImageInputs:
    """What a language model reads of B images beside the text; None where a bridge has none of it.

    Attributes:
        num_images: B.
        soft_tokens: [B, P, H], before the text.
        key_value_prefix: keys and values that its layers attend to beside the text's own.
        encoder_hidden_states: [B, N, W], for the layers of a decoder that cross-attends.
        edit: changes text [B, T, H] as it enters layer ``edit_layer``, one position at a time.
    """

    num_images: int
    soft_tokens: torch.Tensor | None = None
    key_value_prefix: KeyValuePrefix | None = None
    encoder_hidden_states: torch.Tensor | None = None
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    edit_layer: int = 0


class Bridge(nn.Module):
    """Turn image features [B, N, D] into what the language model reads of images.

    Built from ``(options, vision_dim=D, text=TextShape, num_image_tokens=N)``, also on the meta
    device.

    Attributes:
        output: the field of `ImageInputs` that ``encode`` fills.
        first_layer: layer of the language model, from 0, below which nothing depends on the image.
        num_soft_tokens: P, soft tokens before the text; 0 for most bridges.
    """

    output: str = "soft_tokens"
    first_layer: int = 0
    num_soft_tokens: int = 0

    @property
    def shares_rows(self) -> bool:
        """Whether captions of several images may share a row: where images only edit the text."""
        return self.output == "edit"

    def encode(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Compute everything that depends on the image alone, once per image.

        An edit of the text never mixes positions: causality.
        """
        raise NotImplementedError

    def image_attention(self, features_bnd: torch.Tensor, seen_bt: torch.Tensor) -> torch.Tensor:
        """Return how each text position attends to the N image tokens, [B, T, N], not normalized.

        Args:
            features_bnd: as for ``encode``.
            seen_bt: the text [B, T, H] that enters the edit; for bridges without an edit, how much
                the language model attends to their soft tokens, prefix keys or encoder states,
                [B, T, P].

        Raises:
            ModelError: this bridge does not say.
        """
        raise ModelError(f"{type(self).__name__} has no image_attention: caption without --explain")

    def set_output_scale(self, embedding_std: float) -> None:
        """Start soft tokens at the size of the language model's embeddings."""


def entered_layer(layer: int | None, text: TextShape) -> int:
    """Return the layer at which a bridge enters; None is a third of the way up.

    Raises:
        ConfigurationError: there is no such layer.
    """
    layer = text.num_layers // 3 if layer is None else layer
    if layer >= text.num_layers:
        raise ConfigurationError(
            f"bridge.enter_at_layer={layer} is beyond the language model's last layer, "
            f"{text.num_layers - 1}"
        )
    return layer


def in_heads(x_bth: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return states [B, T, heads x head_dim] as [B, heads, T, head_dim]."""
    return x_bth.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mean_attention_weights(query_bhqd: torch.Tensor, key_bhkd: torch.Tensor) -> torch.Tensor:
    """Return the weights [B, Q, K] of scaled dot-product attention, averaged over heads."""
    scores_bhqk = query_bhqd @ key_bhkd.transpose(2, 3) * query_bhqd.shape[-1] ** -0.5
    return scores_bhqk.softmax(-1).mean(1)


# The families build on the classes above.
from vlm_bridge.model_architecture.bridges.cross_attention import CrossAttentionBridge  # noqa: E402
from vlm_bridge.model_architecture.bridges.prefix import DeepPrefixBridge, PrefixBridge  # noqa: E402
from vlm_bridge.model_architecture.bridges.projection import ProjectionBridge  # noqa: E402

BRIDGES: dict[str, type[Bridge]] = {
    "cross_attention": CrossAttentionBridge,
    "deep_prefix": DeepPrefixBridge,
    "prefix": PrefixBridge,
    "projection": ProjectionBridge,
}


def build_bridge(
    options: BridgeOptions,
    vision_dim: int,
    text: TextShape,
    num_image_tokens: int,
    *,
    meta: bool = False,
) -> Bridge:
    """Build a bridge on the CPU or the meta device. Raises ConfigurationError for its options."""
    kind: Any = BRIDGES.get(options.kind) or import_own(options.kind, Bridge)
    with torch.device("meta" if meta else "cpu"):
        return kind(options, vision_dim, text, num_image_tokens)
