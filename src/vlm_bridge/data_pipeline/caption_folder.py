"""The caption folder: the one on-disk format that every source is turned into and that training reads.

::

    ROOT/manifest.json                    source, settings, what was skipped; written last
    ROOT/{train,val,test}/captions.jsonl  {"image_path": "images/x.jpg", "caption": "...", "original_id": "x"}
    ROOT/{train,val,test}/images/*.jpg    upright RGB pictures

An image has one line per caption. Other tools prepare the same layout without a manifest, as the dinov2-gemma project
does: such a folder is read too, and its manifest is made on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, overload

import numpy as np

from vlm_bridge import __version__
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.samples import CaptionedImage, ImageFile, Skipped, inside, is_inside
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.environment import cache_dir
from vlm_bridge.errors import DataError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text, lines_of, parse_json, shown

FORMAT = "vlm-bridge caption folder"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CAPTIONS_NAME = "captions.jsonl"
IMAGES_NAME = "images"
UNFINISHED_NAME = ".unfinished"
"""Working files of a transformation under way; without a manifest beside them it can be continued."""
PREPARED_ELSEWHERE = "prepared by other tools"
"""The manifest's `source` of a folder that other tools prepared."""
_KEYS = ("image_path", "caption")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionFolder:
    """A finished caption folder; make one with :meth:`open`."""

    root: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: str | Path) -> CaptionFolder:
        """Open the caption folder at ``root``; make its manifest where other tools prepared it.

        Args:
            root: the folder that holds train, val and test.

        Raises:
            DataError: missing, unfinished, damaged or of a newer format.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(
                f"no caption folder at {root}: "
                f"make one with `vlm-data transform --source ... --output-dir {root}`"
            )
        if is_prepared_elsewhere(root):
            return cls(root, current_manifest(root))
        if not (root / MANIFEST_NAME).is_file():
            if (root / UNFINISHED_NAME).is_dir():
                raise DataError(
                    f"caption folder {root} is unfinished: "
                    "continue it with the same `vlm-data transform` command"
                )
            raise DataError(
                f"{root} is not a caption folder (it has neither {MANIFEST_NAME} nor train/{CAPTIONS_NAME}): make "
                "one with `vlm-data transform --source local --input-dir PICTURES --output-dir NEW_FOLDER`"
            )
        folder = cls(root, read_manifest(root))
        for split in folder.splits:
            if not (root / split / CAPTIONS_NAME).is_file():
                raise DataError(
                    f"caption folder {root} is damaged: {split}/{CAPTIONS_NAME} is missing; make it again"
                )
        return folder

    @property
    def fingerprint(self) -> str:
        """Hash over every caption line and every picture, as recorded when the folder was made."""
        return self.manifest["fingerprint"]

    @property
    def is_checked(self) -> bool:
        """Whether every line was checked when the folder was made; other tools check none."""
        return self.manifest.get("source") != PREPARED_ELSEWHERE

    @property
    def splits(self) -> list[str]:
        """The splits that hold at least one image, in the order train, val, test."""
        return [
            split for split in SPLITS if self.manifest["counts"].get(split, {}).get("images", 0) > 0
        ]

    def split(self, name: SplitName, bad: Skipped | None = None) -> CaptionedImages:
        """Return the images of one split with their captions, in the order of the file.

        Args:
            bad: takes the lines that cannot be used; without it, the first of them is an error.

        Raises:
            DataError: no such split, a malformed or non-UTF-8 line, a missing picture (with file and line).
        """
        if name not in self.splits:
            raise DataError(
                f"caption folder {self.root} has no {name} images (it has: {', '.join(self.splits)})"
            )
        return index_captions(self.root / name, bad)

    def compute_fingerprint(self) -> str:
        """Read every file and return the fingerprint: equal to ``fingerprint`` unless one was changed."""
        folders = {split: self.root / split for split in self.splits}
        images = {split: dict(image_digests(folder)) for split, folder in folders.items()}
        return fingerprint(
            {split: caption_lines(folder) for split, folder in folders.items()}, images
        )


class CaptionedImages(Sequence[CaptionedImage]):
    """The images of a split. Their captions stay in the file: an image is read when it is asked for.

    Memory holds 8 bytes a line and 16 an image, so that millions of captions are no burden; the file is mapped.
    A slice is a view.
    """

    def __init__(
        self,
        folder: Path,
        text: mmap.mmap | bytes,
        lines: np.ndarray,
        first: np.ndarray,
        chosen: np.ndarray,
    ):
        self.folder = folder
        self._text = text
        self._lines = lines
        """Where each line begins, image after image."""
        self._first = first
        """[images + 1], the first line of each image."""
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, index: slice) -> CaptionedImages: ...
    def __getitem__(self, index: int | slice) -> CaptionedImage | CaptionedImages:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        image = self._chosen[index]
        records = [self._record(line) for line in range(self._first[image], self._first[image + 1])]
        captions = tuple(record["caption"] for record in records)
        return CaptionedImage(self.folder / records[0]["image_path"], captions, _id_of(records[0]))

    def take(self, indices: np.ndarray) -> CaptionedImages:
        """A view of some images, in the order of ``indices``."""
        return CaptionedImages(
            self.folder, self._text, self._lines, self._first, self._chosen[indices]
        )

    @property
    def paths(self) -> Pictures:
        """The pictures, each path made when it is asked for."""
        return Pictures(self)

    def path(self, index: int) -> Path:
        """The picture of one image."""
        return self.folder / self._record(int(self._first[self._chosen[index]]))["image_path"]

    @property
    def num_captions(self) -> int:
        """The captions of all these images."""
        return int((self._first[self._chosen + 1] - self._first[self._chosen]).sum())

    @property
    def shards(self) -> np.ndarray:
        """[images], the number of the file that the captions of each lie in: there is one."""
        return np.zeros(len(self), np.int64)

    def _record(self, line: int) -> dict[str, str]:
        start = int(self._lines[line])
        end = self._text.find(b"\n", start)
        try:
            return parse_json(self._text[start : end if end >= 0 else len(self._text)])
        except ValueError:
            raise DataError(
                f"{self.folder / CAPTIONS_NAME} was changed while it was read"
            ) from None


class HasPictures(Protocol):
    """Images whose files can be found without their captions."""

    def __len__(self) -> int: ...
    def path(self, index: int) -> ImageFile: ...
    def take(self, indices: np.ndarray) -> HasPictures: ...


@dataclass(frozen=True)
class Pictures(Sequence[ImageFile]):
    """Where the pictures of some images are; a slice is a view."""

    images: HasPictures

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> ImageFile | Pictures:
        if isinstance(index, slice):
            return Pictures(self.images.take(np.arange(len(self))[index]))
        return self.images.path(index)


class CaptionFolderWriter:
    """Writes the parts of a caption folder so that no interruption leaves something that looks whole."""

    def __init__(self, root: Path):
        self.root = root
        self.working_dir = root / UNFINISHED_NAME

    def prepare(self) -> None:
        """Make the folders that pictures go to."""
        self.working_dir.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            self.images_dir(split).mkdir(parents=True, exist_ok=True)

    def images_dir(self, split: str) -> Path:
        """Return the folder that the pictures of a split go to."""
        return self.root / split / IMAGES_NAME

    def write_captions(self, split: str, lines: Iterable[str]) -> None:
        """Write ``captions.jsonl`` of one split from lines made by :func:`caption_line`."""
        write_atomically(
            self.root / split / CAPTIONS_NAME, _encoded("".join(f"{line}\n" for line in lines))
        )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, which makes the folder whole."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.root / MANIFEST_NAME, _encoded(text))


def caption_line(file_name: str, caption: str, original_id: str) -> str:
    """Return one line of ``captions.jsonl``, without its newline."""
    record = {
        "image_path": f"{IMAGES_NAME}/{file_name}",
        "caption": caption,
        "original_id": original_id,
    }
    return json.dumps(record, ensure_ascii=False)


def fingerprint(lines: Mapping[str, Iterable[str]], images: Mapping[str, Mapping[str, str]]) -> str:
    """Hash the content of a caption folder, whatever its order.

    Args:
        lines: the lines of each split's ``captions.jsonl``.
        images: for each split, SHA-256 of each picture file by its path relative to the split.
    """
    total = hashlib.sha256()
    for split in SPLITS:
        for line in sorted(lines.get(split, ())):
            total.update(_encoded(f"{split}\tcaption\t{line}\n"))
        for path, digest in sorted(images.get(split, {}).items()):
            total.update(f"{split}\timage\t{path}\t{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def image_digests(split_dir: Path) -> Iterator[tuple[str, str]]:
    """Read each image file of a split: (path relative to the split, SHA-256)."""
    for path in image_files(split_dir):
        with path.open("rb") as file:
            yield f"{IMAGES_NAME}/{path.name}", hashlib.file_digest(file, "sha256").hexdigest()


def image_files(split_dir: Path) -> list[Path]:
    """Return the image files of a split by name, without what file managers leave in folders."""
    folder = split_dir / IMAGES_NAME
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        path
        for path in found
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]


def caption_lines(split_dir: Path) -> list[str]:
    """Return the lines of a split's ``captions.jsonl``; bytes that are not UTF-8 are escaped."""
    text = (split_dir / CAPTIONS_NAME).read_text(encoding="utf-8", errors="backslashreplace")
    return text.removesuffix("\n").split("\n")


def is_prepared_elsewhere(root: Path) -> bool:
    """Whether a folder has the layout of a caption folder, but its manifest is missing or made on first use."""
    if (root / UNFINISHED_NAME).is_dir() or not any(
        (root / s / CAPTIONS_NAME).is_file() for s in SPLITS
    ):
        return False
    return (
        not (root / MANIFEST_NAME).is_file()
        or read_manifest(root).get("source") == PREPARED_ELSEWHERE
    )


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check ``ROOT/manifest.json``; DataError where it is damaged or of another format."""
    return parse_manifest(root / MANIFEST_NAME)


def parse_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest; DataError where it is damaged or of another format."""
    try:
        manifest = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): make the caption folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a caption folder: choose another folder")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {manifest.get('format_version')}, not {FORMAT_VERSION}: "
            "make the caption folder again with `vlm-data transform`"
        )
    missing = {"counts", "fingerprint"} - manifest.keys()
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: make the caption folder again")
    if not (isinstance(manifest["fingerprint"], str) and _are_counts(manifest["counts"])):
        raise DataError(f"{path} is damaged (counts or fingerprint): make the caption folder again")
    return manifest


def _are_counts(counts: Any) -> bool:
    return isinstance(counts, dict) and all(
        isinstance(of_split, dict) and isinstance(of_split.get("images", 0), int)
        for of_split in counts.values()
    )


def _encoded(text: str) -> bytes:
    """UTF-8 of JSON whose strings may hold halves of characters (names of files that are not UTF-8): escaped."""
    return text.encode(errors="backslashreplace")


def index_captions(folder: Path, bad: Skipped | None) -> CaptionedImages:
    """Look at every line of a ``captions.jsonl`` once, and remember where those of each image begin.

    The lines of an image usually stand together: a run of them is an image, unless another run has the same name.
    """
    path, resolved = folder / CAPTIONS_NAME, folder.resolve()
    offsets, run_starts, run_names = array("q"), array("q"), array("q")
    current, problem = None, ""
    for where, offset, record in _read_records(path, bad):
        if record["image_path"] != current:
            current = record["image_path"]
            problem = _picture_problem(folder, current, resolved)
            if problem and bad is None:
                raise DataError(f"{where}: {problem}; make the folder again")
            if not problem:
                run_starts.append(len(offsets))
                run_names.append(
                    hash(current)
                )  # of 64 bits: no two of a billion names are likely to share one
        if problem:
            assert bad is not None
            bad.add(where, problem)
        else:
            offsets.append(offset)
    lines = np.array(offsets, np.int64)
    first = np.append(np.array(run_starts, np.int64), len(lines))
    names, place, image_of_run = np.unique(
        np.array(run_names, np.int64), return_index=True, return_inverse=True
    )
    if len(names) < len(run_names):
        rank = np.argsort(np.argsort(place))  # images in the order of their first lines
        image_of_line = np.repeat(rank[image_of_run], np.diff(first))
        lines = lines[np.argsort(image_of_line, kind="stable")]
        first = np.concatenate(([0], np.cumsum(np.bincount(image_of_line))))
    if not len(lines):
        return CaptionedImages(folder, b"", lines, first, np.arange(0))
    with path.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return CaptionedImages(folder, text, lines, first, np.arange(len(first) - 1))


def _picture_problem(folder: Path, name: str, resolved: Path) -> str:
    """Name the reason why an image file cannot be used, without opening it."""
    try:
        path = inside(folder, name)
    except ValueError as error:
        return str(error)
    try:
        if not path.is_file():
            return f"image {path} is missing"
    except OSError as error:
        return f"image {shown(str(path))} cannot be opened ({error.strerror})"
    return "" if is_inside(resolved, path) else f"image {path} is a link that leads out of {folder}"


def _read_records(path: Path, bad: Skipped | None) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Yield ("file:line", offset in bytes, record) for every usable line of a ``captions.jsonl``."""
    for number, offset, line in lines_of(path):
        if bad is not None:
            bad.total += 1
        where = f"{path}:{number}"
        record, problem = _parse_record(line)
        if not problem:
            yield where, offset, record
        elif bad is None:
            raise DataError(f"{where}: {problem}; make the folder again")
        else:
            bad.add(where, problem)


def _id_of(record: Mapping[str, Any]) -> str:
    """The image's id, or the name of its file where other tools wrote no text for an id."""
    name = record.get("original_id")
    return name if is_text(name) else PurePosixPath(record["image_path"]).stem


def _parse_record(line: bytes | None) -> tuple[dict[str, str], str]:
    """The record of a line, or what is wrong with it."""
    if line is None:
        return {}, "the line is too long for a caption"
    if not line.strip():
        return {}, "a blank line"
    try:
        record = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "not UTF-8 text"
    except ValueError:
        return {}, "not a JSON object"
    if not isinstance(record, dict) or not all(is_text(record.get(key)) for key in _KEYS):
        return {}, f"needs the texts {', '.join(_KEYS)}"
    if len(record["caption"]) > MAX_CAPTION_CHARACTERS:
        return {}, f"a caption of {len(record['caption']):,} characters"
    return record, "" if record["caption"].strip() else "an empty caption"


# Manifests of folders that other tools prepared: made on first use, beside the splits or, where the
# folder is read-only, in the user's cache, and made again when the folder has changed. The
# fingerprint depends on content alone, so checkpoints continue on another machine.


def current_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of a folder that other tools prepared; make it where there is none for its present state.

    Args:
        root: the folder that holds train, val and test.

    Raises:
        DataError: no line of a split can be used.
    """
    state, places = _state(root), (root / MANIFEST_NAME, _cached(root))
    known = [manifest for place in places if (manifest := _known_manifest(place)) is not None]
    manifest = next((manifest for manifest in known if manifest.get("state") == state), None)
    if manifest is None:
        manifest = {**_make_manifest(root), "state": state}
        why = "has changed since its manifest was made" if known else f"has no {MANIFEST_NAME}"
        logger.info(
            f"{root} {why}: {_write_manifest(manifest, *places)} ({_sizes(manifest['counts'])})"
        )
    if shared := manifest.get("also_in_train"):
        counts = " and ".join(f"{number:,} {split} images" for split, number in shared.items())
        logger.info(f"{counts} of {root} are in train too: scores on them are too good")
    return manifest


def _make_manifest(root: Path) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    digests: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        folder = root / split
        if not (folder / CAPTIONS_NAME).is_file():
            continue
        bad = Skipped(f"{split} captions")
        images = index_captions(folder, bad)
        if bad.total and not len(images):
            raise DataError(
                f"none of the {bad.total:,} lines of {folder / CAPTIONS_NAME} can be used: {bad.summary()}; captions "
                f"in another form: `vlm-data transform --source local --input-dir {root} --output-dir NEW_FOLDER`"
            )
        if not bad.total:
            continue
        counts[split] = {"images": len(images), "captions": images.num_captions}
        digests[split] = dict(image_digests(folder))
    if not counts:
        raise DataError(
            f"the {CAPTIONS_NAME} files in {root} have no lines: prepare the folder again"
        )
    train = set(digests.get("train", {}).values())
    shared = {s: len(train & set(digests[s].values())) for s in counts if s != "train"}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_with": f"vlm-bridge {__version__}",
        "source": PREPARED_ELSEWHERE,
        "counts": counts,
        "also_in_train": {split: number for split, number in shared.items() if number},
        "fingerprint": fingerprint(
            {split: caption_lines(root / split) for split in counts}, digests
        ),
    }


def _write_manifest(manifest: Mapping[str, Any], beside: Path, cached: Path) -> str:
    """Write a manifest to the first place that can be written, and say which."""
    content = (json.dumps(manifest, indent=2) + "\n").encode()
    for place in (beside, cached):
        with suppress(OSError):
            if place == cached:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, content)
            return f"made {place}"
    return f"neither it nor {cached.parent} can be written, so every start makes a manifest anew"


def _known_manifest(place: Path) -> dict[str, Any] | None:
    try:
        return parse_manifest(place)
    except (OSError, DataError):
        return None


def _cached(root: Path) -> Path:
    name = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache_dir() / "manifests" / f"{name}.json"


def _state(root: Path) -> str:
    """Hash caption files, and names and sizes of images: what a look at each start can afford."""
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        folder = root / split
        if (folder / CAPTIONS_NAME).is_file():
            with (folder / CAPTIONS_NAME).open("rb") as file:
                digest.update(
                    f"{split}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode()
                )
            for path in image_files(folder):
                line = f"{path.name}\0{path.stat().st_size}\0"
                digest.update(line.encode(errors="surrogateescape"))
    return f"blake2b:{digest.hexdigest()}"


def _sizes(counts: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{split} {count['images']:,} images" for split, count in counts.items())
