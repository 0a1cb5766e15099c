"""The demo page of a tiny captioner, served on a free port by a thread of the test, or by a process of its own."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from captioners import tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.demo.service import CaptionService


def tiny_service(vision_encoder: Path, language_model: Path) -> CaptionService:
    recipe = tiny_recipe(
        vision_encoder, language_model, decode={"min_new_tokens": 3, "max_new_tokens": 6}
    )
    return CaptionService(Captioner(tiny_captioner(recipe), recipe), "runs/tiny")


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def served(service: CaptionService, **options) -> Iterator[str]:
    """Serve the page of a service; gives its address."""
    from vlm_bridge.demo.server import Demo

    demo = Demo(service, **options)
    try:
        yield demo.address
    finally:
        demo.close()


if (
    __name__ == "__main__"
):  # python demo_server.py VISION_ENCODER LANGUAGE_MODEL: says its address and serves
    from vlm_bridge.demo.server import Demo, serve

    serve(Demo(tiny_service(*map(Path, sys.argv[1:]))))
