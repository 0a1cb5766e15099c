"""Opening pictures from the outside world: a file becomes an upright 8-bit RGB picture or one clear error."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_bridge.errors import DataError, ImageError

MAX_PIXELS = 100_000_000
"""A larger picture (300 MB as RGB) is refused from its header, before anything is decoded."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# MAX_PIXELS is checked as soon as the header is read: Pillow's warning, below it, only adds noise. Appended,
# so that a filter which the program set itself comes first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)

_EXIF_ORIENTATION = 0x0112
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class DecodedImage:
    """A picture and whether its file already was what training reads (an upright RGB JPEG)."""

    image: Image.Image
    is_plain_jpeg: bool


def open_image(path: str | Path) -> Image.Image:
    """Return the picture at ``path``, upright and RGB (8 bits a channel).

    EXIF rotation is applied, transparency is laid on white, 16-bit greyscale is scaled to 8 bits, CMYK is
    converted, and an animation gives its first frame.

    Raises:
        ImageError: missing, empty, truncated, not a picture, or larger than ``MAX_PIXELS``.
    """
    return decode_image(path).image


def decode_image(picture: str | Path | bytes) -> DecodedImage:
    """As :func:`open_image`, of a file or a file's bytes; also says whether the file could be used as it is."""
    try:
        with _open_header(picture) as opened:
            opened.load()
            upright = opened.getexif().get(_EXIF_ORIENTATION, 1) == 1
            is_plain_jpeg = opened.format == "JPEG" and opened.mode == "RGB" and upright
            image = upright_rgb(opened)
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders meet damaged bytes with almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, ...); one damaged file must never end a run over thousands.
        raise ImageError(_name(picture), _one_line(error)) from error
    return DecodedImage(image, is_plain_jpeg)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture that somebody else opened, as :func:`open_image` gives it; Pillow's errors for damaged pixels."""
    return _to_rgb(ImageOps.exif_transpose(image))


def image_size(picture: str | Path | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone: the pixels may still be damaged.

    ``picture`` is a file or a file's bytes.

    Raises:
        ImageError: as :func:`open_image`, as far as the header tells.
    """
    try:
        with _open_header(picture) as opened:
            width, height = opened.size
            # Orientations 5 to 8 turn the picture by a quarter.
            sideways = opened.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_name(picture), _one_line(error)) from error
    return (height, width) if sideways else (width, height)


def iter_image_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (recursive, sorted) and glob patterns, in the order given.

    A named file keeps its place whatever it holds: a broken one fails later, by itself.

    Raises:
        DataError: a path does not exist, or a folder or pattern holds no picture.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            found.append(path)
            continue
        if path.is_dir():
            matches = _pictures(path.rglob("*"))
            missing = f"no picture in folder {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        elif _GLOB_CHARACTERS & set(str(path)):
            # Path.glob takes relative patterns only.
            anchor = Path(path.anchor)
            matches = _pictures(anchor.glob(str(path.relative_to(anchor))))
            missing = f"no picture matches the pattern {given}"
        else:
            raise DataError(f"no such picture or folder: {given}")
        if not matches:
            raise DataError(missing)
        found.extend(matches)
    return found


def _pictures(candidates: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in candidates
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _open_header(picture: str | Path | bytes) -> Image.Image:
    """Open a picture without decoding pixels; the caller closes it."""
    name = _name(picture)
    if isinstance(picture, bytes):
        size, file = len(picture), io.BytesIO(picture)
    else:
        file = Path(picture)
        if file.is_dir():
            raise ImageError(name, "it is a folder")
        if not file.exists():
            raise ImageError(name, "no such file")
        size = file.stat().st_size
    if size == 0:
        raise ImageError(name, "the file is empty")
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:
        raise ImageError(name, "not a picture, or a damaged one") from None
    except Image.DecompressionBombError:
        # Pillow's own, higher limit strikes while it reads the header.
        raise ImageError(name, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        raise ImageError(name, f"{width} x {height} is more than {MAX_PIXELS / 1e6:.0f} million pixels")
    return opened


def _name(picture: str | Path | bytes) -> str:
    return f"in memory ({len(picture)} bytes)" if isinstance(picture, bytes) else str(picture)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a one-channel integer or float picture to 0..255 (Pillow's ``convert`` would clip it to white).

    The white level is that of the narrowest usual range that holds the brightest pixel: 1.0, 8 bits, 16 bits.
    16-bit modes always use 16 bits, so that a dark picture stays dark.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        brightest = values.max()
        levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((level for level in levels if brightest <= level), brightest)
    return Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
