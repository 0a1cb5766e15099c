"""Images with their captions on one PNG."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ImageError

TILE = (288, 216)
"""Width and height of an image, in pixels."""
LINE_CHARACTERS, MAX_LINES = 42, 7
BROKEN = "#ced4da"


@dataclass(frozen=True)
class SheetItem:
    """An image file with its caption, and a reference and score to compare the caption with."""

    image: ImageFile
    caption: str
    reference: str | None = None
    score: float | None = None


def contact_sheet(
    items: Sequence[SheetItem], path: Path, *, columns: int = 4, title: str = ""
) -> None:
    """Write a PNG of images in rows of ``columns``, each above its caption, reference and score.

    An image that cannot be read becomes a gray tile.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    columns = max(1, min(columns, len(items)))
    rows = -(-len(items) // columns) or 1
    figure = Figure(figsize=(3.2 * columns, 4 * rows), dpi=100, layout="constrained")
    figure.suptitle(_plain(title))
    for axes, item in zip(
        figure.subplots(rows, columns, squeeze=False).flat,
        [*items, *[None] * (rows * columns - len(items))],
        strict=True,
    ):
        axes.set_axis_off()
        if item is None:
            continue
        image = thumbnail(item.image, TILE)
        axes.imshow(
            ImageOps.pad(image, TILE, color="#f1f3f5") if image else Image.new("RGB", TILE, BROKEN)
        )
        if image is None:
            axes.text(TILE[0] / 2, TILE[1] / 2, "cannot be read", ha="center")
        texts = [_wrapped(item.caption or "(no caption)"), _wrapped(item.reference or "")]
        if item.score is not None:
            texts.append(f"{item.score:.3f}")
        text = "\n".join(filter(None, texts))
        axes.text(0, TILE[1] + 8, text, va="top", fontsize=8)
    with warnings.catch_warnings():  # letters that its font lacks become boxes
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, format="png")


def thumbnail(path: ImageFile, size: tuple[int, int]) -> Image.Image | None:
    """Return the image scaled to fit ``size`` (width, height) in pixels; None if it cannot be read."""
    try:
        return ImageOps.contain(open_image(path), size, Image.Resampling.LANCZOS)
    except ImageError:
        return None


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(text, LINE_CHARACTERS, max_lines=MAX_LINES, placeholder=" ...")
    return _plain("\n".join(lines))


def _plain(text: str) -> str:
    """Escape the dollar sign, with which matplotlib starts mathematics."""
    return text.replace("$", r"\$")
