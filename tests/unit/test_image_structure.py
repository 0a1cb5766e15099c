"""Files without their metadata: the same pixels, the same way up, whatever the metadata costs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo_server import noise
from vlm_bridge.data_pipeline import images
from vlm_bridge.data_pipeline.images import decode_image, image_size, open_image
from vlm_bridge.errors import ImageError

MEGABYTE = 1 << 20


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "HEIF":
        images._register_heif()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def frames() -> list[Image.Image]:
    return [noise(seed) for seed in range(3)]


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved(noise(0), "JPEG", comment=b"c" * 999, icc_profile=b"p" * 3000),
    "jpeg progressive": lambda: saved(noise(0), "JPEG", progressive=True, quality=30),
    "jpeg gray": lambda: saved(noise(0).convert("L"), "JPEG"),
    "jpeg cmyk": lambda: saved(noise(0).convert("CMYK"), "JPEG"),
    "jpeg restarts": lambda: saved(noise(0), "JPEG", restart_marker_blocks=1),
    "mpo": lambda: saved(noise(0), "MPO", save_all=True, append_images=frames()),
    "png": lambda: saved(noise(0), "PNG"),
    "png alpha": lambda: saved(noise(0).convert("RGBA"), "PNG"),
    "png palette": lambda: saved(noise(0).quantize(16), "PNG", transparency=3),
    "png 16 bits": lambda: saved(Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000), "PNG"),
    "apng": lambda: saved(noise(0), "PNG", save_all=True, append_images=frames()),
    "gif": lambda: saved(noise(0).quantize(64), "GIF", comment=b"words" * 99),
    "gif animated": lambda: saved(noise(0), "GIF", save_all=True, append_images=frames(), transparency=0),
    "webp": lambda: saved(noise(0), "WEBP", icc_profile=b"p" * 99, xmp=b"x" * 99),
    "webp lossless": lambda: saved(noise(0).convert("RGBA"), "WEBP", lossless=True, exact=True),
    "webp animated": lambda: saved(noise(0), "WEBP", save_all=True, append_images=frames(), lossless=True),
    "bmp": lambda: saved(noise(0), "BMP"),
    "tiff": lambda: saved(noise(0), "TIFF"),
    "tiff lzw": lambda: saved(noise(0), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: saved(noise(0), "TIFF", compression="jpeg"),
    "tiff deflate, palette": lambda: saved(noise(0).quantize(9), "TIFF", compression="tiff_deflate"),
    "tiff fax": lambda: saved(noise(0).convert("1"), "TIFF", compression="group4"),
    "tiff float": lambda: saved(noise(0).convert("F"), "TIFF"),
    "tiff alpha, pages": lambda: saved(noise(0).convert("RGBA"), "TIFF", save_all=True, append_images=frames()),
    "bigtiff": lambda: saved(noise(0), "TIFF", big_tiff=True),
    "avif": lambda: saved(noise(0), "AVIF"),
    "heif": lambda: saved(noise(0), "HEIF"),
    "jpeg 2000": lambda: saved(noise(0), "JPEG2000"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_pillow_reads(name: str) -> None:
    content = FILES[name]()
    image = open_image_of(content)
    assert image.size == image_size(content)
    if name in ("jpeg", "png", "gif", "webp lossless", "apng", "bmp", "tiff"):
        with Image.open(io.BytesIO(content)) as whole:
            rgba = whole.convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        assert image.tobytes() == white.convert("RGB").tobytes()


def open_image_of(content: bytes) -> Image.Image:
    return decode_image(content).image


def test_what_is_plain() -> None:
    plain = {name for name in FILES if decode_image(FILES[name]()).is_plain_jpeg}
    assert plain == {"jpeg", "jpeg progressive", "jpeg restarts"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_shown_upright(kind: str) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: left becomes top
    exif[0x010E] = "a description before"
    content = saved(image, kind, exif=exif)
    upright = open_image_of(content)
    assert upright.size == image_size(content) == (32, 64)
    assert upright.getpixel((16, 8))[0] > 200 and upright.getpixel((16, 56))[0] < 50


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'></svg>", "an SVG drawing"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a video"),
        (b"PK\x03\x04" + bytes(30), "an archive"),
        (b"just words", "no image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a damaged HEIF image"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, told: str) -> None:
    with pytest.raises(ImageError, match=told):
        decode_image(content)


# Files that cost more than they are.


def exif_of_many(tags: int, size: int = MEGABYTE) -> bytes:
    """EXIF whose tags all point at the same bytes."""
    table = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 0x9000 + i % 999, 7, size, table) for i in range(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4) + bytes(size)


def png(
    *chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1), rows: int | None = None
) -> bytes:
    pixels = (b"\0" + bytes(3 * size[0])) * (size[1] if rows is None else rows)
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def tiff(entries: list[tuple[int, int, int, int]], tail: int = MEGABYTE) -> bytes:
    pixel = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 4),
             (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 1)]  # fmt: skip
    table = sorted({tag: entry for entry in [*pixel, *entries] for tag in entry[:1]}.values())
    table += [entry for entry in entries if entry not in table]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in table)
    return b"II*\0" + struct.pack("<IH", 8, len(table)) + packed + bytes(4) + bytes(tail)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "jpeg, tags": lambda: _with_exif(saved(noise(0), "JPEG"), exif_of_many(2000, 30_000)),
    "jpeg, segments": lambda: b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * 2_000_000,
    "png, tags": lambda: png((b"eXIf", exif_of_many(65_535)[6:])),
    "png, chunks": lambda: png(*[(b"tEXt", b"a\0b")] * 1_500_000),
    "png, thin": lambda: png(size=(1, 10_000)),
    "webp, tags": lambda: saved(noise(0), "WEBP", exif=exif_of_many(2000)),
    "gif, comments": lambda: b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1a\0" * 4_000_000,
    "gif, one comment": lambda: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 9_000_000,
    "tiff, tags": lambda: tiff([(0x9000, 7, MEGABYTE, 200)] * 65_000),
    "tiff, strips": lambda: tiff([(273, 4, 2_000_000, 200), (279, 4, 2_000_000, 200)], 9 * MEGABYTE),
    "tiff, wide table": lambda: tiff([(320, 3, 4_000_000_000, 200)]),
}  # fmt: skip


def _with_exif(jpeg: bytes, exif: bytes) -> bytes:
    exif = exif[:65_000]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


MEASURE = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_image_structure import HOSTILE
from vlm_bridge.data_pipeline.images import decode_image
from vlm_bridge.errors import ImageError
files = {name: make() for name, make in HOSTILE.items()}
for name, content in files.items():
    started = time.process_time()
    try:
        decode_image(content)
    except ImageError:
        pass
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").open() if "VmHWM" in line) // 1024
    print(f"{name}\\t{time.process_time() - started:.2f}\\t{peak}")
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_hostile_metadata_costs_neither_time_nor_memory() -> None:
    """Together they hold some 100 MB; each would have cost gigabytes or minutes."""
    tests = Path(__file__).parent
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, tests, tests.parent],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in told.stdout.splitlines()]
    assert [name for name, *_ in rows] == list(HOSTILE)
    assert all(float(seconds) < 5 for _, seconds, _ in rows), rows
    assert int(rows[-1][2]) < 1000, rows


@pytest.mark.parametrize("name", ["tiff, strips", "jpeg, segments", "png, chunks"])
def test_parts_are_counted(name: str) -> None:
    with pytest.raises(ImageError, match="no camera writes such a file"):
        decode_image(HOSTILE[name]())


def test_an_image_of_one_long_row_is_refused() -> None:
    with pytest.raises(ImageError, match=r"1 x 51000000 has a side of more than 65,535 pixels"):
        decode_image(png(size=(1, 51_000_000), rows=9))


def test_a_large_jpeg_is_read_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(noise(0, (640, 480)), "JPEG")
    for most, size in ((640 * 480, (640, 480)), (640 * 480 - 1, (320, 240)), (20_000, (160, 120))):
        monkeypatch.setattr(images.LIMITS, "max_pixels", most)
        decoded = decode_image(content)
        assert decoded.image.size == size
        assert decoded.is_plain_jpeg is (size == (640, 480))
    with pytest.raises(ImageError, match="--max-pixels raises the limit"):
        decode_image(saved(noise(0, (640, 480)), "PNG"))
    monkeypatch.setattr(images.LIMITS, "max_pixels", 0)
    assert decode_image(content).image.size == (640, 480)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_taken_or_refused_in_time(name: str) -> None:
    content, random = FILES[name](), np.random.default_rng(len(name))
    started = time.process_time()
    for _ in range(20):
        damaged = bytearray(content)
        for place in random.integers(0, min(len(content), 400), 6):
            damaged[place] = random.integers(256)
        cut = bytes(damaged[: int(random.integers(1, len(content) + 1))])
        for candidate in (bytes(damaged), cut):
            try:
                assert open_image_of(candidate).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)
    assert time.process_time() - started < 60


def test_a_file_named_otherwise_is_read(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(FILES["jpeg"]())
    assert open_image(tmp_path / "IMG_0001.HEIC").size == (60, 40)
    assert images.iter_image_paths([tmp_path]) == [tmp_path / "IMG_0001.HEIC"]
