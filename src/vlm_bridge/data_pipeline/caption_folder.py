"""The caption folder: the one on-disk format that every source is turned into and that training reads.

::

    ROOT/manifest.json                    what it is, where it came from, what was set aside; written last
    ROOT/{train,val,test}/captions.jsonl  {"image_path": "images/x.jpg", "caption": "...", "original_id": "x"}
    ROOT/{train,val,test}/images/*.jpg    upright RGB pictures

An image has one line per caption. A folder without a manifest is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.durable_files import write_bytes_durably
from vlm_bridge.errors import DataError

FORMAT = "vlm-bridge caption folder"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CAPTIONS_NAME = "captions.jsonl"
IMAGES_NAME = "images"
UNFINISHED_NAME = ".unfinished"
"""Working files of a transformation under way; without a manifest beside them it can be continued."""


@dataclass(frozen=True)
class CaptionedImage:
    """One picture with all its captions."""

    path: Path
    captions: tuple[str, ...]
    original_id: str


@dataclass(frozen=True)
class CaptionFolder:
    """A finished caption folder; make one with :meth:`open`."""

    root: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: str | Path) -> CaptionFolder:
        """Open the caption folder at ``root``.

        Raises:
            DataError: missing, unfinished, damaged or of a newer format; the message says how to mend it.
        """
        root = Path(root)
        manifest_path = root / MANIFEST_NAME
        if not root.is_dir():
            raise DataError(
                f"no caption folder at {root}: "
                f"make one with `vlm-data transform --source ... --output-dir {root}`"
            )
        if not manifest_path.is_file():
            if (root / UNFINISHED_NAME).is_dir():
                raise DataError(
                    f"caption folder {root} is unfinished: "
                    "continue it with the same `vlm-data transform` command"
                )
            raise DataError(
                f"{root} is not a caption folder (it has no {MANIFEST_NAME}): make one with "
                "`vlm-data transform --source local --input-dir PICTURES --output-dir NEW_FOLDER`"
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
    def splits(self) -> list[str]:
        """The splits that hold at least one image, in the order train, val, test."""
        return [split for split in SPLITS if self.manifest["counts"].get(split, {}).get("images", 0) > 0]

    def split(self, name: SplitName) -> list[CaptionedImage]:
        """Return the images of one split with their captions, in file order.

        Raises:
            DataError: no such split, a malformed or non-UTF-8 line, a missing picture (with file and line).
        """
        if name not in self.splits:
            raise DataError(
                f"caption folder {self.root} has no {name} images (it has: {', '.join(self.splits)})"
            )
        captions: dict[str, list[str]] = {}
        ids: dict[str, str] = {}
        folder = self.root / name
        for where, record in _read_records(folder / CAPTIONS_NAME):
            image_path = record["image_path"]
            if image_path not in captions:
                try:
                    path = inside(folder, image_path)
                except ValueError as error:
                    raise DataError(f"{where}: {error}") from None
                if not path.is_file():
                    raise DataError(f"{where}: picture {path} is missing; make the folder again")
                captions[image_path] = []
                ids[image_path] = record["original_id"]
            captions[image_path].append(record["caption"])
        return [
            CaptionedImage(folder / image_path, tuple(texts), ids[image_path])
            for image_path, texts in captions.items()
        ]

    def compute_fingerprint(self) -> str:
        """Read every file and return the fingerprint: equal to ``fingerprint`` unless one was changed."""
        images = {
            split: {
                f"{IMAGES_NAME}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (self.root / split / IMAGES_NAME).iterdir()
            }
            for split in self.splits
        }
        lines = {
            split: (self.root / split / CAPTIONS_NAME)
            .read_text(encoding="utf-8")
            .removesuffix("\n")
            .split("\n")
            for split in self.splits
        }
        return fingerprint(lines, images)


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
        write_atomically(self.root / split / CAPTIONS_NAME, "".join(f"{line}\n" for line in lines).encode())

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, which makes the folder whole."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.root / MANIFEST_NAME, text.encode())


def caption_line(file_name: str, caption: str, original_id: str) -> str:
    """Return one line of ``captions.jsonl``, without its newline."""
    record = {"image_path": f"{IMAGES_NAME}/{file_name}", "caption": caption, "original_id": original_id}
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
            total.update(f"{split}\tcaption\t{line}\n".encode())
        for path, digest in sorted(images.get(split, {}).items()):
            total.update(f"{split}\timage\t{path}\t{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check ``ROOT/manifest.json``; DataError where it is damaged or of another format."""
    path = root / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
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
    return manifest


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``; ValueError where ``name`` is absolute or climbs out of ``folder``.

    Windows forms are refused everywhere: a caption file that is harmless here must not become harmful there.
    """
    windows = PureWindowsPath(name)
    climbs = PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if climbs or "\0" in name or not name.strip():
        raise ValueError(f"picture path {name!r} must be relative and stay inside {folder}")
    return folder / name


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either absent (or its old self) or complete, also after a power cut. Raises OSError."""
    write_bytes_durably(path, content)


def _read_records(path: Path) -> Iterable[tuple[str, dict[str, str]]]:
    """Yield ("file:line", record) for every line of a ``captions.jsonl``."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise DataError(f"{where}: not UTF-8 text; make the folder again") from None
            except ValueError:
                raise DataError(f"{where}: not a JSON object; make the folder again") from None
            keys = ("image_path", "caption", "original_id")
            if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
                raise DataError(f"{where}: needs the texts {', '.join(keys)}")
            yield where, record
