"""Captioned pictures in WebDataset shards: tars whose members ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` stand together.

A shard is never unpacked. One pass over its headers finds captions and where each picture lies; pictures are read
from there when their turn comes, in the order of the file. Memory holds one member at a time.

The layout is that of img2dataset's ``webdataset`` output, which is also the WebDataset library's: a key is a
member's path up to the first dot of its file name.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm_bridge.data_pipeline.caption_folder import inside
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.tar_picture import TarPicture, read_at
from vlm_bridge.parsing import is_text, parse_json

PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
"""What img2dataset encodes pictures as."""

MAX_PICTURE_BYTES = 100_000_000
MAX_TEXT_BYTES = 1_000_000

MAX_HEADER_BYTES = 1_000_000
"""Of a member's name and attributes, which tarfile reads whole."""

# What tarfile meets damaged headers with; names in front of names, without end, end in the recursion limit.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


class CaptionPlace(NamedTuple):
    """The member that holds a caption: bytes from ``offset`` on, plain text or img2dataset's JSON."""

    offset: int
    size: int
    is_json: bool

    def caption_in(self, content: bytes) -> object:
        """What is written there, if it is text; ``content`` is the member's. Raises UnicodeDecodeError."""
        return _parse_object(content).get("caption") if self.is_json else content.decode("utf-8").strip()


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One whole sample of a shard."""

    key: str
    caption: str
    picture: TarPicture
    caption_place: CaptionPlace


@dataclass(frozen=True, slots=True)
class ShardLoss:
    """A sample or member that cannot be used, and why; ``name`` is None where the rest of the shard is lost."""

    name: str | None
    reason: str


def read_shard(path: Path) -> Iterator[ShardSample | ShardLoss]:
    """Yield every whole sample of a tar, and what is lost; a tar cut off anywhere gives all that stands before.

    Pictures are passed over, not read: they may still be damaged.
    """
    sample: _Parts | None = None
    num_samples = 0
    with path.open("rb") as file:
        try:
            for member in _members(file, path.stat().st_size):
                if problem := _problem(member, path):
                    yield ShardLoss(member.name, problem)
                    continue
                key, extension = key_of(member.name)
                if sample is None or sample.key != key:
                    if sample is not None:
                        num_samples += 1
                        yield sample.finish(path)
                    sample = _Parts(key)
                sample.add(extension, member, file)
        except _CutOff as cut:
            # Nothing tells whether another member of the last sample was to come: it must be usable as it is.
            last = sample.finish(path) if sample is not None and sample.key != cut.key else None
            if isinstance(last, ShardSample):
                num_samples += 1
                yield last
            yield ShardLoss(
                None,
                f"cut off or damaged {cut}: the {num_samples:,} samples before are read, the rest is lost",
            )
            return
    if sample is not None:
        yield sample.finish(path)


class _CutOff(Exception):
    """The tar cannot be read further; ``key`` is that of the sample whose member is not whole."""

    def __init__(self, where: str, key: str | None = None):
        self.key = key
        super().__init__(where)


def _members(file: BinaryIO, file_size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar whose content is there in full, folders left out; _CutOff where that ends early."""
    headers, reached = _Headers(file), -1
    try:
        tar = tarfile.open(fileobj=headers, mode="r:")  # type: ignore[arg-type] # noqa: SIM115 - it holds only `file`
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] - it would keep every header of the file
            if member.size < 0 or tar.offset <= reached:  # sizes below zero lead back, and round for ever
                raise tarfile.ReadError("a member before the last one")
            reached = tar.offset
            if member.offset_data + member.size > file_size:
                raise _CutOff(
                    f"in the middle of {member.name}, at byte {file_size:,}", key_of(member.name)[0]
                )
            if not member.isdir():
                yield member
    except _DAMAGE as error:
        raise _CutOff(f"at byte {file.tell():,} ({_one_line(error)})") from None
    # tarfile takes any damaged header for the end; the true one is a block of zeros.
    if read_at(file, tar.offset, tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
        raise _CutOff(f"at byte {tar.offset:,}")


class _Headers:
    """A tar as `tarfile` reads headers from it: never much at once, whatever size one claims for itself."""

    name = None

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


@dataclass
class _Parts:
    """The members of one sample, as they come."""

    key: str
    picture: tarfile.TarInfo | None = None
    text: bytes = b""
    text_member: tarfile.TarInfo | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    json_member: tarfile.TarInfo | None = None
    problem: str = ""

    def add(self, extension: str, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Take a member: text is read now, a picture only noted; other extensions mean nothing here."""
        is_picture = extension in PICTURE_EXTENSIONS
        if not is_picture and extension not in ("txt", "json"):
            return
        if member.size > (MAX_PICTURE_BYTES if is_picture else MAX_TEXT_BYTES):
            self.problem = f"its .{extension} has {member.size / 1e6:,.0f} MB"
        elif is_picture and self.picture is not None:
            self.problem = "it has several pictures"
        elif is_picture:
            self.picture = member
        elif extension == "txt":
            self.text, self.text_member = read_at(file, member.offset_data, member.size), member
        else:
            self.json_member = member
            self.metadata = _parse_object(read_at(file, member.offset_data, member.size))

    def finish(self, path: Path) -> ShardSample | ShardLoss:
        """Return the sample, or why it is none."""
        if self.problem:
            return self._loss(self.problem)
        if (status := self.metadata.get("status", "success")) != "success":
            return self._loss(f"img2dataset says {status}")
        if self.picture is None:
            return self._loss("it has no picture")
        try:
            # Where the .txt is missing or empty, img2dataset's .json still has the caption.
            text = self.text.decode("utf-8").strip()
        except UnicodeDecodeError:
            return self._loss("its caption is not UTF-8 text")
        caption = text or self.metadata.get("caption")
        if not is_text(caption) or not caption.strip():
            return self._loss("it has no caption")
        if len(caption) > MAX_CAPTION_CHARACTERS:
            return self._loss(f"a caption of {len(caption):,} characters")
        held_by = self.text_member if text else self.json_member
        assert held_by is not None, "a caption was read from one of them"
        return ShardSample(
            self.key,
            caption,
            TarPicture(path, self.picture.offset_data, self.picture.size, self.picture.name),
            CaptionPlace(held_by.offset_data, held_by.size, is_json=not text),
        )

    def _loss(self, reason: str) -> ShardLoss:
        url = self.metadata.get("url")
        return ShardLoss(self.key, f"{reason} (from {url})" if url else reason)


def key_of(member: str) -> tuple[str, str]:
    """Return the key and the extension (lower case) of a member, by its name: ``a/b.c.jpg`` is ``("a/b", "c.jpg")``."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _problem(member: tarfile.TarInfo, path: Path) -> str:
    """Say why a member is not even looked at; empty where it may be."""
    if not member.isreg() or member.issparse():
        return "a link, device or sparse file"
    try:
        inside(path.parent, member.name)
    except ValueError:
        return "its name leads out of the shard"
    return ""


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
