"""Fonts of drawn text."""

from __future__ import annotations

from contextlib import suppress

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font_for(text: str, size: int) -> Font:
    """Return Pillow's own font, which has only ASCII, or a system font for other text."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
