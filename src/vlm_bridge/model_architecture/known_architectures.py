"""Architectures of published models that recipes name: `info` counts them without a network and without weights.

They are used only where no weights are read. Sources are the models' own `config.json` and, for the size of
pictures, `preprocessor_config.json`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

SMOLLM2 = "smollm2-135m-instruct"


class Architecture(NamedTuple):
    """A transformers configuration and, for vision encoders, the side in pixels that their processor crops to."""

    config: Any
    image_size: int | None = None


def known_architecture(name: str) -> Architecture | None:
    """The architecture of a published model, or None for a name that is not in the table."""
    build = _ARCHITECTURES.get(name)
    return build() if build else None


def _smollm2_135m() -> Architecture:
    """Ben Allal et al. 2025."""
    from transformers import LlamaConfig

    return Architecture(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        )
    )  # fmt: skip


def _gemma2_2b() -> Architecture:
    """Gemma Team 2024, table 1."""
    from transformers import Gemma2Config

    return Architecture(
        Gemma2Config(
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
            sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
            max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def _dinov2_large() -> Architecture:
    """Oquab et al. 2024: ViT-L/14; its position embeddings are those of 518 px, its processor crops to 224."""
    from transformers import Dinov2Config

    config = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
    )
    return Architecture(config, image_size=224)


def _pvt_v2(hidden_sizes: list[int]) -> Architecture:
    """Wang et al. 2022, table 1; B0 and B1 differ in their widths only."""
    from transformers import PvtV2Config

    config = PvtV2Config(
        hidden_sizes=hidden_sizes,
        depths=[2, 2, 2, 2],
        num_attention_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
    )
    return Architecture(config, image_size=224)


def _pvt_tiny() -> Architecture:
    """Wang et al. 2021, table 1."""
    from transformers import PvtConfig

    config = PvtConfig(
        hidden_sizes=[64, 128, 320, 512], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
    )  # fmt: skip
    return Architecture(config, image_size=224)


def _blip_base() -> Architecture:
    """Li et al. 2022: ViT-B/16 at 384 px and a BERT-base decoder, whose vocabulary [DEC] and [ENC] close."""
    from transformers import BlipConfig

    text = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    return Architecture(
        BlipConfig(text_config=text, vision_config={"image_size": 384}), image_size=384
    )


_ARCHITECTURES = {
    SMOLLM2: _smollm2_135m,
    "OpenGVLab/pvt_v2_b0": partial(_pvt_v2, [32, 64, 160, 256]),
    "OpenGVLab/pvt_v2_b1": partial(_pvt_v2, [64, 128, 320, 512]),
    "Salesforce/blip-image-captioning-base": _blip_base,
    "Zetatech/pvt-tiny-224": _pvt_tiny,
    "facebook/dinov2-large": _dinov2_large,
    "google/gemma-2-2b": _gemma2_2b,
}
