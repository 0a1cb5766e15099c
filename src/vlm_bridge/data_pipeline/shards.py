"""Captioned pictures in WebDataset shards: tars whose members ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` stand together.

A shard is never unpacked. One pass over its headers finds captions and where each picture lies; pictures are read
from there when their turn comes, in the order of the file. Memory holds one member at a time.

The layout is that of img2dataset's ``webdataset`` output, which is also the WebDataset library's: a key is a
member's path up to the first dot of its file name, and the rest is its extension. ``s0.input.jpg`` is the image of
``s0`` where it has no ``s0.jpg``.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm_bridge.data_pipeline.caption_folder import inside
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.tar_picture import TarPicture, read_at
from vlm_bridge.parsing import is_text, parse_json

PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
"""What img2dataset encodes pictures as."""

CUT_AT_FIRST_DOT = "the key of a sample ends at the first dot of a name: rename the members"
MEMBERS_APART = "its members do not stand together: sort the tar by name (tar --sort=name)"

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
        return (
            _parse_object(content).get("caption")
            if self.is_json
            else content.decode("utf-8").strip()
        )


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One whole sample of a shard."""

    key: str
    caption: str
    picture: TarPicture
    caption_place: CaptionPlace


@dataclass(frozen=True, slots=True)
class ShardLoss:
    """A sample or member that cannot be used, and why; ``name`` is None where the rest of the shard is lost.

    ``incomplete`` says that another member of the sample would mend it.
    """

    name: str | None
    reason: str
    incomplete: bool = field(default=False, compare=False)


def read_shard(path: Path) -> Iterator[ShardSample | ShardLoss]:
    """Yield every whole sample of a tar, and what is lost; a tar cut off anywhere gives all that stands before.

    Images are not decoded: they may still be damaged. A sample whose members do not stand together is one loss, which
    comes behind the samples.
    """
    apart = _Apart()
    num_samples = 0
    try:
        for found in _read_samples(path):
            num_samples += isinstance(found, ShardSample)
            if (known := apart.sort(found)) is not None:
                yield known
    except _CutOff as cut:
        yield from apart.losses()
        reason = f"cut off or damaged {cut}: the {num_samples:,} samples before are read, the rest is lost"
        yield ShardLoss(None, reason)
        return
    yield from apart.losses()


class _Apart:
    """Tells samples whose members do not stand together: their keys come more than once, each time with a part."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._incomplete: dict[str, ShardLoss] = {}

    def sort(self, found: ShardSample | ShardLoss) -> ShardSample | ShardLoss | None:
        """Return what is decided now; what lacks a part waits, since the part may come later."""
        if isinstance(found, ShardLoss) and not found.incomplete:
            return found
        key = found.key if isinstance(found, ShardSample) else found.name or ""
        is_new = hash(key) not in self._seen
        self._seen.add(hash(key))
        if isinstance(found, ShardSample):
            return found
        self._incomplete[key] = found if is_new else ShardLoss(key, MEMBERS_APART)
        return None

    def losses(self) -> Iterator[ShardLoss]:
        yield from self._incomplete.values()


def _read_samples(path: Path) -> Iterator[ShardSample | ShardLoss]:
    """Yield samples and losses in the order of the tar; _CutOff where it cannot be read further."""
    sample: _Parts | None = None
    with path.open("rb") as file:
        try:
            for member in _members(file, path.stat().st_size):
                if problem := _problem(member, path):
                    yield ShardLoss(member.name, problem)
                    continue
                key, extension = key_of(member.name)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample.finish(path)
                    sample = _Parts(key)
                sample.add(extension, member, file)
        except _CutOff as cut:
            # Nothing tells whether another member of the last sample was to come: it must be usable as it is.
            last = sample.finish(path) if sample is not None and sample.key != cut.key else None
            if isinstance(last, ShardSample):
                yield last
            raise
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
            if (
                member.size < 0 or tar.offset <= reached
            ):  # sizes below zero lead back, and round for ever
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
    """The members of one sample, as they come.

    ``images`` and ``texts`` hold members by extension, of which ``jpg`` goes before ``input.jpg``.
    """

    key: str
    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, tuple[tarfile.TarInfo, bytes]] = field(default_factory=dict)
    problem: str = ""

    def add(self, extension: str, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Take a member: text is read now, an image only noted; other extensions mean nothing here."""
        kind = extension.rpartition(".")[2]
        is_image = kind in PICTURE_EXTENSIONS
        if not is_image and kind not in ("txt", "json"):
            return
        if member.size > (MAX_PICTURE_BYTES if is_image else MAX_TEXT_BYTES):
            self.problem = f"its .{extension} has {member.size / 1e6:,.0f} MB"
        elif extension in (self.images if is_image else self.texts):
            self.problem = self.problem or f"it has several .{extension}"
        elif is_image:
            self.images[extension] = member
        else:
            self.texts[extension] = member, read_at(file, member.offset_data, member.size)

    def finish(self, path: Path) -> ShardSample | ShardLoss:
        """Return the sample, or why it is none."""
        captions, records = _of_kind(self.texts, "txt"), _of_kind(self.texts, "json")
        metadata = _parse_object(self.texts[records[0]][1]) if records else {}
        images = _of_kind(self.images, *PICTURE_EXTENSIONS)
        if (
            problem := self.problem
            or self._several("images", images)
            or self._several("texts", captions)
        ):
            return self._loss(problem, metadata)
        if (status := metadata.get("status", "success")) != "success":
            return self._loss(f"img2dataset says {status}", metadata)
        if not images:
            return self._loss("it has no image", metadata, incomplete=True)
        text_member, content = self.texts[captions[0]] if captions else (None, b"")
        try:
            # Where the .txt is missing or empty, img2dataset's .json still has the caption.
            text = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            return self._loss("its caption is not UTF-8 text", metadata)
        caption = text or metadata.get("caption")
        if not is_text(caption) or not caption.strip():
            return self._loss("it has no caption", metadata, incomplete=not self.texts)
        if len(caption) > MAX_CAPTION_CHARACTERS:
            return self._loss(f"a caption of {len(caption):,} characters", metadata)
        held_by = text_member if text else self.texts[records[0]][0]
        assert held_by is not None, "a caption was read from one of them"
        image = self.images[images[0]]
        return ShardSample(
            self.key,
            caption,
            TarPicture(path, image.offset_data, image.size, image.name),
            CaptionPlace(held_by.offset_data, held_by.size, is_json=not text),
        )

    def _several(self, what: str, extensions: list[str]) -> str:
        """Return the problem of a sample with several members that could be the one."""
        if len(extensions) < 2:
            return ""
        names = ", ".join(
            f"{self.key.rpartition('/')[2]}.{extension}" for extension in extensions[:3]
        )
        more = ", ..." if len(extensions) > 3 else ""
        why = f": {CUT_AT_FIRST_DOT}" if any("." in extension for extension in extensions) else ""
        return f"it has several {what} ({names}{more}){why}"

    def _loss(
        self, reason: str, metadata: dict[str, Any], *, incomplete: bool = False
    ) -> ShardLoss:
        url = metadata.get("url")
        return ShardLoss(self.key, f"{reason} (from {url})" if url else reason, incomplete)


def _of_kind(members: Iterable[str], *kinds: str) -> list[str]:
    """Return the extensions of some kinds: those that are no more than the kind, or else those that end in it."""
    plain = [extension for extension in members if extension in kinds]
    return plain or [extension for extension in members if extension.rpartition(".")[2] in kinds]


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
