"""Open images from outside: a file becomes an upright 8-bit RGB image, or one clear error.

A file is refused by its cost before it is decoded: bytes, pixels, progressive scans, metadata.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_bridge.data_pipeline.samples import ImageFile, TarImage
from vlm_bridge.errors import DataError, ImageError

logger = logging.getLogger(__name__)

# 50-megapixel phones (8192 x 6144) fit. Decoding that many takes seconds and, as WebP, 0.8 GB.
MAX_PIXELS = 51_000_000
# Larger JPEGs are read at a half, a quarter or an eighth of their size, which costs little.
MAX_JPEG_PIXELS = 178_000_000
# JPEG's own limit. Every row costs memory of its own, however short it is.
MAX_SIDE = 65_535
# MAX_PIXELS uncompressed, at six bytes a pixel.
MAX_FILE_BYTES = 300_000_000
# Pixels of a progressive JPEG times its scans (usually ten): an empty scan is a pass over all.
MAX_SCAN_PIXELS = 1_500_000_000
# Segments of a JPEG, text chunks of a PNG, extensions of a GIF, numbers of a TIFF's tag.
MAX_PARTS = 100_000
# Pillow knows forty formats more, down to PostScript, for which it starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000")
IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg"),
        *(".mpo", ".png", ".tif", ".tiff", ".webp"),
    }
)

# MAX_PIXELS is checked anyway, and a file of odd metadata warns a thousand times. Appended, so that filters
# of the program come first.
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
_ORIENTATION = 0x0112
_PARTS = {
    "JPEG": [bytes([0xFF, marker]) for marker in (*range(0xE0, 0xF0), 0xFE)],
    "PNG": [b"tEXt", b"zTXt", b"iTXt"],
    "GIF": [b"!\xfe", b"!\xff"],
}
_KINDS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file",
    b"\x1aE\xdf\xa3": "a video",
    b"PK\x03\x04": "an archive or an office document",
    b"\x1f\x8b": "an archive",
    b"8BPS": "a Photoshop file",
    b"\0\0\x01\0": "an icon",
    b"ID3": "a sound",
}
# Brands of files that begin as MP4 does.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF")
_VALUE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}


@dataclass
class Limits:
    """Limits of this process that a user may raise (`--max-pixels`); 0 for none."""

    max_pixels: int = MAX_PIXELS


LIMITS = Limits()


@dataclass(frozen=True)
class DecodedImage:
    """An image and whether its file already was what training reads (an upright RGB JPEG)."""

    image: Image.Image
    is_plain_jpeg: bool


def open_image(path: str | ImageFile) -> Image.Image:
    """Return the image at ``path`` (a file, or a place in a tar), upright and 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits, an
    animation gives its first frame, and a JPEG of more than `MAX_PIXELS` is read smaller.

    Raises:
        ImageError: missing, empty, truncated, no image, or beyond a limit of this module.
    """
    return decode_image(path).image


def decode_image(picture: str | ImageFile | bytes) -> DecodedImage:
    """Open an image or a file's bytes; and whether the file can be copied unchanged."""
    with _opened(picture) as opened:
        is_smaller = _shrink_while_read(opened)
        opened.load()
        turn = _UPRIGHT.get(_orientation(opened))
        is_plain = opened.format == "JPEG" and opened.mode == "RGB"
        rgb = _to_rgb(opened)
        image = rgb if turn is None else rgb.transpose(turn)
    return DecodedImage(image, is_plain and turn is None and not is_smaller)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image that the caller opened as :func:`open_image` does. Raises Pillow's errors."""
    image.load()  # a TIFF is upright now, and has lost its orientation
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow meets damaged EXIF with almost any exception
        turn = None
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def check_image(path: str | ImageFile) -> None:
    """Raise ImageError where :func:`open_image` would; a JPEG is decoded at an eighth of its size."""
    with _opened(path) as opened:
        if opened.format == "JPEG":
            opened.draft(opened.mode, (opened.width // 8, opened.height // 8))
            opened.load()
        else:
            opened.load()
            _to_rgb(opened)


def image_size(picture: str | ImageFile | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone: the pixels may still be damaged.

    ``picture`` is a file, a place in a tar, or a file's bytes.

    Raises:
        ImageError: as :func:`open_image`, as far as the header tells.
    """
    with _opened(picture) as opened:
        width, height = opened.size
        is_turned = _orientation(opened) >= 5  # by a quarter
    return (height, width) if is_turned else (width, height)


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
            missing = f"no image in folder {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        elif set("*?[") & set(str(path)):
            # Path.glob takes relative patterns only.
            anchor = Path(path.anchor)
            matches = _images(anchor.glob(str(path.relative_to(anchor))), given)
            missing = f"no image matches the pattern {given}"
        else:
            raise DataError(f"no such image or folder: {given}")
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
def _opened(picture: str | ImageFile | bytes) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels; any failure within the block is its ImageError."""
    name, kind = name_of(picture), ""
    try:
        content = _content(picture, name)
        kind = kind_of(content)
        if kind not in FORMATS:
            raise ImageError(name, f"it is {kind}")
        if kind == "GIF":
            content = _first_of_gif(content)
        if problem := _costly_metadata(content, kind):
            raise ImageError(name, f"it has {problem}: no camera writes such a file")
        if kind == "HEIF":
            _register_heif()
        with Image.open(io.BytesIO(content), formats=[kind]) as opened:
            _check_cost(opened, content, name)
            yield opened
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, f"a damaged {kind} image") from None
    except Image.DecompressionBombError:
        # Pillow's own, higher limit strikes while it reads the header.
        raise ImageError(name, f"more than {LIMITS.max_pixels / 1e6:.0f} million pixels") from None
    except Exception as error:
        # Pillow's decoders meet damaged bytes with almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, ...); one damaged file must never end a run over thousands.
        raise ImageError(name, " ".join(str(error).split()) or type(error).__name__) from error


def kind_of(content: bytes) -> str:
    """Return the format as Pillow names it, or another kind of file with its article."""
    for start, kind in _KINDS.items():
        if content.startswith(start):
            return kind
    if content[4:8] == b"ftyp":
        return next((kind for brand, kind in _BRANDS.items() if brand in content[8:40]), "a video")
    if content.startswith(b"RIFF") and content[8:12] in (b"WEBP", b"AVI "):
        return "WEBP" if content[8:12] == b"WEBP" else "a video"
    text = content[:1000].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page"
    return "an SVG drawing" if b"<svg" in text else "no image, or a damaged one"


def _costly_metadata(content: bytes, kind: str) -> str:
    """Name metadata that Pillow would spend gigabytes or minutes on when it opens a file."""
    if sum(map(content.count, _PARTS.get(kind, ()))) > MAX_PARTS:
        return f"more than {MAX_PARTS:,} parts"
    starts = [0] if kind == "TIFF" else []
    for marker in (b"Exif\0\0", b"MPF\0") if kind == "JPEG" else ():
        if (place := content.find(marker)) >= 0:
            starts.append(place + len(marker))
    return next(filter(None, (_costly_directory(content, start) for start in starts)), "")


def _costly_directory(content: bytes, start: int) -> str:
    """Name a table that a TIFF's first directory claims beyond the bytes of its file."""
    order = "<" if content[start : start + 2] == b"II" else ">"
    is_big = content[start + 2 : start + 4] in (b"+\0", b"\0+")
    offset, number, entry = ("Q", "Q", "HHQ8x") if is_big else ("I", "H", "HHI4x")
    claimed = 0
    try:
        (place,) = struct.unpack_from(order + offset, content, start + (8 if is_big else 4))
        (count,) = struct.unpack_from(order + number, content, start + place)
        place += start + struct.calcsize(order + number)
        if count > MAX_PARTS:
            return f"{count:,} tags"
        for _ in range(count):
            _, kind, values = struct.unpack_from(order + entry, content, place)
            place += struct.calcsize(order + entry)
            claimed += values * _VALUE_BYTES.get(kind, 1)
            if (kind not in (1, 2, 6, 7) and values > MAX_PARTS) or claimed > len(content):
                return f"a table of {values:,} values"
    except struct.error:
        pass  # Pillow names the damage
    return ""


def _first_of_gif(content: bytes) -> bytes:
    """Return a GIF's first image without comments: Pillow's time is quadratic in their blocks."""

    def colors(flags: bytes) -> int:
        return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0

    def behind_blocks(place: int) -> int:
        while place < len(content) and content[place]:
            place += content[place] + 1
        return place + 1

    place = 13 + colors(content[10:11])
    kept = [content[:place]]
    while (kind := content[place : place + 1]) == b"!":
        start, place = place, behind_blocks(place + 2)
        if content[start + 1 : start + 2] == b"\xf9":  # transparency
            kept.append(content[start:place])
    if kind != b",":
        return b"".join([*kept, content[place:]])
    end = behind_blocks(place + 11 + colors(content[place + 9 : place + 10]))
    return b"".join([*kept, content[place:end], b";"])


def _orientation(opened: Image.Image) -> int:
    """Return EXIF's orientation, 1 (upright) to 8; Pillow turns a TIFF itself."""
    exif = opened.info.get("exif") or b""
    exif = exif[exif.find(b"Exif\0\0") + 6 :] if b"Exif\0\0" in exif[:10] else exif
    if opened.format == "TIFF" or exif[:2] not in (b"II", b"MM"):
        return 1
    order = "<" if exif.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * min(count, 1000), 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, place)
            if tag == _ORIENTATION:
                return value if kind == 3 and values == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass  # damaged
    return 1


def _content(picture: str | ImageFile | bytes, name: str) -> bytes:
    """The bytes of an image's file, if it is one and not too large."""
    if isinstance(picture, TarImage):
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


def _check_cost(opened: Image.Image, content: bytes, name: str) -> None:
    """Raise ImageError if decoding would take too much memory or time, judged by the header."""
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
    scans = content.count(_START_OF_SCAN) if is_jpeg else 1
    if scans * width * height > max(MAX_SCAN_PIXELS, 10 * LIMITS.max_pixels):
        raise ImageError(
            name, f"{width} x {height} in {scans:,} scans would take minutes to decode"
        )


def _shrink_while_read(opened: Image.Image) -> bool:
    """Decode a JPEG beyond the limit at a half, a quarter or an eighth; return whether it is."""
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


def name_of(picture: str | ImageFile | bytes) -> str:
    """What messages call an image."""
    return f"in memory ({len(picture)} bytes)" if isinstance(picture, bytes) else str(picture)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, a band of rows at a time to save memory."""
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
    """Return the white of a one-channel integer or float image.

    It is the smallest of 1.0, 255 and 65535 that holds the brightest pixel. 16-bit modes always use
    65535, so that a dark image stays dark.
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
