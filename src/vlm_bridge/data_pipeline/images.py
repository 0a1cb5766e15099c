"""Opening pictures from the outside world: a file becomes an upright 8-bit RGB picture or one clear error."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_bridge.data_pipeline.tar_picture import PictureFile, TarPicture
from vlm_bridge.errors import DataError, ImageError

MAX_PIXELS = 51_000_000
"""A larger picture is refused from its header, before anything is decoded: 50-megapixel phones (8192 x 6144) fit. A few
kilobytes can be that many pixels, and decoding them takes seconds and, as WebP, 0.8 GB."""

MAX_FILE_BYTES = 300_000_000
"""Of a file: what `MAX_PIXELS` take uncompressed, at six bytes a pixel."""

MAX_SCAN_PIXELS = 1_500_000_000
"""Pixels of a progressive JPEG times its scans, ten or so by any usual encoder. A scan of nothing takes a hundred bytes
of the file and a pass over all pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Pillow knows some forty formats more, down to PostScript, for which it starts another program."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# MAX_PIXELS is checked as soon as the header is read: Pillow's warning, below it, only adds noise, and so do the
# thousands that a file of odd metadata gives. Appended, so that a filter which the program set itself comes first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_START_OF_SCAN = b"\xff\xda"
_BAND_PIXELS = 1 << 20
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class DecodedImage:
    """A picture and whether its file already was what training reads (an upright RGB JPEG)."""

    image: Image.Image
    is_plain_jpeg: bool


def open_image(path: str | PictureFile) -> Image.Image:
    """Return the picture at ``path`` (a file, or a place in a tar), upright and RGB (8 bits a channel).

    EXIF rotation is applied, transparency is laid on white, 16-bit greyscale is scaled to 8 bits, CMYK is
    converted, and an animation gives its first frame.

    Raises:
        ImageError: missing, empty, truncated, not a picture, or larger than ``MAX_PIXELS``.
    """
    return decode_image(path).image


def decode_image(picture: str | PictureFile | bytes) -> DecodedImage:
    """As :func:`open_image`, also of a file's bytes; also says whether the file could be used as it is."""
    try:
        with _open_header(picture) as opened:
            opened.load()
            is_upright = _UPRIGHT.get(_orientation(opened)) is None
            is_plain_jpeg = opened.format == "JPEG" and opened.mode == "RGB" and is_upright
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
    image.load()  # which turns a TIFF, and with it takes away what says so
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def check_image(path: str | PictureFile) -> None:
    """Raise ImageError where :func:`open_image` would. A JPEG is read whole, but at an eighth of its size: quicker."""
    try:
        with _open_header(path) as opened:
            if opened.format == "JPEG":
                opened.draft(opened.mode, (opened.width // 8, opened.height // 8))
                opened.load()
                return
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(str(path), _one_line(error)) from error
    decode_image(path)


def image_size(picture: str | PictureFile | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone: the pixels may still be damaged.

    ``picture`` is a file, a place in a tar, or a file's bytes.

    Raises:
        ImageError: as :func:`open_image`, as far as the header tells.
    """
    try:
        with _open_header(picture) as opened:
            width, height = opened.size
            # Orientations 5 to 8 turn the picture by a quarter.
            sideways = _orientation(opened) in (5, 6, 7, 8)
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


def _open_header(picture: str | PictureFile | bytes) -> Image.Image:
    """Open a picture without decoding pixels; the caller closes it."""
    name = _name(picture)
    if isinstance(picture, TarPicture):
        picture = picture.read_bytes()
    if isinstance(picture, bytes):
        size, file = len(picture), io.BytesIO(picture)
    else:
        file = Path(picture)
        if file.is_dir():
            raise ImageError(name, "it is a folder")
        if not file.exists():
            raise ImageError(name, "no such file")
        if not file.is_file():  # a pipe would wait, a device never end
            raise ImageError(name, "it is a pipe or a device")
        size = file.stat().st_size
    if size == 0:
        raise ImageError(name, "the file is empty")
    if size > MAX_FILE_BYTES:
        raise ImageError(name, f"it has {size / 1e6:,.0f} MB, more than {MAX_FILE_BYTES / 1e6:.0f}")
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(name, "not a picture, or a damaged one") from None
    except Image.DecompressionBombError:
        # Pillow's own, higher limit strikes while it reads the header.
        raise ImageError(name, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        raise ImageError(name, f"{width} x {height} is more than {MAX_PIXELS / 1e6:.0f} million pixels")
    if opened.format in (
        "JPEG",
        "MPO",
    ):  # MPO: the JPEGs of some cameras, with a second picture behind the first
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        # Entropy-coded data never holds these bytes; metadata may, a few times.
        if (scans := content.count(_START_OF_SCAN)) * width * height > MAX_SCAN_PIXELS:
            opened.close()
            raise ImageError(name, f"{width} x {height} in {scans:,} scans would take minutes to decode")
    return opened


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the metadata is damaged: pixels may be whole."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF meets its reader with almost any exception, too
        return 1


def _name(picture: str | PictureFile | bytes) -> str:
    return f"in memory ({len(picture)} bytes)" if isinstance(picture, bytes) else str(picture)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, a band of rows at a time: besides the result, nothing is as large as it."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    convert = _converter(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(convert(band), (0, top))
    return rgb


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of the bands of a picture."""
    if image.mode.startswith("I") or image.mode == "F":
        white = _white_level(image)
        return lambda band: _eight_bits(band, white)
    return _on_white if image.has_transparency_data else lambda band: band.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    layers = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def _white_level(image: Image.Image) -> float:
    """What is white in a one-channel integer or float picture: the top of the narrowest usual range that holds its
    brightest pixel, of 1.0, 8 bits and 16 bits. 16-bit modes always use 16 bits, so that a dark picture stays dark.
    """
    if image.mode.startswith("I;16"):
        return 65535.0
    brightest = float(image.getextrema()[1])  # type: ignore[arg-type] - of one channel
    levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((level for level in levels if brightest <= level), brightest)


def _eight_bits(band: Image.Image, white: float) -> Image.Image:
    """Scale to 0..255 (Pillow's ``convert`` would clip to white); what is no number is black."""
    with np.errstate(all="ignore"):
        values = np.nan_to_num(np.asarray(band, dtype=np.float64) / white, nan=0.0)
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
