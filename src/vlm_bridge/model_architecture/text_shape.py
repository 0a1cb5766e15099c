"""What a bridge must know of the language model that it speaks to."""

from __future__ import annotations

from typing import Any, NamedTuple


class TextShape(NamedTuple):
    """Sizes of a decoder. ``width`` is H, of its embeddings; the rest is that of its self-attention."""

    width: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, text_config: Any, width: int) -> TextShape:
        """From a transformers text configuration, whatever the family leaves out."""
        heads = text_config.num_attention_heads
        return cls(
            width,
            text_config.num_hidden_layers,
            getattr(text_config, "num_key_value_heads", None) or heads,
            getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        )
