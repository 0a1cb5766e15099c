"""The lettering of the pictures that the project draws."""

from __future__ import annotations

from contextlib import suppress

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font_for(text: str, size: int) -> Font:
    """Pillow's own font looks the same everywhere but has only ASCII: other text gets a system font."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
