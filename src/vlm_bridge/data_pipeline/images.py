"""Opening pictures from the outside world: a file becomes an upright 8-bit RGB picture or one clear error."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_bridge.data_pipeline.image_structure import (
    ORIENTATION,
    Essentials,
    StructureError,
    essentials,
    exif_orientation,
    kind_of,
)
from vlm_bridge.data_pipeline.tar_picture import PictureFile, TarPicture
from vlm_bridge.errors import DataError, ImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 51_000_000
"""A larger image is refused from its header, before anything is decoded: 50-megapixel phones (8192 x 6144) fit. A few
kilobytes can be that many pixels, and decoding them takes seconds and, as WebP, 0.8 GB. `LIMITS` can raise it."""

MAX_JPEG_PIXELS = 178_000_000
"""A JPEG is read up to here: above `MAX_PIXELS` at a half, a quarter or an eighth of its size, which costs little."""

MAX_SIDE = 65_535
"""Pixels; JPEG's own limit. Every row costs memory of its own, however short it is."""

MAX_FILE_BYTES = 300_000_000
"""Of a file: what `MAX_PIXELS` take uncompressed, at six bytes a pixel."""

MAX_SCAN_PIXELS = 1_500_000_000
"""Pixels of a progressive JPEG times its scans, ten or so by any usual encoder. A scan of nothing takes a hundred bytes
of the file and a pass over all pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000")
"""What is decoded. Pillow knows some forty formats more, down to PostScript, for which it starts another program."""

IMAGE_SUFFIXES = frozenset(
    {
        ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif",
        ".tiff", ".webp",
    }
)  # fmt: skip

# MAX_PIXELS is checked as soon as the header is read: Pillow's warning, below it, only adds noise, and so do the
# thousands that a file of odd metadata gives. Appended, so that a filter which the program set itself comes first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

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


@dataclass
class Limits:
    """What a user may raise (`--max-pixels`): pixels of an image, 0 for none."""

    max_pixels: int = MAX_PIXELS


LIMITS = Limits()
"""Those of this process."""


@dataclass(frozen=True)
class DecodedImage:
    """An image and whether its file already was what training reads (an upright RGB JPEG)."""

    image: Image.Image
    is_plain_jpeg: bool


def open_image(path: str | PictureFile) -> Image.Image:
    """Return the image at ``path`` (a file, or a place in a tar), upright and RGB (8 bits a channel).

    EXIF rotation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits, CMYK is
    converted, an animation gives its first frame, and a JPEG of more than `MAX_PIXELS` is read smaller.

    Raises:
        ImageError: missing, empty, truncated, no image, or beyond a limit of this module.
    """
    return decode_image(path).image


def decode_image(picture: str | PictureFile | bytes) -> DecodedImage:
    """As :func:`open_image`, also of a file's bytes; also says whether the file could be used as it is."""
    with _opened(picture) as (opened, parts):
        is_smaller = _shrink_while_read(opened)
        opened.load()
        turn = _UPRIGHT.get(parts.orientation)
        is_plain = parts.is_plain and opened.format == "JPEG" and opened.mode == "RGB"
        rgb = _to_rgb(opened)
        image = rgb if turn is None else rgb.transpose(turn)
    return DecodedImage(image, is_plain and turn is None and not is_smaller)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that somebody else opened, as :func:`open_image` gives it; Pillow's errors for damaged pixels."""
    image.load()  # which turns a TIFF, and with it takes away what says so
    turn = _UPRIGHT.get(_orientation_of(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def check_image(path: str | PictureFile) -> None:
    """Raise ImageError where :func:`open_image` would. A JPEG is read whole, but at an eighth of its size: quicker."""
    with _opened(path) as (opened, _):
        if opened.format == "JPEG":
            opened.draft(opened.mode, (opened.width // 8, opened.height // 8))
            opened.load()
        else:
            opened.load()
            _to_rgb(opened)


def image_size(picture: str | PictureFile | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone: the pixels may still be damaged.

    ``picture`` is a file, a place in a tar, or a file's bytes.

    Raises:
        ImageError: as :func:`open_image`, as far as the header tells.
    """
    with _opened(picture) as (opened, parts):
        width, height = opened.size
    # Orientations 5 to 8 turn the image by a quarter.
    return (height, width) if parts.orientation >= 5 else (width, height)


def iter_image_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (recursive, sorted) and glob patterns, in the order given.

    A named file keeps its place whatever it holds: a broken one fails later, by itself.

    Args:

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
            matches = _images(path.rglob("*"), given)
            missing = (
                f"no picture in folder {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        elif _GLOB_CHARACTERS & set(str(path)):
            # Path.glob takes relative patterns only.
            anchor = Path(path.anchor)
            matches = _images(anchor.glob(str(path.relative_to(anchor))), given)
            missing = f"no picture matches the pattern {given}"
        else:
            raise DataError(f"no such picture or folder: {given}")
        if not matches:
            raise DataError(missing)
        found.extend(matches)
    return found


def _images(candidates: Iterable[Path], given: str | Path) -> list[Path]:
    files = [path for path in candidates if not path.name.startswith(".") and path.is_file()]
    others = Counter(path.suffix.lower() or "no suffix" for path in files)
    for suffix in IMAGE_SUFFIXES:
        del others[suffix]
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5))
        more = f" and {len(others) - 5} other kinds" if len(others) > 5 else ""
        logger.info(
            f"{given}: skipped {others.total():,} files that are no images by their names ({kinds}{more})"
        )
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


@contextmanager
def _opened(picture: str | PictureFile | bytes) -> Iterator[tuple[Image.Image, Essentials]]:
    """Open an image without decoding its pixels; whatever fails within the block is an ImageError of this image."""
    name, kind = name_of(picture), ""
    try:
        content = _content(picture, name)
        kind = kind_of(content)
        if kind not in FORMATS:
            raise ImageError(name, f"it is {kind}")
        parts = essentials(content, kind)
        if kind == "HEIF":
            _register_heif()
        with Image.open(io.BytesIO(parts.content), formats=[kind]) as opened:
            _check_cost(opened, parts, name)
            if exif := opened.info.get("exif"):  # of formats that are not walked
                parts = Essentials(parts.content, exif_orientation(exif), parts.is_plain)
            yield opened, parts
    except ImageError:
        raise
    except StructureError as error:
        raise ImageError(name, f"it has {error}: no camera writes such a file") from error
    except UnidentifiedImageError:
        raise ImageError(name, f"a damaged {kind} image") from None
    except Image.DecompressionBombError:
        # Pillow's own, higher limit strikes while it reads the header.
        raise ImageError(name, f"more than {LIMITS.max_pixels / 1e6:.0f} million pixels") from None
    except Exception as error:
        # Pillow's decoders meet damaged bytes with almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, ...); one damaged file must never end a run over thousands.
        raise ImageError(name, _one_line(error)) from error


def _content(picture: str | PictureFile | bytes, name: str) -> bytes:
    """The bytes of an image's file, if it is one and not too large."""
    if isinstance(picture, TarPicture):
        picture = picture.read_bytes()
    if isinstance(picture, bytes):
        size = len(picture)
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
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def _check_cost(opened: Image.Image, parts: Essentials, name: str) -> None:
    """Raise ImageError for an image that would take too much memory or time to decode, judged by its header."""
    width, height = opened.size
    if LIMITS.max_pixels == 0:
        return
    if max(width, height) > MAX_SIDE:
        raise ImageError(name, f"{width} x {height} has a side of more than {MAX_SIDE:,} pixels")
    is_jpeg = opened.format in ("JPEG", "MPO")
    most = max(LIMITS.max_pixels, MAX_JPEG_PIXELS) if is_jpeg else LIMITS.max_pixels
    if width * height > most:
        raise ImageError(
            name,
            f"{width} x {height} is more than {most / 1e6:.0f} million pixels (--max-pixels raises the limit)",
        )
    # Entropy-coded data never holds these bytes; metadata may, a few times.
    scans = parts.content.count(_START_OF_SCAN) if is_jpeg else 1
    if scans * width * height > max(MAX_SCAN_PIXELS, 10 * LIMITS.max_pixels):
        raise ImageError(
            name, f"{width} x {height} in {scans:,} scans would take minutes to decode"
        )


def _shrink_while_read(opened: Image.Image) -> bool:
    """Let a JPEG beyond the limit be decoded at a half, a quarter or an eighth of its size; whether it will be."""
    width, height = opened.size
    for factor in (1, 2, 4, 8):
        if LIMITS.max_pixels == 0 or width * height <= LIMITS.max_pixels * factor**2:
            if factor > 1:
                opened.draft(opened.mode, (width // factor, height // factor))
            return factor > 1
    return False


def _register_heif() -> None:
    """Let Pillow read the photos of iPhones."""
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)


def _orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image in memory, 1 (upright) where there is none or the metadata is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF meets its reader with almost any exception, too
        return 1


def name_of(picture: str | PictureFile | bytes) -> str:
    """What messages call an image."""
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
