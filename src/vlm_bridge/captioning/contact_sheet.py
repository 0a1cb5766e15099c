"""Images with their captions on one PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ImageError

TILE = (288, 216)  # width and height of an image, in pixels
GAP, FONT_SIZE, LINE_HEIGHT = 16, 13, 17
BROKEN = "#ced4da"


@dataclass(frozen=True)
class SheetItem:
    """An image with its caption, and a reference and score to compare the caption with."""

    image: ImageFile | Image.Image
    caption: str
    reference: str = ""
    score: float | None = None

    def text(self) -> str:
        lines = []
        for text in (self.caption or "(no caption)", self.reference):
            lines += textwrap.wrap(text, 42, max_lines=7, placeholder=" ...")
        return "\n".join(lines if self.score is None else [*lines, f"{self.score:.3f}"])


def contact_sheet(
    items: Sequence[SheetItem], path: Path, *, columns: int = 4, title: str = ""
) -> None:
    """Write a PNG of `draw_sheet`. Raises OSError."""
    draw_sheet(items, columns=columns, title=title).save(path, "PNG")


def draw_sheet(items: Sequence[SheetItem], *, columns: int, title: str) -> Image.Image:
    """Draw images in rows of `columns`, each above its caption, reference and score.

    An image that cannot be read becomes a gray tile.
    """
    columns = max(1, min(columns, len(items)))
    rows = max(1, -(-len(items) // columns))
    texts = [item.text() for item in items]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    width, height, top = TILE[0] + GAP, TILE[1] + lines * LINE_HEIGHT + GAP, 40
    sheet = Image.new("RGB", (columns * width + GAP, top + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 10), title, "black", _font(title, 16))
    for index, (item, text) in enumerate(zip(items, texts, strict=True)):
        x, y = GAP + index % columns * width, top + index // columns * height
        tile = thumbnail(item.image, TILE) or Image.new("RGB", TILE, BROKEN)
        sheet.paste(ImageOps.pad(tile, TILE, color="#f1f3f5"), (x, y))
        pen.text((x, y + TILE[1] + 4), text, "black", _font(text, FONT_SIZE), spacing=3)
    return sheet


def thumbnail(image: ImageFile | Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """Return the image scaled to fit `size` (width, height); None if it cannot be read."""
    try:
        opened = image if isinstance(image, Image.Image) else open_image(image)
        return ImageOps.contain(opened, size, Image.Resampling.LANCZOS)
    except ImageError:
        return None


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, which has only ASCII, or a system font for other text."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
