"""Open images from outside: a file becomes an upright 8-bit RGB image, or one clear error.

A file is judged by its cost before it is decoded: bytes, pixels, progressive scans, metadata.
"""

from __future__ import annotations

import io
import logging
import signal
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image, UnidentifiedImageError

from vlm_bridge.data_pipeline.samples import ImageFile, TarImage
from vlm_bridge.errors import DataError, ImageError

logger = logging.getLogger(__name__)

# 50-megapixel phones (8192 x 6144) fit. Decoding that many takes seconds and, as WebP, 0.8 GB.
MAX_PIXELS = 51_000_000
MAX_JPEG_PIXELS = 178_000_000  # larger ones are read at a half or less, which costs little
MAX_SIDE = 65_535  # JPEG's own limit; every row costs memory of its own, however short it is
MAX_FILE_BYTES = 300_000_000  # MAX_PIXELS uncompressed, at six bytes a pixel
MAX_SCAN_PIXELS = 1_500_000_000  # of a progressive JPEG times its scans: each is a pass over all
MAX_PARTS = 100_000  # segments of a JPEG, text chunks of a PNG, numbers of a TIFF's tag
MAX_GIF_BLOCKS = 4_000  # before the first image: Pillow's time is quadratic in a comment's
SECONDS_AN_IMAGE = 10.0  # in an `ImageReader`; the largest image takes two or three
MEMORY_ABOVE_START = 2 << 30  # bytes of address space: twice what the largest image takes

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg"),
        *(".mpo", ".png", ".tif", ".tiff", ".webp"),
    }
)
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
}
# Pillow knows forty formats more, down to PostScript, for which it starts another program.
_OTHER_FORMATS = ("WEBP", "BMP", "JPEG2000")
_PARTS = {
    "JPEG": [bytes([0xFF, marker]) for marker in (*range(0xE0, 0xF0), 0xFE)],
    "PNG": [b"tEXt", b"zTXt", b"iTXt"],
}
_BYTE_TYPES = (1, 2, 6, 7)  # of TIFF's values
_VALUE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8), start=1))
_UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A file of odd metadata warns a thousand times. Appended: filters of the program come first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)


class Limits:
    """Limits of this process that a user may raise (`--max-pixels`); 0 for none."""

    max_pixels: int = MAX_PIXELS


LIMITS = Limits()


class DecodedImage(NamedTuple):
    """An image and whether its file already was what training reads (an upright RGB JPEG)."""

    image: Image.Image
    is_plain_jpeg: bool


def open_image(path: str | ImageFile) -> Image.Image:
    """Return the image at ``path`` (a file, or a place in a tar), upright and 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits,
    an animation gives its first frame, and a JPEG of more than `MAX_PIXELS` is read smaller.

    Raises:
        ImageError: missing, empty, truncated, no image, or beyond a limit of this module.
    """
    return decode_image(path).image


def decode_image(image: str | ImageFile | bytes) -> DecodedImage:
    """Open an image or a file's bytes; and whether the file can be copied unchanged."""
    with _opened(image) as opened:
        width, height = opened.size
        most = LIMITS.max_pixels or width * height
        # A JPEG beyond the limit is decoded at a half, a quarter or an eighth.
        factor = next((n for n in (1, 2, 4, 8) if width * height <= most * n**2), 1)
        if factor > 1:
            opened.draft(opened.mode, (width // factor, height // factor))
        rgb = upright_rgb(opened)
        is_plain = opened.format == "JPEG" and opened.mode == "RGB" and _orientation(opened) == 1
    return DecodedImage(rgb, is_plain and factor == 1)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image as :func:`open_image` does. Raises Pillow's errors."""
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return _to_rgb(image) if turn is None else _to_rgb(image).transpose(turn)


def check_image(image: str | ImageFile | bytes) -> None:
    """Raise ImageError where :func:`open_image` would; a JPEG is decoded at an eighth."""
    with _opened(image) as opened:
        if opened.format == "JPEG":
            opened.draft(opened.mode, (opened.width // 8, opened.height // 8))
        _to_rgb(opened)


def image_size(image: str | ImageFile | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone: the pixels may still be damaged.

    Raises:
        ImageError: as :func:`open_image`, as far as the header tells.
    """
    with _opened(image) as opened:
        width, height = opened.size
        is_turned = _orientation(opened) >= 5  # by a quarter
    return (height, width) if is_turned else (width, height)


def name_of(image: str | ImageFile | bytes) -> str:
    """Return the name of an image in messages."""
    return f"in memory ({len(image)} bytes)" if isinstance(image, bytes) else str(image)


def iter_image_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (recursive, sorted) and glob patterns, in the order given.

    Raises:
        DataError: a path does not exist, or a folder or pattern holds no image.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():  # whatever it holds: a broken one fails later, by itself
            found.append(path)
        elif path.is_dir():
            found += _images(path.rglob("*"), given)
        elif set("*?[") & set(str(path)):
            anchor = Path(path.anchor)  # Path.glob takes relative patterns only
            found += _images(anchor.glob(str(path.relative_to(anchor))), given)
        else:
            raise DataError(f"no such image or folder: {given}")
    return found


def _images(candidates: Iterable[Path], given: str | Path) -> list[Path]:
    files = [path for path in candidates if not path.name.startswith(".") and path.is_file()]
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"no image in {given} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    if others := {path.suffix.lower() for path in files} - IMAGE_SUFFIXES:
        kinds = ", ".join(sorted(others - {""})) or "without a suffix"
        logger.info(
            f"{given}: skipped {len(files) - len(images):,} files that are no images ({kinds})"
        )
    return images


@contextmanager
def _opened(image: str | ImageFile | bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; any failure within the block is its ImageError."""
    try:
        content = _content(image)
        kind = next((kind for start, kind in _STARTS.items() if content.startswith(start)), "")
        _check_metadata(content, kind)
        formats = [kind] if kind else _OTHER_FORMATS
        if content[4:8] == b"ftyp":
            from pillow_heif import register_heif_opener

            register_heif_opener(thumbnails=False)
            formats = ("HEIF", "AVIF")
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            _check_size(opened, content)
            yield opened
    except ImageError:
        raise
    except UnidentifiedImageError:
        is_page = b"<html" in content[:1000].lower()
        kind = "an HTML page" if is_page else "no image, or a damaged one"
        raise ImageError(name_of(image), f"it is {kind}") from None
    except Exception as error:
        # Pillow's decoders meet damaged bytes with almost any exception (OSError, SyntaxError,
        # ValueError, struct.error, ...); one damaged file must never end a run over thousands.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name_of(image), reason) from error


def _content(image: str | ImageFile | bytes) -> bytes:
    """Return the bytes of an image's file. Raises ValueError if it is none or too large."""
    if isinstance(image, bytes):
        size = len(image)
    elif isinstance(image, TarImage):
        size = image.size
    else:
        image = Path(image)
        if image.is_dir():
            raise ValueError("it is a folder")
        if not image.is_file():  # a pipe would wait, a device never end
            raise ValueError("it is a pipe or a device" if image.exists() else "no such file")
        size = image.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size / 1e6:,.0f} MB, more than {MAX_FILE_BYTES / 1e6:.0f}")
    return image if isinstance(image, bytes) else image.read_bytes()


def _check_metadata(content: bytes, kind: str) -> None:
    """Raise ValueError for metadata on which Pillow would spend gigabytes or minutes."""
    parts = sum(map(content.count, _PARTS.get(kind, ())))
    directories = [0] if kind == "TIFF" else []
    if kind == "JPEG":
        found = [(content.find(marker), len(marker)) for marker in (b"Exif\0\0", b"MPF\0")]
        directories = [place + length for place, length in found if place >= 0]
    is_costly = any(_claims_too_much(content, start) for start in directories)
    if parts > MAX_PARTS or is_costly or (kind == "GIF" and _image_comes_late(content)):
        raise ValueError("its metadata is too large: no camera writes such a file")


def _claims_too_much(content: bytes, start: int) -> bool:
    """Return whether the tags of a TIFF's first directory claim more than the file holds."""
    claimed = 0
    for number, (_, kind, values, _) in enumerate(_tags(content, start)):
        claimed += values * _VALUE_BYTES.get(kind, 1)
        is_long = values > MAX_PARTS and kind not in _BYTE_TYPES
        if number > MAX_PARTS or is_long or claimed > len(content):
            return True
    return False


def _tags(content: bytes, start: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (tag, type, number of values, short value) of a TIFF's first directory at ``start``."""
    is_little = content[start : start + 2] == b"II"
    is_big_tiff = content[start + 2 : start + 4] in (b"+\0", b"\0+")
    formats = ("8xQ", "Q", "HHQ8s") if is_big_tiff else ("4xI", "H", "HHI4s")
    offset, number, entry = (struct.Struct(("<" if is_little else ">") + f) for f in formats)
    with suppress(struct.error, OverflowError):  # Pillow names the damage
        place = start + offset.unpack_from(content, start)[0]
        (count,) = number.unpack_from(content, place)
        for index in range(count):
            at = place + number.size + index * entry.size
            tag, kind, values, value = entry.unpack_from(content, at)
            yield tag, kind, values, int.from_bytes(value[:2], "little" if is_little else "big")


def _image_comes_late(content: bytes) -> bool:
    """Return whether more than `MAX_GIF_BLOCKS` blocks stand before a GIF's first image."""
    flags = content[10] if len(content) > 10 else 0
    place = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # behind the color table
    is_in_extension = False
    for _ in range(MAX_GIF_BLOCKS):
        start = content[place : place + 1]
        if not start or (start in b",;" and not is_in_extension):
            return False
        if is_in_extension:  # a length and as many bytes; 0 ends it
            is_in_extension = start != b"\0"
            place += start[0] + 1
        else:
            is_in_extension = start == b"!"
            place += 1 + is_in_extension
    return True


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 (upright) to 8; Pillow turns a TIFF itself."""
    exif = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    if image.format == "TIFF" or exif[:2] not in (b"II", b"MM"):
        return 1
    found = (value for tag, kind, _, value in _tags(exif, 0) if (tag, kind) == (0x0112, 3))
    value = next(found, 1)
    return value if value in _UPRIGHT else 1


def _check_size(opened: Image.Image, content: bytes) -> None:
    """Raise ValueError if decoding would take too much memory or time, judged by the header."""
    width, height = opened.size
    if LIMITS.max_pixels == 0:
        return
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} has a side of more than {MAX_SIDE:,} pixels")
    is_jpeg = opened.format in ("JPEG", "MPO")
    most = max(LIMITS.max_pixels, MAX_JPEG_PIXELS) if is_jpeg else LIMITS.max_pixels
    if width * height > most:
        raise ValueError(
            f"{width} x {height} is more than {most / 1e6:.0f} million pixels "
            "(--max-pixels raises the limit)"
        )
    # Entropy-coded data never holds the bytes that start a scan; metadata may, a few times.
    scans = content.count(b"\xff\xda") if is_jpeg else 1
    if scans * width * height > max(MAX_SCAN_PIXELS, 10 * LIMITS.max_pixels):
        raise ValueError(f"{width} x {height} in {scans:,} scans would take minutes to decode")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale one channel of integers or floats to 0..255, where Pillow's ``convert`` would clip.

    White is the smallest of 1.0, 255 and 65,535 that holds the brightest pixel; 16-bit modes always
    use 65,535, so that a dark image stays dark. Pixels that are no number become black.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    levels = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((level for level in levels if values.max() <= level), values.max())
    pixels = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


class ImageReader:
    """Processes that read an image at a time, from any number of threads.

    One that takes too long or too much memory is ended and replaced, so that a hostile file costs
    itself alone. A script that makes a reader needs the usual ``if __name__ == "__main__":`` guard.
    """

    def __init__(self, workers: int = 1):
        self._pool = ProcessPool(
            workers,
            context=get_context("spawn"),
            initializer=_limit_process,
            initargs=[LIMITS.max_pixels, MEMORY_ABOVE_START],
        )

    def submit(self, function: Callable[..., object], *arguments: object) -> ProcessFuture:
        """Call a function of a module in one of the processes; `result_of` waits for it."""
        return self._pool.schedule(function, arguments, timeout=SECONDS_AN_IMAGE)

    def open_image(self, image: str | ImageFile | bytes) -> Image.Image:
        """As the function of that name, also of a file's bytes. Raises ImageError."""
        return result_of(self.submit(decode_image, image), name_of(image)).image

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def result_of(future: ProcessFuture, name: str) -> Any:
    """Return the result of a call that was submitted. Raises its ImageError, or one of a limit."""
    try:
        return future.result()
    except TimeoutError:
        reason = f"it takes more than {SECONDS_AN_IMAGE:.0f} s to read"
    except ProcessExpired:
        reason = "reading it ended its process: it takes too much memory, or a decoder crashed"
    except MemoryError:
        reason = f"it takes more than {MEMORY_ABOVE_START / 2**30:.0f} GiB of memory to read"
    raise ImageError(name, reason)


def _limit_process(max_pixels: int, memory: int) -> None:
    """Set the limits of a process, and leave Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    LIMITS.max_pixels = max_pixels
    # Windows has no limits, and macOS counts otherwise.
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        if max_pixels:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
