"""Pictures with their captions on one PNG: the quickest way to see what a captioner does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.errors import ImageError
from vlm_bridge.fonts import Font, font_for

TILE_WIDTH, TILE_HEIGHT = 288, 216
GAP = 24
MAX_LINES = 7
"""Lines of one text: a caption that never stops must not push the next row off the sheet."""

BACKGROUND, MAT, BROKEN = "#ffffff", "#f1f3f5", "#ced4da"
INK, GREY, ACCENT = "#212529", "#868e96", "#1864ab"


@dataclass(frozen=True)
class SheetItem:
    """One picture to show: its file, the generated caption, and what to judge the caption by."""

    image: PictureFile
    caption: str
    reference: str | None = None
    score: float | None = None


def contact_sheet(
    items: Sequence[SheetItem], path: Path, *, columns: int = 4, title: str = ""
) -> None:
    """Write a PNG of the pictures in rows of ``columns``, each above its caption, first reference and score.

    A picture that cannot be read becomes a grey tile, so that one broken file does not cost the sheet.

    Raises:
        OSError: the file cannot be written.
    """
    columns = max(1, min(columns, len(items)))
    tiles = [_tile(item) for item in items]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heading = (
        _text_block([(title, 22, INK)], GAP + columns * (TILE_WIDTH + GAP) - 2 * GAP)
        if title
        else None
    )

    width = GAP + columns * (TILE_WIDTH + GAP)
    top = GAP + (heading.height + GAP if heading else 0)
    height = top + sum(max(tile.height for tile in row) + GAP for row in rows)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    if heading:
        sheet.paste(heading, (GAP, GAP))
    for row in rows:
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * (TILE_WIDTH + GAP), top))
        top += max(tile.height for tile in row) + GAP
    sheet.save(path, format="PNG", optimize=True)


def thumbnail(path: PictureFile, size: tuple[int, int]) -> Image.Image | None:
    """The picture scaled to fit ``size`` (width, height) in pixels; None if it cannot be read."""
    try:
        return ImageOps.contain(open_image(path), size, Image.Resampling.LANCZOS)
    except ImageError:
        return None


def _tile(item: SheetItem) -> Image.Image:
    """The picture centred on a mat of fixed size, with its texts below."""
    texts = [(item.caption or "(no caption)", 16, INK)]
    if item.reference:
        texts.append((item.reference, 14, GREY))
    if item.score is not None:
        texts.append((f"{item.score:.3f}", 14, ACCENT))
    below = _text_block(texts, TILE_WIDTH)
    tile = Image.new("RGB", (TILE_WIDTH, TILE_HEIGHT + 10 + below.height), BACKGROUND)
    picture = thumbnail(item.image, (TILE_WIDTH, TILE_HEIGHT))
    tile.paste(MAT if picture else BROKEN, (0, 0, TILE_WIDTH, TILE_HEIGHT))
    if picture:
        tile.paste(
            picture, ((TILE_WIDTH - picture.width) // 2, (TILE_HEIGHT - picture.height) // 2)
        )
    else:
        draw = ImageDraw.Draw(tile)
        centre = (TILE_WIDTH // 2, TILE_HEIGHT // 2)
        draw.text(centre, "cannot be read", fill=INK, font=ImageFont.load_default(15), anchor="mm")
    tile.paste(below, (0, TILE_HEIGHT + 10))
    return tile


def _text_block(texts: Sequence[tuple[str, int, str]], width: int) -> Image.Image:
    """Paragraphs of (text, size in pixels, colour), wrapped to ``width`` pixels."""
    lines: list[tuple[int, str, Font, str]] = []
    top = 0
    for text, size, colour in texts:
        font = font_for(text, size)
        for line in _wrap(text, font, width):
            lines.append((top, line, font, colour))
            top += round(1.3 * size)
        top += 4
    block = Image.new("RGB", (width, top), BACKGROUND)
    draw = ImageDraw.Draw(block)
    for line_top, line, font, colour in lines:
        draw.text((0, line_top), line, fill=colour, font=font)
    return block


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break at blanks, or inside a word that is wider than the line; what exceeds MAX_LINES ends in dots."""
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width:
            room = bisect_right(
                range(1, len(line) + 1), width, key=lambda n: font.getlength(line[:n])
            )
            fitting = max(1, room)
            lines.append(line[:fitting])
            line = line[fitting:]
    lines.append(line)
    return (
        lines
        if len(lines) <= MAX_LINES
        else [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-3] + "..."]
    )
