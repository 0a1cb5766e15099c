"""What a bridge must know of the language model that it speaks to."""

from __future__ import annotations

from typing import Any, NamedTuple


class TextShape(NamedTuple):
    """Sizes of a decoder. ``width`` is H, of its embeddings; heads and layers are those of its self-attention.

    ``cross_attention_width`` is W, of the encoder states that its cross-attention reads; None where it has none.
    """

    width: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    cross_attention_width: int | None = None

    @classmethod
    def of(cls, text_config: Any, width: int) -> TextShape:
        """From a transformers text configuration, whatever the family leaves out."""
        heads = text_config.num_attention_heads
        return cls(
            width,
            text_config.num_hidden_layers,
            getattr(text_config, "num_key_value_heads", None) or heads,
            getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            _cross_attention_width(text_config),
        )


def _cross_attention_width(text_config: Any) -> int | None:
    if text_config.model_type == "blip_text_model":
        return text_config.encoder_hidden_size if text_config.is_decoder else None
    return text_config.hidden_size if getattr(text_config, "add_cross_attention", False) else None
