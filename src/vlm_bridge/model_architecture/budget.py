"""Parameter counts of a recipe, from shapes alone (everything stays on the meta device)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlm_bridge.configuration import Recipe
from vlm_bridge.model_architecture.captioner import build_captioner


@dataclass(frozen=True)
class Component:
    """A part of a captioner; only the bridge starts from random weights."""

    name: str
    role: str
    parameters: int
    trainable: int
    pretrained: bool


@dataclass(frozen=True)
class Budget:
    """Components of a captioner, tokens x width of its image features, and its soft tokens."""

    components: list[Component]
    features_shape: list[int]
    soft_tokens: int

    @property
    def trainable_share(self) -> float:
        total = sum(component.parameters for component in self.components)
        return sum(component.trainable for component in self.components) / total

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "trainable_share": self.trainable_share}


def budget_of(recipe: Recipe) -> Budget:
    """Count the parameters of a recipe's parts."""
    model: Any = build_captioner(recipe, meta=True)
    components = []
    for role, name in (
        ("vision_encoder", recipe.vision_encoder.name),
        ("bridge", recipe.bridge.kind),
        ("language_model", recipe.language_model.name),
    ):
        parameters = list(getattr(model, role).parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        components.append(Component(name, role, total, trainable, pretrained=role != "bridge"))
    encoder = model.vision_encoder
    return Budget(components, [encoder.num_tokens, encoder.embed_dim], model.bridge.num_soft_tokens)
