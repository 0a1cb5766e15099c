"""Captioned images in WebDataset shards, which are read from where they lie.

::

    ROOT/{train,val,test}/*.tar     samples KEY.jpg|jpeg|png|webp with KEY.txt, KEY.json or both
    ROOT/.shards/SPLIT/NAME.index   captions, and where images lie in one tar; renewed with the tar

As in img2dataset and the WebDataset library, a key is a member's path up to the first dot of its
file name, and the rest is its extension.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import tarfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, NonNegativeInt, ValidationError

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.loader import logged
from vlm_bridge.data_pipeline.samples import (
    CaptionedImage,
    DataFolder,
    Skipped,
    TarImage,
    inside,
)
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text, parse_json, shown

IMAGES, TEXTS, RECORDS = ("jpg", "jpeg", "png", "webp"), ("txt",), ("json",)
MAX_IMAGE_BYTES = 100_000_000
MAX_TEXT_BYTES = 1_000_000
MAX_HEADER_BYTES = 1_000_000  # a member's name and attributes, which tarfile reads whole
# Names in front of names without end recurse.
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class ShardSample(NamedTuple):
    """A sample of a shard: its caption, and where its image lies."""

    key: str
    caption: str
    member: str
    offset: NonNegativeInt
    size: NonNegativeInt


class Shard(BaseModel):
    """Content of one tar, as kept in its index.

    Attributes:
        checksum: over names of images and places of images and captions.
        skipped: (name of a sample or member, reason); the name is empty for the rest of the tar.
    """

    layout: Literal["vlm-bridge shard index 3"] = "vlm-bridge shard index 3"
    num_bytes: int
    mtime_ns: int
    checksum: str
    samples: list[ShardSample]
    skipped: list[tuple[str, str]]

    def images(self, path: Path) -> list[CaptionedImage]:
        return [
            CaptionedImage(TarImage(path, s.offset, s.size, s.member), (s.caption,), s.key)
            for s in self.samples
        ]


def read_shard(path: Path) -> Shard:
    """Read the headers and captions of a tar; images are not decoded.

    A sample that cannot be used is skipped. A tar that was cut off gives the samples before.

    Raises:
        DataError: the tar cannot be read.
    """
    samples, names, places = [], bytearray(), bytearray()
    try:
        status = path.stat()
        with _Headers(path) as file:
            members, skipped, cut = _members(file, path.parent, status.st_size)
            for key, parts in members.items():
                try:
                    image, text, caption, is_json = _sample(parts, file)
                except ValueError as error:
                    if not cut or key != next(reversed(members)):
                        skipped.append((key, str(error)))
                    continue
                names += image.name.encode(errors="surrogateescape")
                place = image.offset_data, image.size, text.offset_data, text.size, is_json
                places += struct.pack("<qiqi?i", *place, len(names))
                found = _printable(key), caption, _printable(image.name)
                samples.append(ShardSample(*found, image.offset_data, image.size))
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from None
    if cut:
        skipped.append(("", f"cut off or damaged {cut}: {len(samples):,} samples before are read"))
    return Shard(
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        checksum=hashlib.blake2b(places + names, digest_size=16).hexdigest(),
        samples=samples,
        skipped=[(_printable(name), _printable(reason)) for name, reason in skipped],
    )


class _Headers(io.FileIO):
    """A file of which never much is read at once, whatever size a header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size) or b""


Parts = dict[str, tarfile.TarInfo | None]  # by extension; None for one that came twice


def _members(
    file: _Headers, folder: Path, num_bytes: int
) -> tuple[dict[str, Parts], list[tuple[str, str]], str]:
    """Return the parts of each sample by key, skipped members, and where the tar is cut off."""
    found: dict[str, Parts] = {}
    skipped: list[tuple[str, str]] = []
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the caller closes the file
        for member in tar:
            # Sizes below zero lead back, and round for ever.
            if member.size < 0 or member.offset < end:
                raise tarfile.ReadError("a member before the last one")
            end = member.offset_data
            if not (member.isdir() or member.issym() or member.islnk() or member.isdev()):
                end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.offset_data + member.size > num_bytes:
                raise tarfile.ReadError(f"{member.name} is not whole")
            if problem := _problem(member, folder):
                skipped.append((member.name, problem))
            elif not member.isdir():
                key, extension = _key_of(member.name)
                parts = found.setdefault(key, {})
                parts[extension] = None if extension in parts else member
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return found, skipped, f"at byte {file.tell():,} ({reason})"
    # tarfile takes any damaged header for the end; the true one is a block of zeros.
    file.seek(end)
    is_end = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    return found, skipped, "" if is_end else f"at byte {end:,}"


def _problem(member: tarfile.TarInfo, folder: Path) -> str:
    if member.issparse() or not (member.isreg() or member.isdir()):
        return "a link, device or sparse file"
    try:
        inside(folder, member.name)
    except ValueError:
        return "its name leads out of the shard"
    return ""


def _key_of(member: str) -> tuple[str, str]:
    """Split a member's name into key and extension: ``a/b.c.JPG`` is ``("a/b", "c.jpg")``."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _sample(parts: Parts, file: _Headers) -> tuple[tarfile.TarInfo, tarfile.TarInfo, str, bool]:
    """Return the image, the member that holds the caption, the caption, and whether it is JSON.

    Raises ValueError with the reason where the sample cannot be used.
    """
    record, metadata = _pick(parts, RECORDS), {}
    if record is not None:
        with contextlib.suppress(ValueError, TypeError):
            metadata = dict(parse_json(_content(record, file)))
    image, member = _pick(parts, IMAGES), _pick(parts, TEXTS)
    if (status := metadata.get("status", "success")) != "success":
        raise ValueError(f"img2dataset status {shown(status)} of {shown(metadata.get('url'))}")
    if image is None:
        raise ValueError("it has no image")
    try:
        caption = _content(member, file).decode("utf-8").strip() if member is not None else ""
    except UnicodeError:
        raise ValueError("its caption is not UTF-8 text") from None
    # Where the .txt is missing or empty, img2dataset's .json still has the caption.
    if is_json := not caption:
        member, caption = record, metadata.get("caption")
    if member is None or not is_text(caption) or not caption.strip():
        raise ValueError("it has no caption")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"a caption of {len(caption):,} characters")
    return image, member, caption, is_json


def _pick(parts: Parts, kinds: tuple[str, ...]) -> tarfile.TarInfo | None:
    """Return the member of a kind: ``jpg`` goes before ``input.jpg``.

    Raises:
        ValueError: there are several, or it is too large.
    """
    found = [extension for extension in parts if extension in kinds]
    found = found or [extension for extension in parts if extension.rpartition(".")[2] in kinds]
    if not found:
        return None
    member = parts[found[0]]
    if kinds != RECORDS and (member is None or len(found) > 1):
        raise ValueError(f"it has several {', '.join(found[:3])}; a key ends at the first dot")
    limit = MAX_IMAGE_BYTES if kinds == IMAGES else MAX_TEXT_BYTES
    if member is not None and member.size > limit:
        raise ValueError(f"its .{found[0]} has {member.size / 1e6:,.0f} MB")
    return member


def _content(member: tarfile.TarInfo, file: _Headers) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def kept_shard(path: Path, index: Path) -> Shard:
    """Return the content of a tar from its index if the tar has not changed, or else from the tar.

    Raises:
        DataError: the tar cannot be read.
    """
    with contextlib.suppress(OSError, ValidationError):
        status = path.stat()
        shard = Shard.model_validate_json(index.read_bytes())
        fits = all(sample.offset + sample.size <= status.st_size for sample in shard.samples)
        if fits and (shard.num_bytes, shard.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return shard
    shard = read_shard(path)
    with contextlib.suppress(OSError):  # a read-only folder
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, shard.model_dump_json().encode())
    return shard


class ShardFolder(DataFolder):
    """A folder of shards, in place of a `CaptionFolder`; make one with :meth:`open`.

    Attributes:
        tars: the shards of each split, by name.
    """

    def __init__(self, root: Path, tars: dict[str, list[Path]]):
        super().__init__(root)
        self.tars, self.notes_dir = tars, root / ".shards"
        self._kept: dict[str, list[Shard]] = {}

    @classmethod
    def open(cls, root: str | Path) -> ShardFolder:
        """Find the shards below ``root``; no tar is read yet.

        Raises:
            DataError: there is no shard, or one is compressed.
        """
        tars: dict[str, list[Path]] = {}
        for split in SPLITS:
            paths = sorted(Path(root, split).glob("[!.]*"))
            for path in paths:
                plain = path.with_suffix("")
                if plain.suffix == ".tar" and plain not in paths:
                    raise DataError(f"{path} is compressed: run gunzip, unxz or unzstd on it first")
            if found := [path for path in paths if path.suffix == ".tar" and path.is_file()]:
                tars[split] = found
        if not tars:
            folders = f"{root}/{{{','.join(SPLITS)}}}"
            raise DataError(f"no shard (*.tar) in {folders}: move or link them into these folders")
        return cls(Path(root), tars)

    @property
    def splits(self) -> list[str]:
        """The splits that have shards, which need not be read to know it."""
        return list(self.tars)

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the headers as they are now."""
        return self._fingerprint({s: list(map(read_shard, tars)) for s, tars in self.tars.items()})

    def _load_manifest(self) -> dict[str, Any]:
        shards = {split: self._shards(split) for split in self.tars}
        counts = {
            split: {"images": sum(len(shard.samples) for shard in found), "shards": len(found)}
            for split, found in shards.items()
        }
        fingerprint = self._fingerprint(shards)
        return {"source": "shards", "counts": counts, "fingerprint": fingerprint}

    def _read(self, split: SplitName, skipped: Skipped) -> list[CaptionedImage]:
        images = []
        for path, shard in zip(self.tars[split], self._shards(split), strict=True):
            images += shard.images(path)
            skipped.total += len(shard.samples) + len(shard.skipped)
            for member, reason in shard.skipped:
                skipped.add(f"{path}/{member}" if member else path, reason)
        return images

    def _shards(self, split: str) -> list[Shard]:
        if split not in self._kept:
            tars, indices = self.tars[split], self.root / ".shards" / split
            paths = logged(tars, len(tars), f"{split}: headers read of %s of %s shards")
            self._kept[split] = [kept_shard(tar, indices / f"{tar.name}.index") for tar in paths]
        return self._kept[split]

    def _fingerprint(self, shards: dict[str, list[Shard]]) -> str:
        """Hash names and sizes of shards, names of images, and places of the content."""
        total = hashlib.sha256()
        for split, paths in self.tars.items():
            for path, shard in zip(paths, shards[split], strict=True):
                line = f"{split}/{path.name}\t{shard.num_bytes}\t{shard.checksum}\n"
                total.update(line.encode())
        return f"sha256:{total.hexdigest()}"
