"""Tiny published captioners beside BLIP: GIT and vit-gpt2 with random weights.

Weights are large, so that captions differ between images and code that mixes up rows is visibly
wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as hf

from tiny_models import (
    CORPUS,
    GPT2,
    TEXT,
    VOCABULARY,
    build_tokenizer,
    clip_processor,
    save_tiny_blip,
    seeded,
)
from vlm_bridge.model_architecture.weights import word_piece_tokenizer

SIZES: dict[str, Any] = {**TEXT, "initializer_range": 0.3}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
MAX_POSITIONS = 64


def save_tiny_git(folder: Path) -> Path:
    """GitForCausalLM with CLIP's image processor, as published."""
    tokenizer: Any = word_piece_tokenizer(CORPUS, VOCABULARY)
    config = hf.GitConfig(
        **SIZES,
        vision_config={**SIZES, **IMAGE},
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(3):
        hf.GitForCausalLM(config).save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_vit_gpt2(folder: Path) -> Path:
    """ViT and GPT-2, with one token that starts, ends and pads, as in vit-gpt2.

    Its authors' generation settings lie beside it, and its image processor has its old name.
    """
    tokenizer: Any = build_tokenizer()
    eos = tokenizer.eos_token_id
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos)
    sizes = {**GPT2, "n_positions": MAX_POSITIONS, "initializer_range": 0.3}
    decoder = hf.GPT2Config(vocab_size=len(tokenizer), add_cross_attention=True, **sizes, **ends)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**SIZES, **IMAGE), decoder
    )
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = eos
    with seeded(3):
        model = hf.VisionEncoderDecoderModel(config)
    model.generation_config.update(
        max_length=5,
        num_beams=4,
        repetition_penalty=3.0,
        decoder_start_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


SAVE = {"blip": save_tiny_blip, "git": save_tiny_git, "vit-gpt2": save_tiny_vit_gpt2}
