"""What a recipe is made of and what it needs, from shapes alone (everything stays on the meta device)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.model_architecture.loss import (
    BLOCK_BYTES_ELSEWHERE,
    CHUNK_BYTES_ELSEWHERE,
    CHUNK_POSITIONS,
)

GIB = 2**30
RUNTIME_BYTES = int(0.5 * GIB)
"""Python, torch and their libraries."""
CAPTIONING_BATCH = 16
"""Pictures captioned at a time."""
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.53}
"""Per weight of the body's linear layers; nf4 with its doubly quantised scales (Dettmers et al. 2023, QLoRA)."""
PUBLISHED_TRAINING_GB = {
    ("facebook/dinov2-large", "cross_attention", "google/gemma-2-2b"): {8: 21.0, 16: 31.0}
}
"""GPU memory by batch size that the authors of a published system give for its training."""


@dataclass(frozen=True)
class Component:
    name: str
    role: str
    parameters: int
    trainable: int
    pretrained: bool
    """False for what starts from random weights: the bridge."""


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated peak memory of training at one batch size, and what the system's authors published for it."""

    batch_size: int
    gib: float
    published_gb: float | None


@dataclass(frozen=True)
class Budget:
    """Components, and estimated peak memory in GiB of training and of captioning one batch of 16.

    Attributes:
        caption_tokens: tokens per caption, with EOS, that the estimates assume.
        training: training at the recipe's batch size and at twice that.
    """

    components: list[Component]
    features_shape: list[int]
    soft_tokens: int
    caption_tokens: int
    memory: dict[str, float]
    training: list[TrainingMemory]

    @property
    def trainable_share(self) -> float:
        return sum(c.trainable for c in self.components) / sum(
            c.parameters for c in self.components
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "trainable_share": self.trainable_share}


def budget_of(recipe: Recipe) -> Budget:
    """Count the parameters of a recipe's parts and estimate memory.

    The estimate of training adds: all weights; gradients and two Adam moments of what is trained, in float32 (12
    bytes each); what back-propagation through the frozen language model keeps (`activation_bytes`);
    and one chunk of logits with its gradient. Captions are taken to be half as long as the recipe allows.
    """
    model = build_captioner(recipe, meta=True)
    encoder: Any = model.vision_encoder
    bridge: Any = model.bridge
    parts = [
        (recipe.vision_encoder.name, "vision_encoder", encoder),
        (recipe.bridge.kind, "bridge", bridge),
        (recipe.language_model.name, "language_model", model.language_model),
    ]
    components = [
        Component(name, role, *_count(part), pretrained=role != "bridge")
        for name, role, part in parts
    ]
    fixed = RUNTIME_BYTES + 4 * components[0].parameters + _language_model_bytes(recipe, model)
    published = PUBLISHED_TRAINING_GB.get(tuple(component.name for component in components), {})  # type: ignore[arg-type]
    training = [
        TrainingMemory(
            batch_size,
            round(
                (RUNTIME_BYTES + sum(_training_bytes(recipe, model, batch_size).values())) / GIB, 2
            ),
            published.get(batch_size),
        )
        for batch_size in (recipe.batch_size, 2 * recipe.batch_size)
    ]
    captioning = fixed + 4 * components[1].parameters + _captioning_bytes(recipe, model)
    return Budget(
        components,
        features_shape=[encoder.num_tokens, encoder.embed_dim],
        soft_tokens=bridge.num_soft_tokens,
        caption_tokens=_caption_tokens(recipe),
        memory={"training_gib": training[0].gib, "captioning_gib": round(captioning / GIB, 2)},
        training=training,
    )


def training_parts(recipe: Recipe) -> dict[str, float]:
    """What training needs its memory for, in estimated bytes by name, largest first; see `budget_of`."""
    parts = _training_bytes(recipe, build_captioner(recipe, meta=True), recipe.batch_size)
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def activation_bytes(
    text_config: Any, row_tokens: int, element: int, *, checkpointing: bool = False
) -> float:
    """Bytes that back-propagation keeps per token of a frozen decoder; its matrix products keep no input.

    Counted from what autograd saves (a test counts again): per layer the float32 input of every norm, three
    values of the intermediate width, three of the attention's width, and the softmax over ``row_tokens`` scores
    per head, once in float32 and once in the working type; a softcap keeps the scores once more. With
    checkpointing, a layer's input, and all of this for one layer.

    Args:
        element: bytes of the working type.
    """
    width, layers = text_config.hidden_size, text_config.num_hidden_layers
    heads = text_config.num_attention_heads
    intermediate = getattr(text_config, "intermediate_size", None) or 4 * width
    soft_capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    norms = 4 if soft_capped else 2  # Gemma 2 also has norms behind attention and feed-forward
    attention_width = heads * (getattr(text_config, "head_dim", None) or width // heads)
    per_score = 4 + element + (element if soft_capped else 0)
    per_layer = (
        4 * norms * width
        + 3 * element * (intermediate + attention_width)
        + per_score * heads * row_tokens
    )
    return layers * element * width + per_layer if checkpointing else layers * per_layer


def _element(recipe: Recipe) -> int:
    """Bytes of the type that the language model computes in."""
    return (
        2 if recipe.autocast_dtype or recipe.language_model.dtype in ("bfloat16", "float16") else 4
    )


def _caption_tokens(recipe: Recipe) -> int:
    return max(1, recipe.max_caption_tokens // 2)


def _language_model_bytes(recipe: Recipe, model: CaptionModel) -> float:
    """Its frozen weights; embeddings and head are not quantised."""
    total, _ = _count(model.language_model)
    plain = WEIGHT_BYTES[recipe.language_model.dtype]
    layers: Any = model.language_model.causal_lm.base_model
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    return (total - linear) * plain + linear * QUANTIZED_BYTES.get(
        recipe.quantize_language_model, plain
    )


def _training_bytes(recipe: Recipe, model: CaptionModel, batch_size: int) -> dict[str, float]:
    """What training on batches of ``batch_size`` captions needs, by what needs it."""
    bridge: Any = model.bridge
    encoder: Any = model.vision_encoder
    _, trained = _count(model)
    weights = 4 * (_count(encoder)[0] + _count(bridge)[0]) + _language_model_bytes(recipe, model)
    rows = max(1, batch_size // recipe.captions_per_image)
    soft_tokens = bridge.num_soft_tokens
    row_tokens = soft_tokens + recipe.captions_per_image * _caption_tokens(recipe)
    per_token = activation_bytes(
        model.language_model.text_config,
        row_tokens,
        _element(recipe),
        checkpointing=recipe.gradient_checkpointing,
    )
    if any(parameter.requires_grad for parameter in model.language_model.parameters()):
        per_token += _trained_inputs(model.language_model.text_config, _element(recipe))
    vocabulary = model.language_model.vocab_size
    if model.language_model.linear_head is not None:
        # A chunk of logits, and what is computed of a block of it.
        chunk = min(CHUNK_BYTES_ELSEWHERE, rows * row_tokens * vocabulary * _element(recipe))
        logits = chunk + 4 * BLOCK_BYTES_ELSEWHERE
    else:  # logits, a float32 copy, its log-softmax and gradient, and the gradient in the working type
        logits = 16 * CHUNK_POSITIONS * vocabulary
    activations = rows * row_tokens * per_token
    return {
        "weights": weights,
        "gradients and optimiser": 12 * trained,
        "activations": activations,
        "logits": logits,
    }


def _trained_inputs(text_config: Any, element: int) -> float:
    """Bytes per token that the weight gradients of a trained decoder keep: the input of each matrix product."""
    width = text_config.hidden_size
    intermediate = getattr(text_config, "intermediate_size", None) or 4 * width
    return text_config.num_hidden_layers * element * (5 * width + intermediate)


def _captioning_bytes(recipe: Recipe, model: CaptionModel) -> float:
    """The KV cache of one batch of pictures, and the logits that score their captions."""
    bridge: Any = model.bridge
    shape, decode = model.language_model.shape, recipe.decode
    positions = bridge.num_soft_tokens + decode.max_new_tokens
    rows = CAPTIONING_BATCH * decode.num_beams
    cache = (
        rows
        * positions
        * shape.num_layers
        * 2
        * shape.num_key_value_heads
        * shape.head_dim
        * _element(recipe)
    )
    return (
        cache + 2 * 4 * CAPTIONING_BATCH * decode.max_new_tokens * model.language_model.vocab_size
    )


def _count(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
