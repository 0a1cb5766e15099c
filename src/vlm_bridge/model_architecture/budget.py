"""What a recipe is made of and what it needs, from shapes alone (everything stays on the meta device)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.loss import CHUNK_POSITIONS

GIB = 2**30
CAPTION_TOKENS = 24
"""Tokens assumed per caption, with EOS; long enough for most datasets of single sentences."""
RUNTIME_BYTES = int(0.5 * GIB)
"""Python, torch and their libraries."""


@dataclass(frozen=True)
class Component:
    name: str
    role: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Budget:
    """Components, and estimated peak memory in GiB of training and of captioning one batch of 16."""

    components: list[Component]
    features_shape: list[int]
    soft_tokens: int
    memory: dict[str, float]

    @property
    def trainable_share(self) -> float:
        return sum(c.trainable for c in self.components) / sum(c.parameters for c in self.components)

    def to_dict(self) -> dict[str, Any]:
        return {
            "components": [asdict(component) for component in self.components],
            "trainable_share": self.trainable_share,
            "features_shape": self.features_shape,
            "soft_tokens": self.soft_tokens,
            "memory": self.memory,
        }


def budget_of(recipe: Recipe) -> Budget:
    """Count the parameters of a recipe's parts and estimate memory.

    The estimate of training adds: frozen weights; weights, gradients and two Adam moments of the bridge in
    float32 (16 bytes each); the activations that back-propagation through the frozen language model keeps
    (per layer and token about 10 values of the hidden and 4 of the intermediate width, and one row of attention
    scores per head); and one chunk of float32 logits with its gradient.
    """
    model = build_captioner(recipe, meta=True)
    encoder: Any = model.vision_encoder
    bridge: Any = model.bridge
    parts = [
        (recipe.vision_encoder.name, "vision_encoder", encoder),
        (recipe.bridge.kind, "bridge", bridge),
        (recipe.language_model.name, "language_model", model.language_model),
    ]
    components = [Component(name, role, *_count(part)) for name, role, part in parts]
    soft_tokens = bridge.output_num_tokens(encoder.num_tokens)

    text = model.language_model.text_config
    width, layers = text.hidden_size, text.num_hidden_layers
    intermediate = getattr(text, "intermediate_size", None) or 4 * width
    rows = max(1, recipe.batch_size // recipe.captions_per_image)
    row_tokens = soft_tokens + recipe.captions_per_image * CAPTION_TOKENS
    element = 2 if recipe.use_amp or recipe.language_model.dtype in ("bfloat16", "float16") else 4
    per_token = 10 * width + 4 * intermediate + text.num_attention_heads * row_tokens
    activations = rows * row_tokens * layers * per_token * element
    logits = 3 * 4 * CHUNK_POSITIONS * model.language_model.vocab_size
    weight_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}.get(recipe.language_model.dtype, 2)
    frozen = 4 * components[0].parameters + weight_bytes * components[2].parameters
    trained = components[1].parameters
    beams = 16 * recipe.decode.num_beams
    shape = model.language_model.shape
    cache = (
        beams
        * (soft_tokens + recipe.decode.max_new_tokens)
        * layers
        * 2
        * shape.num_key_value_heads
        * shape.head_dim
        * element
    )
    step_logits = (
        2
        * 4
        * beams
        * recipe.decode.max_new_tokens
        * model.language_model.vocab_size
        // max(recipe.decode.num_beams, 1)
    )
    memory = {
        "training_gib": (RUNTIME_BYTES + frozen + 16 * trained + activations + logits) / GIB,
        "captioning_gib": (RUNTIME_BYTES + frozen + 4 * trained + cache + step_logits) / GIB,
    }
    features_shape = [encoder.num_tokens, encoder.embed_dim]
    return Budget(
        components, features_shape, soft_tokens, {key: round(value, 2) for key, value in memory.items()}
    )


def _count(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
