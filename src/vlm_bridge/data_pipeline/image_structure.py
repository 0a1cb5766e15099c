"""Tell the kind of an image file, and keep the parts that its pixels need.

Metadata can cost far more than pixels: two thousand EXIF tags that all point at one megabyte, comments without end,
tables of a million strips. Nobody here reads more of it than the orientation, so files are walked once, part by part,
and what decoders get has no metadata. Every walk is linear in the bytes and bounded in the parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_PARTS = 100_000
"""Segments, chunks or extensions of a file, and strips of a TIFF."""
MAX_BLOCKS = 2_000_000
"""Blocks of at most 255 bytes that a GIF's pixels are cut into."""
ORIENTATION = 0x0112


class StructureError(ValueError):
    """A file is of more parts than any program writes, or its parts are larger than it is."""


class Essentials(NamedTuple):
    """A file without its metadata.

    Attributes:
        content: that decodes to the same pixels.
        orientation: EXIF's, 1 (upright) to 8.
        is_plain: whether it is one image and nothing is done to its pixels before they are shown.
    """

    content: bytes
    orientation: int = 1
    is_plain: bool = True


def kind_of(content: bytes) -> str:
    """Return the format as Pillow names it, or what else a file is, beginning with an article."""
    for start, kind in _KINDS.items():
        if content.startswith(start):
            return kind
    if content[4:8] == b"ftyp":
        return next((kind for brand, kind in _BRANDS.items() if brand in content[8:40]), "a video")
    if content[8:12] == b"WEBP" and content.startswith(b"RIFF"):
        return "WEBP"
    if content[8:12] == b"AVI " and content.startswith(b"RIFF"):
        return "a video"
    text = content[:1000].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page"
    if b"<svg" in text:
        return "an SVG drawing"
    return "no image, or a damaged one"


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
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"hevc": "HEIF", b"mif1": "HEIF",
           b"msf1": "HEIF"}  # fmt: skip
"""Of the files that begin as MP4 does."""


def essentials(content: bytes, kind: str) -> Essentials:
    """Return a file of a kind without its metadata; a kind that is not walked as it is.

    A damaged file is given on as far as it goes: decoders say what is wrong with it.

    Raises:
        StructureError: it has too many parts, or a TIFF's tables are larger than the file.
    """
    walk = _WALKS.get(kind)
    return walk(content) if walk else Essentials(content)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 where there is none or it is damaged. At most 1,000 tags are looked at."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for place in range(start + 2, min(start + 2 + 12 * min(count, 1000), len(exif) - 11), 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, place)
        if tag == ORIENTATION:
            return value if kind == 3 and values == 1 and 1 <= value <= 8 else 1
    return 1


def _jpeg(content: bytes) -> Essentials:
    kept, orientation, is_plain, place = [content[:2]], 1, True, 2
    for _ in _counted("segments"):
        if content[place : place + 1] != b"\xff":  # garbage, or the end
            return Essentials(b"".join([*kept, content[place:]]), orientation, is_plain)
        while content[place + 1 : place + 2] == b"\xff":  # fill bytes
            place += 1
        marker = content[place + 1] if place + 1 < len(content) else 0xD9
        if marker in (0xD9, 0xDA):  # the end, or pixels, behind which come more pixels
            break
        length = int.from_bytes(content[place + 2 : place + 4])
        data = content[place + 4 : place + 2 + length]
        if marker == 0xE1 and data.startswith(b"Exif\0\0") and orientation == 1:
            orientation = exif_orientation(data)
        is_plain &= not (
            marker == 0xE2 and data.startswith(b"MPF\0")
        )  # a second image behind the first
        if not (
            0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)
        ):  # JFIF and Adobe tell the colours
            kept.append(content[place : place + 2 + length])
        place += 2 + max(length, 2)
    return Essentials(b"".join([*kept, content[place:]]), orientation, is_plain)


def _png(content: bytes) -> Essentials:
    kept, orientation, place = [content[:8]], 1, 8
    for _ in _counted("chunks"):
        if place + 12 > len(content):
            break
        end = place + 12 + int.from_bytes(content[place : place + 4])
        kind = content[place + 4 : place + 8]
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[place:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(content[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            break
    return Essentials(b"".join(kept), orientation)


def _gif(content: bytes) -> Essentials:
    """The first image of a GIF."""
    place = 13 + _colours(content[10:11])
    kept = [content[:place]]
    for _ in _counted("extensions"):
        start, kind = place, content[place : place + 1]
        if kind == b"!":
            place = _behind_blocks(content, place + 2)
            if content[start + 1 : start + 2] == b"\xf9":  # transparency
                kept.append(content[start:place])
        elif kind == b",":
            place = _behind_blocks(content, place + 11 + _colours(content[place + 9 : place + 10]))
            return Essentials(b"".join([*kept, content[start:place], b";"]))
        else:
            break
    return Essentials(b"".join([*kept, content[place:]]))


def _colours(flags: bytes) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _behind_blocks(content: bytes, place: int) -> int:
    for _ in range(MAX_BLOCKS):
        if place >= len(content) or content[place] == 0:
            return place + 1
        place += content[place] + 1
    raise StructureError(f"more than {MAX_BLOCKS:,} blocks")


def _webp(content: bytes) -> Essentials:
    """The first image of a WebP."""
    kept: list[bytes] = []
    orientation, place = 1, 12
    for _ in _counted("chunks"):
        if place + 8 > len(content):
            break
        kind, (size,) = content[place : place + 4], struct.unpack_from("<I", content, place + 4)
        chunk = content[place : place + 8 + size + size % 2]
        if kind == b"VP8X":  # without its marks of a profile, EXIF and XMP
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2C if len(chunk) > 8 else 0]) + chunk[9:]
        if kind == b"EXIF":
            orientation = exif_orientation(chunk[8:])
        elif kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM") or (
            kind == b"ANMF" and not any(part.startswith(b"ANMF") for part in kept)
        ):
            kept.append(chunk)
        place += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return Essentials(b"RIFF" + struct.pack("<I", len(body)) + body, orientation)


class _TiffLayout(NamedTuple):
    """How a TIFF writes its first directory: struct's formats of a count of entries, an entry, and an offset."""

    count: str
    entry: str
    offset: str


_CLASSIC = _TiffLayout("H", "HHI4s", "I")
_BIG = _TiffLayout("Q", "HHQ8s", "Q")
_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
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
_PIXEL_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347, 512,
     513, 514, 519, 520, 521, 529, 530, 531, 532}
)  # fmt: skip
"""Of TIFF 6.0 and its supplements: what pixels are made from."""


def _tiff(content: bytes) -> Essentials:
    """A TIFF whose first directory is a new one behind the file, of the tags that pixels need, and the only one."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    layout, header = (_BIG, 8) if is_big else (_CLASSIC, 4)
    orientation, entries = 1, []
    try:
        (start,) = struct.unpack_from(order + layout.offset, content, header)
        (count,) = struct.unpack_from(order + layout.count, content, start)
        place, step = (
            start + struct.calcsize(order + layout.count),
            struct.calcsize(order + layout.entry),
        )
        if count > MAX_PARTS:
            raise StructureError(f"{count:,} tags")
        for number in range(count):
            entry = content[place + number * step : place + (number + 1) * step]
            tag, kind, values, value = struct.unpack(order + layout.entry, entry)
            if tag == ORIENTATION and kind == 3:
                orientation = struct.unpack_from(f"{order}H", value)[0]
            if tag not in _PIXEL_TAGS:
                continue
            if values > MAX_PARTS or values * _TYPE_BYTES.get(kind, 1) > len(content):
                raise StructureError(f"a table of {values:,} values")
            entries.append(entry)
    except struct.error:
        return Essentials(content)  # decoders say what is wrong
    if len(entries) > len(_PIXEL_TAGS):
        raise StructureError("tags that come again and again")
    directory = struct.pack(order + layout.count, len(entries)) + b"".join(entries)
    content += bytes(-len(content) % 8)
    pointer = struct.pack(order + layout.offset, len(content))
    rest = content[header + len(pointer) :]
    no_other = bytes(len(pointer))
    return Essentials(
        content[:header] + pointer + rest + directory + no_other,
        orientation if 1 <= orientation <= 8 else 1,
    )


def _counted(parts: str) -> Iterator[int]:
    yield from range(MAX_PARTS)
    raise StructureError(f"more than {MAX_PARTS:,} {parts}")


_WALKS: dict[str, Callable[[bytes], Essentials]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
}
