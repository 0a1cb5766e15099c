"""A tiny captioner behind the demo, and images for it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.demo.service import CaptionService


def tiny_service(vision_encoder: Path, language_model: Path) -> CaptionService:
    decode = {"min_new_tokens": 3, "max_new_tokens": 6}
    recipe = tiny_recipe(vision_encoder, language_model, decode=decode)
    return CaptionService(Captioner(tiny_captioner(recipe), recipe), "runs/tiny")


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Return a random image that depends on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
