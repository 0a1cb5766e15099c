"""Captioned images in WebDataset shards, which are trained from where they lie.

::

    ROOT/{train,val,test}/*.tar     samples KEY.jpg|jpeg|png|webp with KEY.txt, KEY.json or both
    ROOT/.shards/SPLIT/NAME.index   where images and captions lie in one tar; made again where the tar changed

One pass over a tar's headers makes its index, in some tens of bytes a sample; nothing is unpacked.
The layout is that of img2dataset and of the WebDataset library: a key is a member's path up to the
first dot of its file name, and the rest is its extension. ``s0.input.jpg`` is the image of ``s0``
where it has no ``s0.jpg``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

from vlm_bridge.data_pipeline.caption_folder import (
    CaptionedImage,
    Pictures,
    inside,
    write_atomically,
)
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.samples import Skipped, TarImage
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, parse_json

logger = logging.getLogger(__name__)

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
NOTES_NAME = ".shards"
LAYOUT = "vlm-bridge shard index 2"
SAY_EVERY_SECONDS = 10.0
SAMPLE = np.dtype(
    [
        ("picture", "<i8"), ("picture_size", "<i4"), ("caption", "<i8"), ("caption_size", "<i4"),
        ("is_json", "?"), ("name_end", "<i4"),
    ]
)  # fmt: skip
"""Of a sample: where its picture and its caption lie in the tar, and where the picture's name ends among all names."""
_SAMPLE = struct.Struct("<qiqi?i")
_COMPRESSED = {
    ".gz": "gunzip",
    ".tgz": "gunzip -S .tgz",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zst": "unzstd",
}


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
    picture: TarImage
    caption_place: CaptionPlace


@dataclass(frozen=True, slots=True)
class ShardLoss:
    """A sample or member that cannot be used, and why; ``name`` is None where the rest of the shard is lost.

    ``incomplete``: another member of the sample would complete it.
    """

    name: str | None
    reason: str
    incomplete: bool = field(default=False, compare=False)


def read_shard(path: Path) -> Iterator[ShardSample | ShardLoss]:
    """Yield every whole sample of a tar, and what is lost; a tar that was cut off gives the samples before the cut.

    Images are not decoded: they may still be damaged. A sample whose members do not stand together is one loss, which
    comes behind the samples.
    """
    seen: set[int] = set()
    incomplete: dict[str, ShardLoss] = {}
    num_samples, cut_off = 0, None
    try:
        for found in _read_samples(path):
            if isinstance(found, ShardLoss) and not found.incomplete:
                yield found
                continue
            key = found.key if isinstance(found, ShardSample) else found.name or ""
            is_new = hash(key) not in seen
            seen.add(hash(key))
            if isinstance(found, ShardSample):
                num_samples += 1
                yield found
            else:
                incomplete[key] = found if is_new else ShardLoss(key, MEMBERS_APART)
    except _CutOff as cut:
        reason = f"cut off or damaged {cut}: the {num_samples:,} samples before are read, the rest is lost"
        cut_off = ShardLoss(None, reason)
    yield from incomplete.values()
    if cut_off is not None:
        yield cut_off


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
            # The last sample may lack a member.
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
            return self._loss(f"img2dataset status {status}", metadata)
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
            TarImage(path, image.offset_data, image.size, image.name),
            CaptionPlace(held_by.offset_data, held_by.size, is_json=not text),
        )

    def _several(self, what: str, extensions: list[str]) -> str:
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


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# The index of one tar, and folders of tars.


@dataclass(frozen=True)
class ShardIndex:
    """What one tar holds.

    Attributes:
        samples: [samples] of `SAMPLE`, in the order of the tar.
        names: the members that are pictures, UTF-8, one behind the other.
        losses: what cannot be used.
        size: bytes of the tar.
    """

    path: Path
    samples: np.ndarray
    names: bytes
    losses: tuple[ShardLoss, ...]
    size: int

    def picture(self, number: int) -> TarImage:
        sample = self.samples[number]
        start = int(self.samples[number - 1]["name_end"]) if number else 0
        # What is not UTF-8 must still be fit for a line of JSON.
        name = self.names[start : int(sample["name_end"])].decode(errors="backslashreplace")
        return TarImage(self.path, int(sample["picture"]), int(sample["picture_size"]), name)

    def caption(self, number: int) -> str:
        """Read a caption from the tar. DataError where it is not what was indexed."""
        sample = self.samples[number]
        place = CaptionPlace(
            int(sample["caption"]), int(sample["caption_size"]), bool(sample["is_json"])
        )
        with contextlib.suppress(OSError, UnicodeDecodeError):
            with self.path.open("rb") as file:
                content = read_at(file, place.offset, place.size)
            caption = place.caption_in(content)
            if len(content) == place.size and is_text(caption) and caption.strip():
                return caption
        raise DataError(
            f"shard {self.path} was changed after it was indexed: run the same command again"
        )

    @property
    def content(self) -> bytes:
        return self.samples.tobytes() + self.names


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards; make one with :meth:`open`. It gives what a `CaptionFolder` gives."""

    root: Path
    shards: dict[str, list[Path]]
    """The tars of each split, in the order of their names."""

    @classmethod
    def open(cls, root: str | Path) -> ShardFolder:
        """Open the shards below ``root``; no tar is read yet.

        Args:

        Raises:
            DataError: there is no shard, or one is compressed.
        """
        root = Path(root)
        shards: dict[str, list[Path]] = {}
        for split in SPLITS:
            found = [
                path for path in sorted((root / split).glob("*")) if not path.name.startswith(".")
            ]
            for path in found:
                _refuse_compressed(path)
            if tars := [path for path in found if path.suffix == ".tar" and path.is_file()]:
                shards[split] = tars
        if not shards:
            raise DataError(
                f"no shard (*.tar) in {root}/{{{','.join(SPLITS)}}}: put shards into these folders"
            )
        return cls(root, shards)

    @property
    def notes_dir(self) -> Path:
        """Where the folder keeps what is known of its shards."""
        return self.root / NOTES_NAME

    @property
    def splits(self) -> list[str]:
        """The splits that have shards, in the order train, val, test."""
        return list(self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names and sizes of all shards and what their headers say; not over all of their bytes.

        A picture that is replaced by another one of as many bytes in the same place is not noticed.
        """
        return _fingerprint({split: self._indices(split) for split in self.splits})

    def compute_fingerprint(self) -> str:
        """The same from the headers as they are now, whatever was kept."""
        return _fingerprint(
            {split: [index_shard(path) for path in tars] for split, tars in self.shards.items()}
        )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a caption folder, as far as shards have it."""
        counts = {
            split: {
                "images": sum(len(index.samples) for index in self._indices(split)),
                "shards": len(tars),
            }
            for split, tars in self.shards.items()
        }
        return {"source": "shards", "counts": counts, "fingerprint": self.fingerprint}

    def split(self, name: SplitName, bad: Skipped | None = None) -> ShardImages:
        """Return the images of one split, in the order of the shards' names and of the samples in each.

        Args:
            bad: takes the samples that cannot be used; without it, the first of them is an error.

        Raises:
            DataError: no such split, a compressed shard, a sample that cannot be used.
        """
        if name not in self.shards:
            raise DataError(
                f"shard folder {self.root} has no {name} shards (it has: {', '.join(self.splits)}): "
                f"put *.tar into {self.root / name}"
            )
        indices = self._indices(name)
        for index in indices:
            if bad is not None:
                bad.total += len(index.samples) + len(index.losses)
            for loss in index.losses:
                where = index.path if loss.name is None else f"{index.path}/{loss.name}"
                if bad is None:
                    raise DataError(f"{where}: {loss.reason}; fetch or write the shard again")
                bad.add(where, loss.reason)
        return ShardImages(indices, np.arange(sum(len(index.samples) for index in indices)))

    @cached_property
    def _known(self) -> dict[str, list[ShardIndex]]:
        return {}

    def _indices(self, split: str) -> list[ShardIndex]:
        if split not in self._known:
            indices, tars, logged = [], self.shards[split], time.monotonic()
            for number, path in enumerate(tars):
                indices.append(known_index(path, self.notes_dir / split / f"{path.name}.index"))
                if time.monotonic() - logged > SAY_EVERY_SECONDS:
                    logged = time.monotonic()
                    logger.info(
                        f"{split}: read the headers of {number + 1:,} of {len(tars):,} shards"
                    )
            self._known[split] = indices
        return self._known[split]


class ShardImages(Sequence[CaptionedImage]):
    """The images of a split, or some of them; captions are read when they are asked for. A slice is a view.

    Memory holds 29 bytes and a name for each sample of the indices, and 8 bytes for each image of the view.
    """

    def __init__(self, indices: Sequence[ShardIndex], chosen: np.ndarray):
        self._indices = indices
        self._first = np.cumsum([0, *(len(index.samples) for index in indices)])
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, index: slice) -> ShardImages: ...
    def __getitem__(self, index: int | slice) -> CaptionedImage | ShardImages:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        shard, number = self._place(index)
        picture = shard.picture(number)
        key, _ = key_of(picture.member)  # those of several shards may be equal
        return CaptionedImage(picture, (shard.caption(number),), key)

    def take(self, indices: np.ndarray) -> ShardImages:
        """A view of some images, in the order of ``indices``."""
        return ShardImages(self._indices, self._chosen[indices])

    @property
    def paths(self) -> Pictures:
        """Where the pictures are, each place made when it is asked for."""
        return Pictures(self)

    def path(self, index: int) -> TarImage:
        """Where the picture of one image is."""
        shard, number = self._place(index)
        return shard.picture(number)

    @property
    def shards(self) -> np.ndarray:
        """[images], the number of the shard that each lies in."""
        return np.searchsorted(self._first, self._chosen, side="right") - 1

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        chosen = int(self._chosen[index])
        shard = int(np.searchsorted(self._first, chosen, side="right")) - 1
        return self._indices[shard], chosen - int(self._first[shard])


# The index of one tar.


def known_index(path: Path, kept: Path) -> ShardIndex:
    """The index of a tar: the kept one if the tar still has its name, size and time; else a new one, which is kept.

    Raises:
        DataError: the tar is compressed or cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from None
    of_tar = {
        "layout": LAYOUT,
        "name": path.name,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    if (index := _read_kept(kept, path, of_tar)) is not None:
        return index
    index = index_shard(path)
    header = of_tar | {
        "samples": len(index.samples),
        "losses": [[loss.name, loss.reason] for loss in index.losses],
        "checksum": _checksum(index.content),
    }
    with contextlib.suppress(OSError):  # a read-only folder keeps nothing
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(header).encode() + b"\n" + index.content)
    return index


def index_shard(path: Path) -> ShardIndex:
    """Pass over the headers and captions of a tar; a second sample of a key is skipped.

    Raises:
        DataError: the tar is compressed or cannot be read.
    """
    samples, names, losses = bytearray(), bytearray(), []
    seen: set[int] = set()
    try:
        size = path.stat().st_size
        for found in read_shard(path):
            if isinstance(found, ShardSample) and hash(found.key) in seen:
                found = ShardLoss(found.key, "a sample with this key came before in this shard")
            if isinstance(found, ShardLoss):
                losses.append(ShardLoss(found.name and _printable(found.name), found.reason))
                continue
            seen.add(hash(found.key))  # of 64 bits: no two keys of a shard are likely to share one
            names += found.picture.member.encode(errors="surrogateescape")
            place = found.caption_place
            samples += _SAMPLE.pack(
                found.picture.offset,
                found.picture.size,
                place.offset,
                place.size,
                place.is_json,
                len(names),
            )
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from None
    return ShardIndex(
        path, np.frombuffer(bytes(samples), SAMPLE), bytes(names), tuple(losses), size
    )


def _read_kept(kept: Path, path: Path, of_tar: dict[str, Any]) -> ShardIndex | None:
    """The index in a file, if it is whole and of that tar. It comes with the data and is not trusted."""
    try:
        header, _, content = kept.read_bytes().partition(b"\n")
        facts = parse_json(header)
        if any(facts[key] != value for key, value in of_tar.items()):
            return None
        if facts["checksum"] != _checksum(content):
            return None
        num_bytes = facts["samples"] * SAMPLE.itemsize
        samples, names = np.frombuffer(content[:num_bytes], SAMPLE), content[num_bytes:]
        losses = tuple(ShardLoss(name, reason) for name, reason in facts["losses"])
        index = ShardIndex(path, samples, names, losses, of_tar["size"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not all(isinstance(loss.reason, str) for loss in losses):
        return None
    return index if len(samples) == facts["samples"] and _is_within_tar(index) else None


def _is_within_tar(index: ShardIndex) -> bool:
    """Whether every place of an index lies in its tar, and is no larger than such a member may be."""
    samples = index.samples
    for start, size, most in (
        (samples["picture"], samples["picture_size"], MAX_PICTURE_BYTES),
        (samples["caption"], samples["caption_size"], MAX_TEXT_BYTES),
    ):
        # Compared this way round, no sum of theirs overflows.
        if not np.all((size >= 0) & (size <= most) & (start >= 0) & (start <= index.size - size)):
            return False
    ends = np.concatenate(([0], samples["name_end"]))
    return bool(np.all(np.diff(ends) > 0) and ends[-1] == len(index.names))


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _fingerprint(indices: dict[str, list[ShardIndex]]) -> str:
    total = hashlib.sha256()
    for split, of_split in indices.items():
        for index in of_split:
            total.update(
                f"{split}/{index.path.name}\t{index.size}\t{_checksum(index.content)}\n".encode()
            )
    return f"sha256:{total.hexdigest()}"


def _refuse_compressed(path: Path) -> None:
    """Raise DataError for a compressed shard, unless the plain one lies beside it."""
    command = _COMPRESSED.get(path.suffix)
    plain = path.with_suffix("") if path.suffix != ".tgz" else path.with_suffix(".tar")
    if command is not None and plain.suffix == ".tar" and not plain.is_file():
        raise DataError(
            f"shard {path} is compressed, and pictures are read by their place: `{command} {path}` first"
        )


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
