"""Draw the first image of the README: photos, their captions, and a judgment by hand.

    python scripts/readme_pictures.py [CHECKPOINT]

Writes docs/images/photographs.jpg. The captions are those of a checkpoint or, as in the README, of
the captioner that comes with the package. A caption that nobody has judged yet is an error.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from skimage import data
from sklearn.datasets import load_sample_image

from vlm_bridge import Captioner

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "photographs.jpg"
JUDGMENTS = {
    "coffee": ("A coffee cup sits in the air.", False, "it is on a table"),
    "chelsea": ("A person is holding a cat.", False, "a cat, and nobody else"),
    "china": (
        "Two children are standing in front of a tall building.", False, "a building, but nobody there",
    ),
    "rocket": ("A woman is standing in front of a yellow tent.", False, "a rocket on its pad"),
    "astronaut": ("A boy in a red jersey is playing soccer.", False, "a woman in a space suit"),
    "flower": ("A mushroom is standing in a mushroom.", False, "a flower"),
}  # fmt: skip
"""Of each photo: the caption that was judged, whether it is right, and a remark."""

TILE, GAP, COLUMNS, TEXT_HEIGHT = (400, 280), 24, 3, 108
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """Draw a check or a cross of 16 pixels: fonts that come with Pillow have neither."""
    if right:
        pen.line([(x, y + 9), (x + 6, y + 15), (x + 16, y + 2)], RIGHT, 4, "curve")
        return
    pen.line([(x, y + 2), (x + 13, y + 15)], WRONG, 4)
    pen.line([(x, y + 15), (x + 13, y + 2)], WRONG, 4)


def main(checkpoint: str | None = None) -> None:
    photos = {
        name: Image.fromarray(
            load_sample_image(f"{name}.jpg")
            if name in ("china", "flower")
            else getattr(data, name)()
        )
        for name in JUDGMENTS
    }
    results = Captioner.from_pretrained(checkpoint).caption(list(photos.values()))
    width, height = TILE[0] + GAP, TILE[1] + TEXT_HEIGHT
    rows = -(-len(photos) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, ((name, photo), result) in enumerate(zip(photos.items(), results, strict=True)):
        judged, right, remark = JUDGMENTS[name]
        if result.caption != judged:
            raise SystemExit(f"error: {name} is now {result.caption!r}: judge it in {__file__}")
        x, y = GAP + index % COLUMNS * width, GAP + index // COLUMNS * height
        sheet.paste(ImageOps.fit(photo.convert("RGB"), TILE, centering=(0.5, 0.25)), (x, y))
        text = textwrap.wrap(judged, 40)
        pen.text((x, y + TILE[1] + 8), "\n".join(text), "black", ImageFont.load_default(20))
        below = y + TILE[1] + 14 + 25 * len(text)
        draw_mark(pen, x, below, right)
        remark = f"unsure; {remark}" if result.unsure else remark
        pen.text((x + 26, below), remark, RIGHT if right else WRONG, ImageFont.load_default(17))
    sheet.save(OUTPUT, quality=88, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
