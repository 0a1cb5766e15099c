"""Captioned images in WebDataset shards, which are read from where they lie.

::

    ROOT/{train,val,test}/*.tar    samples KEY.jpg|jpeg|png|webp with KEY.txt, KEY.json or both

As in img2dataset and the WebDataset library, a key is a member's path up to the first dot of its
file name, and the rest is its extension.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.loader import logged
from vlm_bridge.data_pipeline.samples import (
    CaptionedImage,
    DataFolder,
    Skipped,
    TarImage,
    stays_inside,
)
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, parse_json, shown

IMAGES, TEXTS, RECORDS = ("jpg", "jpeg", "png", "webp"), ("txt",), ("json",)
MAX_IMAGE_BYTES = 100_000_000
MAX_TEXT_BYTES = 1_000_000
MAX_HEADER_BYTES = 1_000_000  # a member's name and attributes, which tarfile reads whole
# A long chain of headers for long names makes tarfile recurse.
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)

Parts = dict[str, list[tarfile.TarInfo]]  # members of a sample by extension


@dataclass(frozen=True)
class Shard:
    """Content of one tar.

    Attributes:
        skipped: (name of a sample or member, reason); the name is empty for the rest of the tar.
        checksum: over names of images and places of images and captions.
    """

    images: list[CaptionedImage]
    skipped: list[tuple[str, str]]
    num_bytes: int
    checksum: str


def read_shard(path: Path) -> Shard:
    """Read the headers and captions of a tar; images are not decoded.

    A sample that cannot be used is skipped. A tar that was cut off gives the samples before.

    Raises:
        DataError: the tar cannot be read.
    """
    images, names, places = [], bytearray(), bytearray()
    try:
        num_bytes = path.stat().st_size
        with _Headers(path) as file:
            members, skipped, cut = _members(file, num_bytes)
            for key, parts in members.items():
                try:
                    image, text, caption, is_json = _sample(parts, file)
                except ValueError as error:
                    skipped.append((key, str(error)))
                    continue
                place = image.offset_data, image.size
                found = TarImage(path, *place, _printable(image.name))
                images.append(CaptionedImage(found, (caption,), _printable(key)))
                names += image.name.encode(errors="surrogateescape")
                places += struct.pack(
                    "<qiqi?i", *place, text.offset_data, text.size, is_json, len(names)
                )
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from None
    if cut:
        skipped.append(("", f"cut off or damaged {cut}: {len(images):,} samples before are read"))
    skipped = [(_printable(name), _printable(reason)) for name, reason in skipped]
    checksum = hashlib.blake2b(places + names, digest_size=16).hexdigest()
    return Shard(images, skipped, num_bytes, checksum)


class _Headers(io.FileIO):
    """A file that reads no large header, whatever size the tar claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size) or b""


def _members(file: _Headers, num_bytes: int) -> tuple[dict[str, Parts], list[tuple[str, str]], str]:
    """Return the parts of each sample by key, skipped members, and where the tar is cut off."""
    found: dict[str, Parts] = {}
    skipped: list[tuple[str, str]] = []
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the caller closes the file
        for member in tar:
            # With a size below zero tarfile would read the same member again.
            if member.size < 0 or member.offset < end:
                raise tarfile.ReadError("a member before the last one")
            end = member.offset_data
            if not (member.isdir() or member.issym() or member.islnk() or member.isdev()):
                end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.offset_data + member.size > num_bytes:
                raise tarfile.ReadError(f"{member.name} is not whole")
            if member.issparse() or not (member.isreg() or member.isdir()):
                skipped.append((member.name, "a link, device or sparse file"))
            elif not stays_inside(member.name):
                skipped.append((member.name, "its name leads out of the shard"))
            elif not member.isdir():
                key, extension = _key_of(member.name)
                found.setdefault(key, {}).setdefault(extension, []).append(member)
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return found, skipped, f"at byte {file.tell():,} ({reason})"
    # tarfile takes any damaged header for the end; the true one is a block of zeros.
    file.seek(end)
    is_end = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    return found, skipped, "" if is_end else f"at byte {end:,}"


def _key_of(member: str) -> tuple[str, str]:
    """Split a member's name into key and extension: ``a/b.c.JPG`` is ``("a/b", "c.jpg")``."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _sample(parts: Parts, file: _Headers) -> tuple[tarfile.TarInfo, tarfile.TarInfo, str, bool]:
    """Return the image, the member that holds the caption, the caption, and whether it is JSON.

    Raises ValueError with the reason where the sample cannot be used.
    """
    image, text, record = (_pick(parts, kinds) for kinds in (IMAGES, TEXTS, RECORDS))
    metadata: dict[str, Any] = {}
    if record is not None:
        with contextlib.suppress(ValueError, TypeError):
            metadata = dict(parse_json(_content(record, file)))
    if (status := metadata.get("status", "success")) != "success":
        raise ValueError(f"img2dataset status {shown(status)} of {shown(metadata.get('url'))}")
    if image is None:
        raise ValueError("it has no image")
    try:
        caption = _content(text, file).decode("utf-8").strip() if text is not None else ""
    except UnicodeError:
        raise ValueError("its caption is not UTF-8 text") from None
    # Where the .txt is missing or empty, img2dataset's .json still has the caption.
    if is_json := not caption:
        text, caption = record, metadata.get("caption")
    if text is None or not is_text(caption) or not caption.strip():
        raise ValueError("it has no caption")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"a caption of {len(caption):,} characters")
    return image, text, caption, is_json


def _pick(parts: Parts, kinds: tuple[str, ...]) -> tarfile.TarInfo | None:
    """Return the member of a kind: ``jpg`` goes before ``input.jpg``.

    Raises ValueError where there are several, or it is too large.
    """
    found = [extension for extension in parts if extension in kinds]
    found = found or [extension for extension in parts if extension.rpartition(".")[2] in kinds]
    members = [member for extension in found for member in parts[extension]]
    if not members:
        return None
    if len(members) > 1 and kinds != RECORDS:
        raise ValueError(f"it has several {', '.join(found[:3])}; a key ends at the first dot")
    if members[0].size > (MAX_IMAGE_BYTES if kinds == IMAGES else MAX_TEXT_BYTES):
        raise ValueError(f"its .{found[0]} has {members[0].size / 1e6:,.0f} MB")
    return members[0]


def _content(member: tarfile.TarInfo, file: _Headers) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class ShardFolder(DataFolder):
    """A folder of shards, in place of a `CaptionFolder`; make one with :meth:`open`.

    Attributes:
        tars: the shards of each split, by name.
    """

    def __init__(self, root: Path, tars: dict[str, list[Path]]):
        super().__init__(root)
        self.tars = tars
        self._shards = cache(self._read_shards)

    @classmethod
    def open(cls, root: str | Path) -> ShardFolder:
        """Find the shards below ``root``; no tar is read yet.

        Raises:
            DataError: there is no shard, or one is compressed.
        """
        tars: dict[str, list[Path]] = {}
        for split in SPLITS:
            if found := sorted(Path(root, split).glob("[!.]*.tar")):
                tars[split] = found
            elif packed := next(Path(root, split).glob("*.tar.*"), None):
                raise DataError(f"{packed} is compressed: run gunzip, unxz or unzstd on it first")
        if not tars:
            folders = f"{root}/{{{','.join(SPLITS)}}}"
            raise DataError(f"no shard (*.tar) in {folders}: move or link them into these folders")
        return cls(Path(root), tars)

    @property
    def splits(self) -> list[str]:
        """The splits that have shards, which need not be read to know it."""
        return list(self.tars)

    def compute_fingerprint(self) -> str:
        """Hash names and sizes of shards, names of images, and places of the content."""
        total = hashlib.sha256()
        for split, paths in self.tars.items():
            for path, shard in zip(paths, self._shards(split), strict=True):
                line = f"{split}/{path.name}\t{shard.num_bytes}\t{shard.checksum}\n"
                total.update(line.encode())
        return f"sha256:{total.hexdigest()}"

    def _load_manifest(self) -> dict[str, Any]:
        counts = {
            split: {"images": sum(len(shard.images) for shard in self._shards(split))}
            for split in self.tars
        }
        return {"source": "shards", "counts": counts, "fingerprint": self.compute_fingerprint()}

    def _read(self, split: SplitName, skipped: Skipped) -> list[CaptionedImage]:
        images = []
        for path, shard in zip(self.tars[split], self._shards(split), strict=True):
            images += shard.images
            skipped.total += len(shard.images) + len(shard.skipped)
            for member, reason in shard.skipped:
                skipped.add(f"{path}/{member}" if member else path, reason)
        return images

    def _read_shards(self, split: str) -> list[Shard]:
        tars = self.tars[split]
        return [*map(read_shard, logged(tars, len(tars), f"{split}: read %s of %s shards"))]
