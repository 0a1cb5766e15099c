"""Tiny captioners for tests: a few thousand parameters, and bridges that look trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from tiny_models import seeded
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.data_pipeline.loader import PackedBatch
from vlm_bridge.model_architecture.bridges import ImageInputs, build_bridge
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.model_architecture.language_model import LanguageModel

RESAMPLER: dict[str, Any] = {"num_queries": 3, "depth": 1, "width": 16, "num_heads": 4}
RESAMPLER["position_embeddings"] = True
BRIDGES: dict[str, dict[str, Any]] = {
    "prefix": {"kind": "prefix", **RESAMPLER},
    "cross_attention": {"kind": "cross_attention", "num_heads": 4},
    "deep_prefix": {"kind": "deep_prefix", **RESAMPLER},
    "projection": {"kind": "projection", "projection": "mlp", "position_embeddings": True},
}
# Bridges that enter the second of two layers.
ENTERING_ABOVE = {
    f"{kind}_above": {**BRIDGES[kind], "enter_at_layer": 1}
    for kind in ("cross_attention", "deep_prefix")
}
LANGUAGE_MODELS = ("llama", "gemma2", "gpt2")
CROSS_ATTENDING = ("blip", "bert", "cross_gpt2")
# Every bridge with every kind of language model that it can speak to, and one where any will do.
SYSTEMS = [
    (bridge, language_model)
    for bridge in (*BRIDGES, *ENTERING_ABOVE)
    for language_model in (CROSS_ATTENDING if bridge == "projection" else LANGUAGE_MODELS)
]
SPEAKS_TO = {bridge: "bert" if bridge == "projection" else "llama" for bridge in BRIDGES}
TOY_START, TOY_EOS = 1, 2


def tiny_recipe(
    vision_encoder: Path,
    language_model: Path,
    bridge: str = "prefix",
    dtype: str = "float32",
    **changes: Any,
) -> Recipe:
    """A float32 recipe of two folders of tiny models; ``changes`` are keys of the recipe."""
    return recipe_from_dict(
        {
            "vision_encoder": {"name": str(vision_encoder)},
            "language_model": {"name": str(language_model), "dtype": dtype},
            "bridge": {**BRIDGES, **ENTERING_ABOVE}[bridge],
            "amp_dtype": "float32",
            "num_workers": 0,
            **changes,
        }
    )


def places_of_run(root: Path, name: str, data_dir: Path) -> dict[str, str]:
    """Recipe keys: where a run reads and writes; runs below one root share their features."""
    return {
        "data_dir": str(data_dir),
        "checkpoint_dir": str(root / name / "checkpoints"),
        "log_dir": str(root / name / "logs"),
        "feature_cache": str(root / "features"),
    }


def tiny_captioner(recipe: Recipe) -> CaptionModel:
    """Return the captioner of a recipe with a bridge that is random, not the identity."""
    model = build_captioner(recipe)
    randomise(model.bridge)
    return model


def randomise(bridge: nn.Module, std: float = 0.3) -> None:
    """Give every weight a part in the output (some start at zero), the same on every run."""
    with seeded(1), torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(std * torch.randn_like(parameter))


def random_features(model: CaptionModel, num_images: int) -> torch.Tensor:
    """Features [num_images, N, D] as the captioner's encoder might give them."""
    encoder: Any = model.vision_encoder
    with seeded(2):
        return torch.randn(num_images, encoder.num_tokens, encoder.embed_dim)


def caption_loss(model: CaptionModel, batch: PackedBatch, features_bnd: torch.Tensor):
    """Return the loss of a packed batch; ``features_bnd`` holds all images."""
    ids, labels, segments = map(torch.from_numpy, (batch.input_ids, batch.labels, batch.segments))
    return model.caption_loss(
        ids, labels, segments, model.image_inputs(features_bnd[batch.image_indices])
    )


def generated(
    model: CaptionModel, features_bnd: torch.Tensor, *arguments: Any, **named: Any
) -> tuple[list[list[int]], list[float]]:
    """Token ids and scores of the captions that `CaptionModel.generate` finds."""
    captions = model.generate(features_bnd, *arguments, **named)
    return [caption.ids for caption in captions], [caption.score for caption in captions]


def what_is_read(image: ImageInputs, width: int = 32, length: int = 4) -> torch.Tensor:
    """Return what a language model reads of each image [B, ...]; of an edit, some edited text."""
    if image.edit is not None:
        with seeded(8):
            text = torch.randn(1, length, width).expand(image.num_images, -1, -1)
        return image.edit(text)
    if image.key_value_prefix is not None:
        return image.key_value_prefix.states
    (read,) = (x for x in (image.soft_tokens, image.encoder_hidden_states) if x is not None)
    return read


class ToyEncoder(nn.Module):
    """Not an encoder at all: two tokens of four numbers, for captioners that are given features."""

    embed_dim, num_tokens, grid = 4, 2, (1, 2)


def toy_captioner(bridge: str, vocabulary: int = 7) -> CaptionModel:
    """A captioner whose language model knows so few tokens that all of its captions can be listed.

    Large weights make some captions much likelier than others and end them at different lengths.
    """
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
        "initializer_range": 0.8, "bos_token_id": TOY_START, "eos_token_id": TOY_EOS,
        "pad_token_id": TOY_EOS,
    }  # fmt: skip
    with seeded(66 if bridge == "projection" else 5):  # whose captions end at different lengths
        if bridge == "projection":
            config = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
            causal_lm: Any = BertLMHeadModel(config).eval()
        else:
            causal_lm = LlamaForCausalLM(LlamaConfig(**sizes))
    tokenizer = SimpleNamespace(bos_token_id=TOY_START, eos_token_id=TOY_EOS, cls_token_id=None)
    language_model = LanguageModel(causal_lm, tokenizer).requires_grad_(False)
    recipe = recipe_from_dict({"bridge": BRIDGES[bridge]})
    with seeded(4):
        trained = build_bridge(
            recipe.bridge, ToyEncoder.embed_dim, language_model.shape, ToyEncoder.num_tokens
        )
    randomise(trained, std=0.5)
    return CaptionModel(ToyEncoder(), language_model, trained, standardize=False).eval()
