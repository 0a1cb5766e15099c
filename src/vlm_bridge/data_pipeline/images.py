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
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image, UnidentifiedImageError

from vlm_bridge.data_pipeline.samples import ImageFile, TarImage
from vlm_bridge.errors import DataError, ImageError, UsageError

logger = logging.getLogger(__name__)

# 50-megapixel phones (8192 x 6144) fit. Decoding that many takes seconds and, as WebP, 0.8 GB.
MAX_PIXELS = 51_000_000
MAX_SIDE = 65_535  # JPEG's own limit; every row costs memory of its own, however short it is
MAX_FILE_BYTES = 300_000_000  # MAX_PIXELS uncompressed, at six bytes a pixel
MAX_SCAN_PIXELS = 1_500_000_000  # of a progressive JPEG times its scans: each is a pass over all
MAX_TAG_VALUES = 100_000  # numbers of one TIFF tag, other than bytes
MAX_HEADER_READS = 10_000  # before the pixels; Pillow's time is quadratic in a GIF's comments
MAX_READS = 1_000_000
SECONDS_AN_IMAGE = 10.0  # in an `ImageReader`; the largest image takes two or three
LIMITS = SimpleNamespace(max_pixels=MAX_PIXELS)  # what `--max-pixels` changes; 0 is no limit

IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo",
    ".png", ".tif", ".tiff", ".webp",
})  # fmt: skip
# Pillow knows forty formats more, down to PostScript, for which it starts another program.
_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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


def open_image(image: str | ImageFile | bytes) -> Image.Image:
    """Return an image (a path, a place in a tar, or a file's bytes), upright and 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits,
    and an animation gives its first frame.

    Raises:
        ImageError: missing, empty, truncated, no image, or beyond a limit of this module.
    """
    return decode_image(image)[0]


def decode_image(image: str | ImageFile | bytes) -> tuple[Image.Image, bool]:
    """Open an image, and return whether its file is what training reads: an upright RGB JPEG."""
    with _opened(image) as opened:
        is_plain = opened.format == "JPEG" and opened.mode == "RGB" and _orientation(opened) == 1
        return upright_rgb(opened), is_plain


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image as `open_image` does. Raises Pillow's errors."""
    image.load()
    rgb, turn = _to_rgb(image), _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def check_image(image: str | ImageFile | bytes) -> None:
    """Raise ImageError where `open_image` would; a JPEG is decoded at an eighth."""
    with _opened(image) as opened:
        opened.draft(opened.mode, (opened.width // 8, opened.height // 8))  # of JPEGs alone
        _to_rgb(opened)


def image_size(image: str | ImageFile | bytes) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header alone; ImageError as `open_image`."""
    with _opened(image) as opened:
        width, height = opened.size
        is_turned = _orientation(opened) >= 5  # by a quarter
    return (height, width) if is_turned else (width, height)


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
            continue
        if not path.is_dir() and not set("*?[") & set(str(path)):
            raise DataError(f"no such image or folder: {given}")
        anchor = Path(path.anchor)  # Path.glob takes relative patterns only
        inside = path.rglob("*") if path.is_dir() else anchor.glob(str(path.relative_to(anchor)))
        files = [file for file in inside if file.is_file() and not file.name.startswith(".")]
        images = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise DataError(f"no image in {given} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        if num_others := len(files) - len(images):
            logger.info(f"{given}: skipped {num_others:,} files that are no images")
        found += images
    return found


class _MeteredFile(io.BytesIO):
    """A file in memory that refuses metadata of endless small parts."""

    reads, max_reads = 0, MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > self.max_reads:
            raise ValueError("its metadata is too large: no camera writes such a file")
        return super().read(size)


@contextmanager
def _opened(image: str | ImageFile | bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; any failure within the block is its ImageError."""
    content = b""
    try:
        content = _content(image)
        _check_tags(content)
        formats = _FORMATS
        if content[4:8] == b"ftyp":
            from pillow_heif import register_heif_opener

            register_heif_opener(thumbnails=False)
            formats = ("HEIF", "AVIF")
        file = _MeteredFile(content)
        with Image.open(file, formats=formats) as opened:
            file.max_reads = MAX_READS
            _check_size(opened, content)
            yield opened
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders meet damaged bytes with almost any exception (OSError, SyntaxError,
        # ValueError, struct.error, ...); one damaged file must never end a run over thousands.
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            is_page = b"<html" in content[:1000].lower()
            reason = f"it is {'an HTML page' if is_page else 'no image, or a damaged one'}"
        raise ImageError(_name_of(image), reason) from error


def _name_of(image: str | ImageFile | bytes) -> str:
    return f"in memory ({len(image)} bytes)" if isinstance(image, bytes) else str(image)


def _content(image: str | ImageFile | bytes) -> bytes:
    """Return the bytes of an image's file. Raises ValueError if it is none or too large."""
    if isinstance(image, bytes):
        size = len(image)
    elif isinstance(image, TarImage):
        size = image.size
    else:
        image = Path(image)
        if not image.is_file():  # a pipe would wait, a device never end
            raise ValueError("it is a folder or a pipe" if image.exists() else "no such file")
        size = image.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size / 1e6:,.0f} MB, more than {MAX_FILE_BYTES / 1e6:.0f}")
    return image if isinstance(image, bytes) else image.read_bytes()


def _check_tags(content: bytes) -> None:
    """Raise ValueError for tags of a TIFF or JPEG on which Pillow would spend gigabytes."""
    starts = [0] if content.startswith(_TIFF_STARTS) else []
    if content.startswith(b"\xff\xd8\xff"):
        found = [(content.find(marker), len(marker)) for marker in (b"Exif\0\0", b"MPF\0")]
        starts = [place + length for place, length in found if place >= 0]
    for start in starts:
        claimed = 0
        for _, kind, values, _ in _tags(content, start):
            claimed += values * _VALUE_BYTES.get(kind, 1)
            is_long = values > MAX_TAG_VALUES and _VALUE_BYTES.get(kind, 1) > 1
            if is_long or claimed > len(content):
                raise ValueError("its metadata is too large: no camera writes such a file")


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


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 (upright) to 8; Pillow turns a TIFF itself."""
    exif = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    if image.format == "TIFF" or exif[:2] not in (b"II", b"MM"):
        return 1
    found = (value for tag, kind, _, value in _tags(exif, 0) if (tag, kind) == (0x0112, 3))
    value = next(found, 1)
    return value if value in _UPRIGHT else 1


def _check_size(opened: Image.Image, content: bytes) -> None:
    """Raise ValueError if decoding would take too much memory or time, judged by the header.

    A JPEG beyond the limit of pixels is decoded at a half, which costs a quarter.
    """
    width, height = opened.size
    # Entropy-coded data never holds the bytes that start a scan; metadata may, a few times.
    scans = content.count(b"\xff\xda") if opened.format in ("JPEG", "MPO") else 1
    if LIMITS.max_pixels == 0:
        return
    if scans * width * height > max(MAX_SCAN_PIXELS, 10 * LIMITS.max_pixels):
        raise ValueError(f"{width} x {height} in {scans:,} scans would take minutes to decode")
    if width * height > LIMITS.max_pixels:
        opened.draft(opened.mode, (width // 2, height // 2))
    if max(width, height) > MAX_SIDE or opened.width * opened.height > LIMITS.max_pixels:
        raise ValueError(
            f"{width} x {height} is too large: at most {LIMITS.max_pixels / 1e6:.0f} million "
            f"pixels (--max-pixels raises the limit) and {MAX_SIDE:,} a side"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Where Pillow's `convert` would clip, white is the smallest of 1.0, 255 and 65,535 that
        # holds the brightest pixel; always 65,535 in 16-bit modes, so that dark images stay dark.
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        levels = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
        white = next((level for level in levels if values.max() <= level), values.max())
        pixels = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class ImageReader:
    """Processes that read an image at a time, from any number of threads.

    One that takes too long or crashes is replaced, so that a hostile file costs itself alone. A
    script that makes a reader needs the usual ``if __name__ == "__main__":`` guard.
    """

    def __init__(self, workers: int = 1):
        start = {"initializer": _start_process, "initargs": [LIMITS.max_pixels]}
        self._pool = ProcessPool(workers, context=get_context("spawn"), **start)

    def submit(
        self, name: str, function: Callable[..., Any], *arguments: object
    ) -> Callable[[], Any]:
        """Call a function in one of the processes; return a function that waits for its result.

        It raises the ImageError of the call, or one for ``name`` at a limit.
        """
        future = self._pool.schedule(function, arguments, timeout=SECONDS_AN_IMAGE)
        return partial(_result_of, future, name)

    def open_image(self, image: str | ImageFile | bytes) -> Image.Image:
        """As the function of that name. Raises ImageError."""
        return self.submit(_name_of(image), open_image, image)()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()  # whatever the processes are doing
        self._pool.join()


def _result_of(future: ProcessFuture, name: str) -> Any:
    try:
        return future.result()
    except TimeoutError:
        reason = f"it takes more than {SECONDS_AN_IMAGE:.0f} s to read"
    except ProcessExpired:
        reason = "reading it ended its process: it takes too much memory, or a decoder crashed"
    except BrokenProcessPool:  # a new process runs the script that started it, as far as that goes
        raise UsageError(
            "processes that read images could not start: in a script, put what it calls below "
            "`if __name__ == '__main__':`"
        ) from None
    raise ImageError(name, reason)


def _start_process(max_pixels: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    LIMITS.max_pixels = max_pixels
