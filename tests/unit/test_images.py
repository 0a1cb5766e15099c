"""Images from outside: all become upright RGB, or one clear error each, at a bounded cost."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_files import FILES, noise, saved
from logs import log_lines
from vlm_bridge.data_pipeline import images
from vlm_bridge.data_pipeline.images import (
    ImageReader,
    decode_image,
    image_size,
    iter_image_paths,
    open_image,
    upright_rgb,
)
from vlm_bridge.errors import DataError, ImageError

MEGABYTE = 1 << 20


@pytest.mark.parametrize("name", FILES)
def test_every_format_becomes_rgb(name: str) -> None:
    content = FILES[name]()
    image, is_plain = decode_image(content)
    assert image.mode == "RGB" and image.size == image_size(content)
    assert is_plain == (name in ("jpeg", "jpeg progressive", "jpeg restarts")), "copied unchanged"
    if name in ("png palette", "gif animated", "webp lossless", "apng", "bmp", "tiff", "jpeg"):
        with Image.open(io.BytesIO(content)) as whole:
            rgba = whole.convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        assert image.tobytes() == white.convert("RGB").tobytes()


def test_colors_are_kept_in_every_mode() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = open_image(saved(cmyk, "JPEG", quality=95)).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60
    values = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    deep = open_image(saved(Image.fromarray(values), "PNG"))
    assert [deep.getpixel((x, 0))[0] for x in range(4)] == [0, 64, 128, 255]
    dark = saved(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)), "PNG")
    assert open_image(dark).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_shown_upright(kind: str) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: left becomes top
    exif[0x010E] = "a description before"
    content = saved(image, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as of_the_caller:
        versions = [open_image(content), upright_rgb(of_the_caller)]
    for upright in versions:
        assert upright.size == image_size(content) == (32, 64)
        assert upright.getpixel((16, 8))[0] > 200 and upright.getpixel((16, 56))[0] < 50
    assert not decode_image(content)[1]


def test_broken_files_name_their_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, content, reason in [
        ("missing.jpg", None, "no such file"),
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"not an image", "no image, or a damaged one"),
        ("page.jpg", b"<!DOCTYPE html><html></html>", "an HTML page"),
        ("cut.jpg", FILES["jpeg"]()[:5000], "truncated"),
        ("pipe.jpg", None, "a pipe"),
        (".", None, "a folder"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name) and "\n" not in str(caught.value)
    (tmp_path / "IMG_0001.HEIC").write_bytes(FILES["jpeg"]())
    assert open_image(tmp_path / "IMG_0001.HEIC").size == (60, 40)


def exif_of_many(tags: int, size: int = MEGABYTE) -> bytes:
    """EXIF whose tags all point at the same bytes."""
    return b"Exif\0\0" + tiff(*[(0x9000, 7, size, 14 + 12 * tags)] * tags, tail=size, pixel=())


def jpeg_with(exif: bytes) -> bytes:
    jpeg, exif = FILES["jpeg"](), exif[:65_000]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1), rows: int = 1) -> bytes:
    """A PNG of a row or more, with further chunks."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(3 * size[0])) * rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


Tag = tuple[int, int, int, int]
PIXEL: tuple[Tag, ...] = (
    *((tag, 3, 1, 1) for tag in (256, 257, 259, 262, 277, 278)),
    *((258, 3, 1, 8), (273, 4, 1, 4), (279, 4, 1, 1)),
)


def tiff(*tags: Tag, tail: int = MEGABYTE, pixel: tuple[Tag, ...] = PIXEL) -> bytes:
    """A TIFF of one pixel, with further tags or others in their place."""
    given = {tag for tag, *_ in tags}
    table = sorted([*tags, *(tag for tag in pixel if tag[0] not in given)])
    packed = b"".join(struct.pack("<HHII", *tag) for tag in table)
    return b"II*\0" + struct.pack("<IH", 8, len(table)) + packed + bytes(4) + bytes(tail)


GIF = b"GIF89a\1\0\1\0\0\0\0"
STRIPS = [(273, 4, 2_000_000, 200), (279, 4, 2_000_000, 200)]
HOSTILE: dict[str, Callable[[], bytes]] = {
    "jpeg, tags": lambda: jpeg_with(exif_of_many(2000, 30_000)),
    "jpeg, segments": lambda: b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * 2_000_000,
    "png, chunks": lambda: png(*[(b"tEXt", b"a\0b")] * 1_000_000),
    "gif, comments": lambda: GIF + b"!\xfe\1a\0" * 4_000_000,
    "gif, one comment": lambda: GIF + b"!\xfe" + b"\1a" * 9_000_000,
    "gif, late comment": lambda: GIF + b"x!\xfe" + b"\1a" * 9_000_000,
    "tiff, tags": lambda: tiff(*[(0x9000, 7, MEGABYTE, 200)] * 65_000),
    "tiff, strips": lambda: tiff(*STRIPS, tail=9 * MEGABYTE),
    "tiff, wide table": lambda: tiff((320, 3, 4_000_000_000, 200)),
}
HARMLESS: dict[str, Callable[[], bytes]] = {  # here, not everywhere
    "png, tags": lambda: png((b"eXIf", exif_of_many(65_535)[6:])),
    "png, thin": lambda: png(size=(1, 10_000), rows=10_000),
    "webp, tags": lambda: saved(noise(), "WEBP", exif=exif_of_many(2000)),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
@pytest.mark.parametrize("name", HOSTILE | HARMLESS)
def test_hostile_metadata_costs_neither_time_nor_memory(name: str) -> None:
    """Each would have cost gigabytes or minutes."""
    content = (HOSTILE | HARMLESS)[name]()
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in HOSTILE:
        with pytest.raises(ImageError, match="no camera writes such a file"):
            open_image(content)
    else:
        assert open_image(content).mode == "RGB"
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("size", [(7_142, 7_142), (1, 50_000_000)])
def test_huge_images_are_refused(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} is too large.*--max-pixels"):
            read(png(size=size))
    monkeypatch.setattr(images.LIMITS, "max_pixels", 0)
    assert image_size(png(size=size)) == size


def test_a_large_jpeg_is_read_at_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(noise(0, (640, 480)), "JPEG")
    for most, size in ((640 * 480, (640, 480)), (640 * 480 - 1, (320, 240))):
        monkeypatch.setattr(images.LIMITS, "max_pixels", most)
        assert open_image(content).size == image_size(content) == size
    monkeypatch.setattr(images.LIMITS, "max_pixels", 320 * 240 - 1)
    with pytest.raises(ImageError, match="too large"):
        open_image(content)


def misbehave(task: str) -> str:
    if task == "die":
        os._exit(9)
    time.sleep(600 if task == "sleep" else 0)
    return task.upper()


def test_a_task_that_takes_too_much_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with ImageReader(2) as reader:
        assert reader.open_image(FILES["gif"]()).tobytes() == open_image(FILES["gif"]()).tobytes()
        with pytest.raises(ImageError, match=r"in memory \(5 bytes\): it is no image"):
            reader.open_image(b"words")
        monkeypatch.setattr(images, "SECONDS_AN_IMAGE", 2)
        tasks = ("a", "sleep", "b", "die", "c")
        results = {task: reader.submit(task, misbehave, task) for task in tasks}
        assert [results[task]() for task in "abc"] == ["A", "B", "C"]
        for task, reason in (("sleep", "more than 2 s"), ("die", "ended its process")):
            with pytest.raises(ImageError, match=f"{task}.*{reason}"):
                results[task]()


def test_a_script_without_the_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vlm_bridge.data_pipeline.images import ImageReader\n"
        "with ImageReader() as reader: reader.open_image('photo.jpg')\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.stderr.endswith("put what it calls below `if __name__ == '__main__':`\n")


def test_paths_keep_their_order_and_folders_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ("a.jpg", "b.png", "sub/c.PNG", "notes.txt", "sub/.hidden.png")
    a, b, c, notes, hidden = (tmp_path / name for name in names)
    for path in (b, a, c, hidden, notes):
        path.touch()
    logged = log_lines()
    assert iter_image_paths([b, tmp_path]) == [b, a, b, c]
    assert logged == [f"{tmp_path}: skipped 1 files that are no images"]
    patterns = (str(tmp_path / "*.png"), notes, str(tmp_path / "**" / "*.PNG"))
    assert iter_image_paths(patterns) == [b, notes, c]
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    for path in ("missing.jpg", "empty", "*.tiff", "pipe.jpg"):
        with pytest.raises(DataError):
            iter_image_paths([tmp_path / path])
