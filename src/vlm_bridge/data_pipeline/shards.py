"""Captioned images in WebDataset shards, which are read from where they lie.

::

    ROOT/{train,val,test}/*.tar     samples KEY.jpg|jpeg|png|webp with KEY.txt, KEY.json or both
    ROOT/.shards/SPLIT/NAME.index   captions, and where images lie in one tar; renewed with the tar

The layout is that of img2dataset and of the WebDataset library: a key is a member's path up to the
first dot of its file name, and the rest is its extension. ``s0.input.jpg`` is the image of ``s0``
where it has no ``s0.jpg``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, NonNegativeInt, ValidationError

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.loader import logged
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped, TarImage, inside
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text, parse_json, shown

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 100_000_000
MAX_TEXT_BYTES = 1_000_000
MAX_HEADER_BYTES = 1_000_000  # a member's name and attributes, which tarfile reads whole
CUT_AT_FIRST_DOT = "the key of a sample ends at the first dot of a name: rename the members"
DECOMPRESS = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
# What tarfile meets damaged headers with; names in front of names without end recurse.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_PLACES = struct.Struct("<qiqi?i")
T = TypeVar("T")


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
        mtime_ns: modification time of the tar.
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
        """Return the samples as images in the tar at ``path``."""
        return [
            CaptionedImage(TarImage(path, s.offset, s.size, s.member), (s.caption,), s.key)
            for s in self.samples
        ]


def read_shard(path: Path) -> Shard:
    """Read the headers and captions of a tar; a tar that was cut off gives the samples before.

    Images are not decoded. A sample that cannot be used is skipped.

    Raises:
        DataError: the tar cannot be read.
    """
    parts: dict[str, _Parts] = {}
    skipped: list[tuple[str, str]] = []
    key = cut = ""
    try:
        status = path.stat()
        with _Headers(path) as file:
            try:
                for member in _members(file, status.st_size):
                    if problem := _problem(member, path):
                        skipped.append((member.name, problem))
                        continue
                    key, extension = key_of(member.name)
                    parts.setdefault(key, _Parts(key)).add(extension, member, file)
            except tarfile.ReadError as error:
                cut = str(error)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from None
    samples, names, places = [], bytearray(), bytearray()
    for part in parts.values():
        try:
            image, text, caption, is_json = part.finish()
        except ValueError as error:
            if not (cut and part.key == key):  # a member of the last sample is cut off
                skipped.append((part.key, str(error)))
            continue
        names += image.name.encode(errors="surrogateescape")
        place = (image.offset_data, image.size, text.offset_data, text.size, is_json, len(names))
        places += _PLACES.pack(*place)
        name = _printable(image.name)
        samples.append(ShardSample(key_of(name)[0], caption, name, image.offset_data, image.size))
    if cut:
        kept = f"the {len(samples):,} samples before are read, the rest is lost"
        skipped.append(("", f"cut off or damaged {cut}: {kept}"))
    return Shard(
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        checksum=hashlib.blake2b(places + names, digest_size=16).hexdigest(),
        samples=samples,
        skipped=[(_printable(name), _printable(reason)) for name, reason in skipped],
    )


class _Headers(io.FileIO):
    """A file of which tarfile never reads much at once, whatever size a header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size) or b""


def _members(file: _Headers, num_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Yield the whole members of a tar, without folders. Raises ReadError where it is cut off."""
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
            if not member.isdir():
                yield member
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise tarfile.ReadError(f"at byte {file.tell():,} ({reason})") from None
    # tarfile takes any damaged header for the end; the true one is a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"at byte {end:,}")


@dataclass
class _Parts:
    """The members of one sample by extension, of which ``jpg`` goes before ``input.jpg``."""

    key: str
    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, tuple[tarfile.TarInfo, bytes]] = field(default_factory=dict)
    problem: str = ""

    def add(self, extension: str, member: tarfile.TarInfo, file: _Headers) -> None:
        """Take a member: text is read now; other extensions are ignored."""
        kind = extension.rpartition(".")[2]
        is_image = kind in IMAGE_EXTENSIONS
        if not is_image and kind not in ("txt", "json"):
            return
        if member.size > (MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES):
            self.problem = f"its .{extension} has {member.size / 1e6:,.0f} MB"
        elif extension in self.images or extension in self.texts:
            self.problem = self.problem or f"it has several .{extension}"
        elif is_image:
            self.images[extension] = member
        else:
            file.seek(member.offset_data)
            self.texts[extension] = member, file.read(member.size)

    def finish(self) -> tuple[tarfile.TarInfo, tarfile.TarInfo, str, bool]:
        """Return the image, the member with the caption, the caption, and whether that is JSON.

        Raises:
            ValueError: the sample cannot be used.
        """
        record, metadata = None, {}
        for extension in _of_kind(self.texts, "json")[:1]:
            record, content = self.texts[extension]
            with contextlib.suppress(ValueError, TypeError):
                metadata = dict(parse_json(content))
        try:
            return self._finish(record, metadata)
        except ValueError as error:
            url = metadata.get("url")
            raise ValueError(f"{error} (from {url})" if is_text(url) else str(error)) from None

    def _finish(
        self, record: tarfile.TarInfo | None, metadata: dict[str, Any]
    ) -> tuple[tarfile.TarInfo, tarfile.TarInfo, str, bool]:
        if self.problem:
            raise ValueError(self.problem)
        image = self._only("images", self.images, *IMAGE_EXTENSIONS)
        member, content = self._only("texts", self.texts, "txt") or (None, b"")
        if (status := metadata.get("status", "success")) != "success":
            name = status if is_text(status) else shown(status)
            raise ValueError(f"img2dataset status {name}")
        if image is None:
            raise ValueError("it has no image")
        try:
            text = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError("its caption is not UTF-8 text") from None
        # Where the .txt is missing or empty, img2dataset's .json still has the caption.
        member, caption = (member, text) if text else (record, metadata.get("caption"))
        if member is None or not is_text(caption) or not caption.strip():
            raise ValueError("it has no caption")
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise ValueError(f"a caption of {len(caption):,} characters")
        return image, member, caption, not text

    def _only(self, what: str, members: dict[str, T], *kinds: str) -> T | None:
        found = _of_kind(members, *kinds)
        if len(found) > 1:
            key = self.key.rpartition("/")[2]
            names = ", ".join(f"{key}.{extension}" for extension in found[:3])
            why = f": {CUT_AT_FIRST_DOT}" if any("." in extension for extension in found) else ""
            raise ValueError(f"it has several {what} ({names}{', ...' * (len(found) > 3)}){why}")
        return members[found[0]] if found else None


def _of_kind(members: Iterable[str], *kinds: str) -> list[str]:
    """Return the extensions that are one of some kinds, or else those that end in one."""
    plain = [extension for extension in members if extension in kinds]
    return plain or [extension for extension in members if extension.rpartition(".")[2] in kinds]


def key_of(member: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension: ``a/b.c.jpg``, ``("a/b", "c.jpg")``."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _problem(member: tarfile.TarInfo, path: Path) -> str:
    if not member.isreg() or member.issparse():
        return "a link, device or sparse file"
    try:
        inside(path.parent, member.name)
    except ValueError:
        return "its name leads out of the shard"
    return ""


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


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards, in place of a `CaptionFolder`; make one with :meth:`open`.

    Attributes:
        tars: the shards of each split, by name.
    """

    root: Path
    tars: dict[str, list[Path]]
    _read: dict[str, list[Shard]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, root: str | Path) -> ShardFolder:
        """Find the shards below ``root``; no tar is read yet.

        Raises:
            DataError: there is no shard, or one is compressed.
        """
        tars: dict[str, list[Path]] = {}
        for split in SPLITS:
            paths = [p for p in sorted(Path(root, split).glob("*")) if not p.name.startswith(".")]
            for path in paths:
                plain = path.with_suffix("")
                command = DECOMPRESS.get(path.suffix)
                if command and plain.suffix == ".tar" and plain not in paths:
                    raise DataError(
                        f"shard {path} is compressed, and images are read by their place: "
                        f"`{command} {path}` first"
                    )
            if found := [path for path in paths if path.suffix == ".tar" and path.is_file()]:
                tars[split] = found
        if not tars:
            raise DataError(
                f"no shard (*.tar) in {root}/{{{','.join(SPLITS)}}}: put shards into these folders"
            )
        return cls(Path(root), tars)

    @property
    def notes_dir(self) -> Path:
        return self.root / ".shards"

    @property
    def splits(self) -> list[str]:
        """The splits that have shards, in the order train, val, test."""
        return list(self.tars)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names and sizes of all shards, names of images, and places of the content."""
        return _fingerprint(self.tars, {split: self._shards(split) for split in self.splits})

    def compute_fingerprint(self) -> str:
        """Return the fingerprint from the headers as they are now."""
        shards = {split: [read_shard(tar) for tar in tars] for split, tars in self.tars.items()}
        return _fingerprint(self.tars, shards)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Facts that a caption folder has in its manifest."""
        counts = {
            split: {
                "images": sum(len(shard.samples) for shard in self._shards(split)),
                "shards": len(tars),
            }
            for split, tars in self.tars.items()
        }
        return {"source": "shards", "counts": counts, "fingerprint": self.fingerprint}

    def split(self, name: SplitName, skipped: Skipped | None = None) -> list[CaptionedImage]:
        """Return the images of a split, by shard and in the order of each tar.

        Args:
            skipped: takes the samples that cannot be used; without it, the first is an error.

        Raises:
            DataError: no such split, or a sample that cannot be used.
        """
        if name not in self.tars:
            raise DataError(
                f"shard folder {self.root} has no {name} shards (it has: {', '.join(self.splits)}): "
                f"put *.tar into {self.root / name}"
            )
        images, found = [], Skipped(name) if skipped is None else skipped
        for path, shard in zip(self.tars[name], self._shards(name), strict=True):
            images += shard.images(path)
            found.total += len(shard.samples) + len(shard.skipped)
            for member, reason in shard.skipped:
                found.add(f"{path}/{member}" if member else path, reason)
        if skipped is None:
            found.refuse("fetch or write the shard again")
        return images

    def _shards(self, split: str) -> list[Shard]:
        if split not in self._read:
            tars, indices = self.tars[split], self.notes_dir / split
            paths = logged(tars, len(tars), f"{split}: headers read of %s of %s shards")
            self._read[split] = [kept_shard(tar, indices / f"{tar.name}.index") for tar in paths]
        return self._read[split]


def _fingerprint(tars: dict[str, list[Path]], shards: dict[str, list[Shard]]) -> str:
    total = hashlib.sha256()
    for split, paths in tars.items():
        for path, shard in zip(paths, shards[split], strict=True):
            line = f"{split}/{path.name}\t{shard.num_bytes}\t{shard.checksum}\n"
            total.update(line.encode())
    return f"sha256:{total.hexdigest()}"
