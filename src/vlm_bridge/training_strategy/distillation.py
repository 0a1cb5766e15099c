"""Distillation start: fit the projection to another encoder before the caption loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import prefetch
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import ProjectionBridge
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.training_strategy.validation import Features

logger = logging.getLogger(__name__)

BATCH_SIZE, STEPS, LEARNING_RATE = 32, 1000, 1e-3


def check_distillation(model: CaptionModel, teacher: str) -> None:
    """Refuse an impossible distillation before features are computed.

    Raises:
        ConfigurationError: there is no projection, or the teacher has another width.
        ModelError: the teacher cannot be found.
    """
    if not isinstance(model.bridge, ProjectionBridge):
        raise ConfigurationError("distillation fits a projection: it needs bridge.kind=projection")
    encoder: Any = build_vision_encoder(VisionEncoderConfig(name=teacher), meta=True)
    width = model.language_model.shape.cross_attention_width
    if encoder.embed_dim != width:
        raise ConfigurationError(
            f"distillation={teacher} has features of width {encoder.embed_dim}, the projection's "
            f"output is {width}: take the vision encoder that the decoder was trained with"
        )


def distill_projection(
    model: CaptionModel,
    teacher: str,
    features: Features,
    paths: Sequence[ImageFile],
    *,
    seed: int,
    num_workers: int,
) -> list[float]:
    """Fit the projection in float32 to a teacher's features of the same images.

    The loss is the mean squared error. The teacher's patch grid is averaged onto the student's, as
    Romero et al. 2015 (FitNets) match a hint layer, without class tokens.

    Args:
        features: of the training images, or their pixels, by image index.
        paths: the training images, for the teacher.

    Returns:
        The loss of every step.
    """
    tower: Any = build_vision_encoder(VisionEncoderConfig(name=teacher))
    tower, encoder = tower.to(model.device), model.vision_encoder
    logger.info(f"distillation: {STEPS} steps towards {teacher}")
    order, count = np.random.default_rng(seed), min(BATCH_SIZE, len(paths))
    batches = [order.choice(len(paths), size=count, replace=False) for _ in range(STEPS)]

    def load(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = [open_image(paths[index]) for index in indices]
        return torch.as_tensor(features[indices]), tower.preprocess(images)

    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=LEARNING_RATE)
    model.train()
    losses = []
    for of_student, pixels in prefetch(batches, load, num_workers):
        with torch.no_grad():
            target = on_grid(tower(pixels.to(model.device)), tower.grid, encoder.grid)
        student = model.image_inputs(model.features(of_student)).encoder_hidden_states
        assert student is not None, "a projection makes encoder states"
        loss = F.mse_loss(student[:, -target.shape[1] :], target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    logger.info(f"distillation: mean squared error {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


def on_grid(
    features_bnd: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]
) -> torch.Tensor:
    """Average patch features [B, N, D] of one grid onto another [B, rows x columns, D]."""
    rows, columns = grid
    map_bdhw = features_bnd[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    return F.adaptive_avg_pool2d(map_bdhw, wanted).flatten(2).transpose(1, 2)
