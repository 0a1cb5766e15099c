"""Small image files of every format."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from pillow_heif import register_heif_opener


def noise(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def several(mode: str = "RGB", **options: Any) -> dict[str, Any]:
    return {"save_all": True, "append_images": [noise(1).convert(mode)], **options}


DEEP = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved(noise(), "JPEG", comment=b"c" * 999, icc_profile=b"p" * 3000),
    "jpeg progressive": lambda: saved(noise(), "JPEG", progressive=True, quality=30),
    "jpeg gray": lambda: saved(noise().convert("L"), "JPEG"),
    "jpeg cmyk": lambda: saved(noise().convert("CMYK"), "JPEG"),
    "jpeg restarts": lambda: saved(noise(), "JPEG", restart_marker_blocks=1),
    "mpo": lambda: saved(noise(), "MPO", **several()),
    "png": lambda: saved(noise(), "PNG"),
    "png one bit": lambda: saved(noise().convert("1"), "PNG"),
    "png gray alpha": lambda: saved(noise().convert("LA"), "PNG"),
    "png palette": lambda: saved(noise().quantize(16), "PNG", transparency=3),
    "png 16 bits": lambda: saved(DEEP, "PNG"),
    "apng": lambda: saved(noise(), "PNG", **several()),
    "gif": lambda: saved(noise().quantize(64), "GIF", comment=b"words" * 99),
    "gif animated": lambda: saved(noise(), "GIF", **several(transparency=0)),
    "webp": lambda: saved(noise(), "WEBP", icc_profile=b"p" * 99, xmp=b"x" * 99),
    "webp lossless": lambda: saved(noise().convert("RGBA"), "WEBP", lossless=True, exact=True),
    "webp animated": lambda: saved(noise(), "WEBP", **several(lossless=True)),
    "bmp": lambda: saved(noise(), "BMP"),
    "tiff": lambda: saved(noise(), "TIFF"),
    "tiff jpeg": lambda: saved(noise(), "TIFF", compression="jpeg"),
    "tiff deflate": lambda: saved(noise().quantize(9), "TIFF", compression="tiff_deflate"),
    "tiff fax": lambda: saved(noise().convert("1"), "TIFF", compression="group4"),
    "tiff float": lambda: saved(noise().convert("F"), "TIFF"),
    "tiff alpha, pages": lambda: saved(noise().convert("RGBA"), "TIFF", **several()),
    "bigtiff": lambda: saved(noise(), "TIFF", big_tiff=True),
    "avif": lambda: saved(noise(), "AVIF"),
    "heif": lambda: saved(noise(), "HEIF"),
    "jpeg 2000": lambda: saved(noise(), "JPEG2000"),
}
