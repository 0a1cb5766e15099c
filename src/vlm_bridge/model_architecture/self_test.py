"""Tiny captioners of the three systems, by which `vlm-bridge doctor` tests the installed torch and transformers."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from vlm_bridge.configuration import DecodeSettings, recipe_from_dict
from vlm_bridge.model_architecture.captioner import CaptionModel, build_bridge
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.trainable import choose_trainable
from vlm_bridge.model_architecture.vision_encoder import HuggingFaceVisionEncoder

SYSTEMS = {"lite": "deep_prefix", "dinov2-gemma": "cross_attention", "pvt-blip": "projection"}
"""Each with its kind of bridge."""
START, EOS, SIDE = 1, 2, 32


def self_test(system: str) -> None:
    """Build a tiny captioner of a system's kind, train its bridge for one step and caption an image.

    Raises:
        Exception: an installed library raised it.
        RuntimeError: the step changed no weight, or there is no caption.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _tiny_captioner(system)
        before = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
        features = model.encode_images([Image.new("RGB", (SIDE, SIDE), "red")])
        ids = torch.tensor([[START, 3, 4, 5]])
        labels = torch.tensor([[3, 4, 5, EOS]])
        optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=1e-2)
        model.train()
        loss = model.caption_loss(
            ids, labels, torch.ones_like(ids), model.image_inputs(features)
        ).total
        loss.backward()
        optimizer.step()
        model.eval()
        (caption,) = model.generate(
            features, [START], DecodeSettings(num_beams=2, max_new_tokens=3, min_new_tokens=3)
        )
    if all(
        torch.equal(tensor, before[name]) for name, tensor in model.trained_state_dict().items()
    ):
        raise RuntimeError("a training step changed no weight")
    if not loss.isfinite() or len(caption.ids) != 3:
        raise RuntimeError(
            f"a training step had the loss {loss.item()}, a caption of 3 tokens {len(caption.ids)}"
        )


def _tiny_captioner(system: str) -> CaptionModel:
    from transformers import (
        BlipTextConfig,
        BlipTextLMHeadModel,
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**sizes, "vocab_size": 16, "num_key_value_heads": 1, "head_dim": 8}
    if system == "lite":
        causal_lm: Any = LlamaForCausalLM(LlamaConfig(**text))
    elif system == "dinov2-gemma":
        causal_lm = Gemma2ForCausalLM(Gemma2Config(**text, query_pre_attn_scalar=8))
    else:
        tokens: dict[str, Any] = {
            "bos_token_id": START,
            "eos_token_id": EOS,
            "sep_token_id": EOS,
            "pad_token_id": 0,
        }
        blip = BlipTextConfig(
            **sizes, **tokens, vocab_size=16, encoder_hidden_size=16, is_decoder=True
        )
        causal_lm = BlipTextLMHeadModel(blip)
    vision = ViTModel(ViTConfig(**sizes, image_size=SIDE, patch_size=16))
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    encoder = HuggingFaceVisionEncoder(vision.eval(), processor, SIDE)
    language_model = LanguageModel(causal_lm.eval(), None)
    language_model.start_id, language_model.eos_id = START, EOS
    heads = {} if system == "pvt-blip" else {"num_heads": 2}
    recipe = recipe_from_dict({"bridge": {"kind": SYSTEMS[system], **heads}})
    bridge = build_bridge(
        recipe.bridge, encoder.embed_dim, language_model.shape, encoder.num_tokens
    )
    model = CaptionModel(encoder, language_model, bridge, standardize=False)
    choose_trainable(model, {"bridge.*": None})
    return model.eval()
