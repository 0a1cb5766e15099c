"""Draw the attention of a caption's words on one image, one panel per word."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from vlm_bridge.captioning.explain import Explanation, WordAttention
from vlm_bridge.captioning.fonts import Font, font_for

PANEL = 208  # pixels of the longer side
GAP, MAX_COLUMNS = 18, 6
TITLE_SIZE, WORD_SIZE, NOTE_SIZE = 24, 20, 14
BACKGROUND, INK, GREY = "#ffffff", "#212529", "#6c757d"

# Five colors of viridis (van der Walt & Smith 2015), safe for color-blind readers.
HEAT = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)
FAINTEST, STRONGEST = 0.45, 0.75  # opacity of the heat map at its coldest and hottest places
EVEN_SCALE = 3.0
"""Least top of the color scale, as a multiple of even attention; even maps then stay pale."""
NOTE = "Yellow: where the word looked most; below the word, how many times an even spread that is."


def word_overlays(
    explanation: Explanation, picture: Image.Image, side: int = PANEL
) -> list[Image.Image]:
    """Return the image under each word's heat map, in order; `side` pixels on the longer side.

    Args:
        picture: the image in the size that `explain` was given.
    """
    shown = ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    area = _scaled(explanation.area, picture, shown)
    return [_overlay(shown, word, area) for word in explanation.words]


def attention_panels(explanation: Explanation, picture: Image.Image) -> Image.Image:
    """Draw the caption, the image, and a panel with the highest attention of each word.

    Args:
        picture: the image in the size that `explain` was given.
    """
    shown = ImageOps.contain(picture.convert("RGB"), (PANEL, PANEL), Image.Resampling.LANCZOS)
    panels = [(shown, "", "")]
    for word, overlay in zip(explanation.words, word_overlays(explanation, picture), strict=True):
        panels.append((overlay, word.word, f"{word.peak:.1f}x"))

    columns = min(len(panels), MAX_COLUMNS)
    width = max(columns, 3) * (PANEL + GAP) + GAP
    title_font = font_for(explanation.caption, TITLE_SIZE)
    title = _wrap(explanation.caption or "(no caption)", title_font, width - 2 * GAP)
    top = GAP + len(title) * round(1.3 * TITLE_SIZE) + GAP // 2
    row_height = shown.height + round(1.4 * WORD_SIZE + 1.4 * NOTE_SIZE) + GAP
    rows = -(-len(panels) // columns)

    sheet = Image.new("RGB", (width, top + rows * row_height + NOTE_SIZE + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        pen.text((GAP, GAP + number * round(1.3 * TITLE_SIZE)), line, fill=INK, font=title_font)
    for index, (panel, word, note) in enumerate(panels):
        row, column = divmod(index, columns)
        left, upper = GAP + column * (PANEL + GAP), top + row * row_height
        sheet.paste(panel, (left + (PANEL - shown.width) // 2, upper))
        middle, below = left + PANEL // 2, upper + shown.height + 6
        pen.text((middle, below), word, fill=INK, font=_fitting(word), anchor="ma")
        below += round(1.3 * WORD_SIZE)
        pen.text((middle, below), note, fill=GREY, font=font_for(note, NOTE_SIZE), anchor="ma")
    pen.text((GAP, top + rows * row_height), NOTE, fill=GREY, font=font_for(NOTE, NOTE_SIZE))
    return sheet


def _overlay(
    shown: Image.Image, word: WordAttention, area: tuple[int, int, int, int]
) -> Image.Image:
    """Return the gray image under a heat map; areas that the encoder does not see stay gray."""
    left, top, right, bottom = area
    ceiling = max(word.map.max(), EVEN_SCALE / word.map.size)
    values = Image.fromarray((word.map / ceiling).astype(np.float32))
    heat_hw = np.asarray(
        values.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colours_hwc = np.stack([np.interp(heat_hw, stops, channel) for channel in HEAT.T], axis=-1)
    cover_hw1 = (FAINTEST + (STRONGEST - FAINTEST) * heat_hw)[..., None]

    grey = shown.convert("L").convert("RGB")
    below_hwc = np.asarray(grey.crop(area), dtype=np.float64)
    covered = (1 - cover_hw1) * below_hwc + cover_hw1 * colours_hwc
    grey.paste(Image.fromarray(covered.round().astype(np.uint8)), (left, top))
    return grey


def _scaled(
    area: tuple[float, float, float, float], picture: Image.Image, shown: Image.Image
) -> tuple[int, int, int, int]:
    """Return an area in whole pixels of the image as shown, at least one each way."""
    across, down = shown.width / picture.width, shown.height / picture.height
    left, top, right, bottom = area[0] * across, area[1] * down, area[2] * across, area[3] * down
    left, top = round(max(left, 0)), round(max(top, 0))
    return (
        left,
        top,
        max(left + 1, round(min(right, shown.width))),
        max(top + 1, round(min(bottom, shown.height))),
    )


def _fitting(word: str) -> Font:
    """Return a font that fits the word into its panel, down to a readable size."""
    size = WORD_SIZE
    while size > NOTE_SIZE // 2 and font_for(word, size).getlength(word) > PANEL:
        size -= 1
    return font_for(word, size)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
