"""The systems that benchmarks run: frozen models, a bridge that looks as if it were trained, and captioned images.

`lite` is the shipped recipe with its real weights on a caption folder. `gemma-like`, `dinov2-gemma` and `pvt-blip`
have random weights of real shapes, and captions of random tokens. With ``tiny``, all are small
random models of the same kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BlipTextConfig,
    BlipTextLMHeadModel,
    Dinov2Config,
    Gemma2Config,
    LlamaConfig,
    PvtV2Config,
)

from vlm_bridge.configuration import (
    DEFAULT_RECIPE,
    Recipe,
    load_recipe,
    override_recipe,
    shipped_recipe,
)
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.features import OnTheFlyPixels
from vlm_bridge.data_pipeline.loader import CaptionFormat, TokenizedImages
from vlm_bridge.model_architecture.bridges import build_bridge
from vlm_bridge.model_architecture.captioner import (
    CaptionModel,
    build_captioner,
    caption_format,
    choose_trainable,
)
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.vision_encoder import HuggingFaceVisionEncoder
from vlm_bridge.model_architecture.weights import read_config
from vlm_bridge.training_strategy.validation import Features

SystemName = Literal["lite", "gemma-like", "dinov2-gemma", "pvt-blip"]
SYSTEMS: tuple[SystemName, ...] = ("lite", "gemma-like", "dinov2-gemma", "pvt-blip")
START, EOS = 1, 2
"""Of captions of random tokens."""


@dataclass(frozen=True)
class System:
    """A captioner, and the images whose captions one call of a variant trains on.

    Attributes:
        pixels: [3, h, w] of an image, by index: opened and decoded, or random.
        features: what the encoder made of the same pixels, [N, D] in float16: what a cache would hold.
        max_tokens: the longest caption of the whole data set, in positions; what ClipCap pads to.
    """

    recipe: Recipe
    model: CaptionModel
    data: TokenizedImages
    pixels: Features
    features: Features
    max_tokens: int


def build_system(
    name: SystemName,
    device: torch.device,
    *,
    num_captions: int,
    seed: int,
    tiny: bool = False,
    data_dir: Path | None = None,
    changes: Sequence[str] = (),
) -> System:
    """A system on a device, with features of its images computed.

    Args:
        num_captions: on how many captions to work; of whole images, chosen by ``seed``.
        data_dir: caption folder of `lite`; that of its recipe if None.
        changes: ``KEY=VALUE`` overrides of its recipe.
    """
    torch.manual_seed(seed)
    recipe = override_recipe(recipe_of(name, tiny=tiny), changes)
    if name == "lite" and not tiny:
        model, (data, pixels, max_tokens) = _lite(recipe, num_captions, seed, data_dir)
    else:
        with device:
            model = random_captioner(recipe, *random_configs(name, tiny=tiny))
        num_images = -(-num_captions // recipe.captions_per_image)
        # GroundCap's captions are paragraphs, Flickr30k's sentences.
        tokens = (4, 12) if tiny else (8, 24) if name == "pvt-blip" else (40, 120)
        data = drawn_captions(model, num_images, recipe.captions_per_image, tokens, seed)
        encoder: Any = model.vision_encoder
        shape = num_images, 3, encoder.image_size, encoder.image_size
        pixels: Any = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        max_tokens = tokens[1]
    model.to(device)  # type: ignore[arg-type]
    features: Any = encoded(model, pixels, len(data))
    if model.feature_scale is not None:
        model.feature_scale.measure(torch.from_numpy(features).to(device))
    as_if_trained(model.bridge, seed)
    return System(recipe, model.train(), data, pixels, features, max_tokens)


def recipe_of(name: SystemName, *, tiny: bool = False) -> Recipe:
    """A system's recipe: that of `lite` or of DINOv2 + Gemma 2 as shipped; ``tiny`` has a smaller bridge."""
    recipes = {"lite": "lite-flickr8k", "pvt-blip": "blip-pvt-flickr30k"}
    recipe = load_recipe(shipped_recipe(recipes.get(name, DEFAULT_RECIPE)))
    # As many captions as its `tokens_per_batch` holds: the batches of those that count captions.
    changes = ["batch_size=40"] if name == "lite" else []
    if tiny and name == "lite":
        changes += ["bridge.enter_at_layer=1", "bridge.num_queries=4", "bridge.width=32"]
        changes += ["batch_size=10", "tokens_per_batch=100"]
    elif tiny and name != "pvt-blip":
        changes += ["bridge.num_heads=4", "batch_size=4"]
    return override_recipe(recipe, changes)


def random_configs(name: SystemName, *, tiny: bool) -> tuple[Any, Any, int]:
    """Configurations of vision encoder and language model, and the side of its pictures in pixels."""
    if tiny and name == "pvt-blip":
        vision = PvtV2Config(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]
        )
        text = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
        }
        return vision, BlipTextConfig(**text, num_attention_heads=4, encoder_hidden_size=64), 64
    if tiny:
        vision = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14
        )
        sizes: dict[str, Any] = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
        if name == "lite":
            return vision, LlamaConfig(vocab_size=4096, **sizes, tie_word_embeddings=True), 56
        return vision, Gemma2Config(vocab_size=4096, query_pre_attn_scalar=16, **sizes), 56
    if name == "gemma-like":
        # DINOv2-small, and Gemma 2 cut to 301 M parameters, of which 164 M are the real vocabulary's embeddings.
        vision = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=518,
            patch_size=14,
        )
        text = Gemma2Config(
            vocab_size=256_000, hidden_size=640, intermediate_size=2560, num_hidden_layers=21, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        )  # fmt: skip
        return vision, text, 224
    recipe = recipe_of(name)
    vision_config, size = read_config(recipe.vision_encoder.name, meta=True)
    text_config, _ = read_config(recipe.language_model.name, meta=True)
    size = recipe.vision_encoder.image_size or size
    assert size is not None
    return vision_config, text_config.get_text_config(), size


def random_captioner(
    recipe: Recipe, vision_config: Any, text_config: Any, image_size: int
) -> CaptionModel:
    """A captioner of random weights, made on torch's default device; the language model's as the recipe stores them."""
    encoder = HuggingFaceVisionEncoder(AutoModel.from_config(vision_config), None, image_size)
    if isinstance(text_config, BlipTextConfig):
        text_config.is_decoder = True
        causal_lm: Any = BlipTextLMHeadModel(text_config)
    else:
        causal_lm = AutoModelForCausalLM.from_config(
            text_config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    language_model = LanguageModel(causal_lm.eval(), None)
    bridge = build_bridge(
        recipe.bridge, encoder.embed_dim, language_model.shape, encoder.num_tokens
    )
    model = CaptionModel(
        encoder.eval(), language_model, bridge, standardize=recipe.bridge.standardize_features
    )
    choose_trainable(model, recipe.trainable)
    return model


@torch.no_grad()
def as_if_trained(bridge: torch.nn.Module, seed: int) -> None:
    """Give every weight of a bridge a part in its output: a new one passes no gradient on, and does not look."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bridge.parameters():
        parameter.add_(
            0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        )


def encoded(model: CaptionModel, pixels: Features, num_images: int) -> np.ndarray:
    """Features [num_images, N, D] in float16, as a cache holds them."""
    parts = [
        model.features(
            torch.from_numpy(
                np.ascontiguousarray(pixels[np.arange(start, min(start + 8, num_images))])
            )
        )
        for start in range(0, num_images, 8)
    ]
    return torch.cat(parts).to(torch.float16).cpu().numpy()


def drawn_captions(
    model: CaptionModel, num_images: int, per_image: int, tokens: tuple[int, int], seed: int
) -> TokenizedImages:
    """Captions of random tokens and random length, all lengths of a range alike."""
    random = np.random.default_rng(seed)
    vocabulary = model.language_model.text_config.vocab_size

    def caption() -> str:
        length = int(random.integers(tokens[0], tokens[1], endpoint=True)) - 1  # without EOS
        return " ".join(map(str, random.integers(EOS + 1, vocabulary, length)))

    images = [
        CaptionedImage(Path(f"{image}.jpg"), tuple(caption() for _ in range(per_image)), str(image))
        for image in range(num_images)
    ]
    numbers: Callable[[list[str]], list[list[int]]] = lambda texts: [  # noqa: E731
        [int(word) for word in text.split()] for text in texts
    ]
    return TokenizedImages(images, CaptionFormat(numbers, start_id=START, eos_id=EOS))


def _lite(
    recipe: Recipe, num_captions: int, seed: int, data_dir: Path | None
) -> tuple[CaptionModel, tuple[TokenizedImages, Features, int]]:
    """The real models, and images of the caption folder's training split, opened and decoded when asked for."""
    images = CaptionFolder.open(data_dir or recipe.data_dir).split("train")
    model = build_captioner(recipe)
    tokenizer = model.language_model.tokenizer
    # Of the language model itself nothing is kept: a baseline without it is measured without it.
    format = dataclasses.replace(
        caption_format(model.language_model, recipe),
        encode_all=lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
    )
    max_tokens = int(TokenizedImages(images, format).caption_lengths.max())
    chosen: list[CaptionedImage] = []
    for index in np.random.default_rng(seed).permutation(len(images)):
        if sum(len(image.captions) for image in chosen) >= num_captions:
            break
        chosen.append(images[index])
    encoder: Any = model.vision_encoder
    pixels = OnTheFlyPixels(
        [image.path for image in chosen], lambda pictures: encoder.preprocess(pictures).numpy()
    )
    return model, (TokenizedImages(chosen, format), pixels, max_tokens)


def own_captioner(system: System, **bridge_options: Any) -> System:
    """The same frozen weights and images in a captioner of its own, its bridge another where options are given."""
    recipe, model = system.recipe, system.model
    vision_encoder: Any = model.vision_encoder
    causal_lm = model.language_model.causal_lm
    language_model = LanguageModel(
        causal_lm, model.language_model.tokenizer, attention=model.language_model.attention
    )
    bridge: Any = model.bridge
    if bridge_options:
        recipe = recipe.replace(bridge=recipe.bridge.replace(**bridge_options))
        bridge = build_bridge(
            recipe.bridge, vision_encoder.embed_dim, language_model.shape, vision_encoder.num_tokens
        )
        as_if_trained(bridge, recipe.seed)
    own = CaptionModel(
        vision_encoder, language_model, bridge, standardize=recipe.bridge.standardize_features
    )
    if own.feature_scale is not None and model.feature_scale is not None:
        own.feature_scale.load_state_dict(model.feature_scale.state_dict())
    choose_trainable(own, recipe.trainable)
    own.to(model.device)  # type: ignore[arg-type]
    return dataclasses.replace(system, recipe=recipe, model=own.train())
