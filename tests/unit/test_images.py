"""Pictures from the outside world: all become upright RGB, or one clear error each."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from logs import log_lines
from vlm_bridge.data_pipeline.images import (
    MAX_PIXELS,
    decode_image,
    image_size,
    iter_image_paths,
    open_image,
)
from vlm_bridge.errors import DataError, ImageError


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there: decoding it would fail for another reason."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_every_mode_becomes_rgb_of_the_same_size(tmp_path: Path) -> None:
    for mode, suffix in [
        ("RGB", "jpg"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("I;16", "png"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("F", "tiff"),
    ]:
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (5, 3)).save(path)
        picture = open_image(path)
        assert (picture.mode, picture.size) == ("RGB", (5, 3)), mode
        assert image_size(path) == (5, 3)


def test_cmyk_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "red.jpg").getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert [open_image(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(4)] == [
        0,
        64,
        128,
        255,
    ]


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert open_image(tmp_path / "dark.png").getpixel((0, 0)) == (1, 1, 1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255] * 2)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: left becomes top
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = open_image(tmp_path / "turned.jpg")
    assert upright.size == image_size(tmp_path / "turned.jpg") == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[0] < 50
    assert not decode_image(tmp_path / "turned.jpg").is_plain_jpeg


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert open_image(tmp_path / "dot.png").size == (1, 1)


@pytest.mark.parametrize("side", [12_000, 7_142])
def test_huge_pictures_are_refused_from_their_header(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS
    (tmp_path / "huge.png").write_bytes(huge_png(side, side))
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match="more than 51 million pixels"):
            read(tmp_path / "huge.png")


def test_broken_files_name_their_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name, reason in [
        ("missing.jpg", "no such file"),
        ("empty.jpg", "empty"),
        ("text.jpg", "no image, or a damaged one"),
        ("cut.jpg", "truncated"),
        (".", "folder"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_paths_keep_their_order_and_folders_are_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.PNG", "sub/.hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b, c = tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "sub/c.PNG"
    assert iter_image_paths([b, tmp_path]) == [b, a, b, c]
    assert iter_image_paths([str(tmp_path / "*.png"), tmp_path / "notes.txt"]) == [
        b,
        tmp_path / "notes.txt",
    ]
    assert iter_image_paths([str(tmp_path / "**" / "*.PNG")]) == [c]


def test_files_of_a_folder_that_are_skipped_are_counted_by_kind(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "b.HEIC",
        "c.avif",
        "d.jp2",
        "e.jfif",
        "f.txt",
        "g.txt",
        "h.mov",
        "README",
        ".hidden",
    ):
        (tmp_path / name).write_bytes(b"x")
    told = log_lines()
    assert len(iter_image_paths([tmp_path])) == 5
    (line,) = told
    assert line.startswith(
        f"{tmp_path}: skipped 4 files that are no images by their names (2 .txt, "
    )
    assert "1 .mov" in line and "1 no suffix" in line


def test_missing_paths_and_empty_folders_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("missing.jpg", "empty", "*.jpg"):
        with pytest.raises(DataError):
            iter_image_paths([tmp_path / path])
