"""Distillation start: before the caption loss, let the projection imitate the encoder that the decoder was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vlm_bridge.configuration import Recipe, VisionEncoderConfig
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import ProjectionBridge
from vlm_bridge.model_architecture.captioner import CaptionerModel
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.training_strategy.validation import Features

LOG_TIMES = 10


def distill_projection(
    model: CaptionerModel,
    recipe: Recipe,
    features: Features,
    paths: Sequence[Path],
    autocast: Callable[[], Any],
    say: Callable[[str], None],
) -> list[float]:
    """Fit the projection of a captioner to a teacher's features of the same pictures (mean squared error per number).

    The teacher's patch grid is averaged onto the student's (as Romero et al. 2015, FitNets, match a hint layer); class
    tokens have no place on it and are left out. Pictures come in an order fixed by the recipe's seed.

    Args:
        features: of the training images, or their pixels, by image index.
        paths: the training images, for the teacher.

    Returns:
        The loss of every step.

    Raises:
        ConfigurationError: there is no projection to fit, or the teacher's width is not that of its output.
    """
    settings = recipe.distillation
    assert settings is not None
    width = model.language_model.shape.cross_attention_width
    if not isinstance(model.bridge, ProjectionBridge):
        raise ConfigurationError("distillation fits a projection: it needs bridge.kind=projection")
    teacher: Any = build_vision_encoder(
        VisionEncoderConfig(settings.teacher, settings.revision, settings.image_size)
    ).to(model.device)
    if teacher.embed_dim != width:
        raise ConfigurationError(
            f"distillation.teacher has features of width {teacher.embed_dim}, the projection's output is {width}: take "
            "the vision encoder that the decoder was trained with"
        )
    say(f"distillation: {settings.steps} steps towards {settings.teacher}")
    encoder: Any = model.vision_encoder
    order = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=settings.learning_rate)
    model.train()
    losses = []
    for step in range(1, settings.steps + 1):
        chosen = order.choice(len(paths), size=min(settings.batch_size, len(paths)), replace=False)
        with torch.no_grad():
            pixels = teacher.preprocess([open_image(paths[index]) for index in chosen])
            target = on_grid(teacher(pixels.to(model.device)), teacher.grid, encoder.grid)
        student_features = model.features(torch.from_numpy(np.ascontiguousarray(features[chosen])))
        with autocast():
            student = model.image_state(student_features)
        loss = F.mse_loss(student[:, -target.shape[1] :].float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % max(1, settings.steps // LOG_TIMES) == 0:
            say(f"distillation step {step}/{settings.steps} | mean squared error {losses[-1]:.4f}")
    return losses


def on_grid(features_bnd: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Patch features [B, N, D] of one grid averaged onto another [B, rows x columns, D]; leading tokens are dropped."""
    rows, columns = grid
    map_bdhw = features_bnd[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    return F.adaptive_avg_pool2d(map_bdhw, wanted).flatten(2).transpose(1, 2)
