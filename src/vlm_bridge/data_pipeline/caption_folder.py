"""The caption folder: what every source is turned into, and what training reads.

::

    ROOT/manifest.json                    source, settings, what was skipped; written last
    ROOT/{train,val,test}/captions.jsonl  {"image_path": "images/x.jpg", "caption": "...",
                                           "original_id": "x"}
    ROOT/{train,val,test}/images/*.jpg    upright RGB images

An image has one line per caption. The dinov2-gemma project prepares the same layout without a
manifest: such a folder is read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.samples import CaptionedImage, DataFolder, Skipped, inside, is_inside
from vlm_bridge.data_pipeline.shards import ShardFolder
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.parsing import is_text, lines_of, parse_json

FORMAT, FORMAT_VERSION = "vlm-bridge caption folder", 1
MANIFEST_NAME, CAPTIONS_NAME, IMAGES_NAME = "manifest.json", "captions.jsonl", "images"
UNFINISHED_NAME = ".unfinished"  # working files of `transform`


def open_data_folder(path: str | Path) -> DataFolder:
    """Open a recipe's ``data_dir``: a caption folder or a shard folder.

    Raises:
        DataError: neither of them, or one that cannot be used.
    """
    root = Path(path)
    has_tars = any(any(place.glob("*.tar*")) for place in (root, *(root / s for s in SPLITS)))
    is_shards = has_tars and not is_caption_folder(root)
    return ShardFolder.open(root) if is_shards else CaptionFolder.open(root)


def is_caption_folder(root: Path) -> bool:
    """Return whether a folder was made by `transform`, or prepared by other tools."""
    parts = (MANIFEST_NAME, UNFINISHED_NAME, *(f"{split}/{CAPTIONS_NAME}" for split in SPLITS))
    return any((root / part).exists() for part in parts)


def readable_split(folder: DataFolder, split: SplitName) -> tuple[list[CaptionedImage], Skipped]:
    """Return the images of a split, and the samples that were skipped.

    Raises:
        DataError: no such split, or more than `MAX_SKIPPED_SHARE` of its samples are skipped.
    """
    skipped = Skipped(f"{split} samples")
    images = folder.split(split, skipped)
    skipped.check()
    return images, skipped


class CaptionFolder(DataFolder):
    """A finished caption folder; make one with :meth:`open`."""

    @classmethod
    def open(cls, root: str | Path) -> CaptionFolder:
        """Open the caption folder at ``root``, also one that other tools prepared.

        Raises:
            DataError: missing, unfinished, damaged or of another format.
        """
        folder, root = cls(Path(root)), Path(root)
        if (root / UNFINISHED_NAME).is_dir() and not (root / MANIFEST_NAME).is_file():
            raise DataError(
                f"caption folder {root} is unfinished: "
                "continue it with the same `vlm-data transform` command"
            )
        if not folder.splits:
            raise DataError(
                f"{root} is no caption folder (neither {MANIFEST_NAME} nor train/{CAPTIONS_NAME} "
                f"with lines) and no shard folder (no *.tar in {'/, '.join(SPLITS)}/): make one "
                "with `vlm-data transform --source local --input-dir IMAGES --output-dir FOLDER`"
            )
        for path in (root / split / CAPTIONS_NAME for split in folder.splits):
            if not path.is_file():
                raise DataError(f"{path} is missing: make the caption folder again")
        return folder

    def compute_fingerprint(self) -> str:
        """Read every file and return the fingerprint; another one where a file was changed."""
        if "format" not in self.manifest:
            return _state(self.root)
        lines, images = {}, {}
        for split in self.splits:
            text = (self.root / split / CAPTIONS_NAME).read_text("utf-8", errors="replace")
            lines[split] = text.removesuffix("\n").split("\n")
            paths = _image_files(self.root / split)
            images[split] = {f"{IMAGES_NAME}/{path.name}": _sha256(path) for path in paths}
        return fingerprint(lines, images)

    def _load_manifest(self) -> dict[str, Any]:
        is_ours = (self.root / MANIFEST_NAME).is_file()
        return read_manifest(self.root) if is_ours else _facts(self.root)

    def _read(self, split: SplitName, skipped: Skipped) -> list[CaptionedImage]:
        return _read_captions(self.root / split, skipped)


def _read_captions(folder: Path, skipped: Skipped) -> list[CaptionedImage]:
    """Read a ``captions.jsonl``; images come in the order of their first lines."""
    path, resolved = folder / CAPTIONS_NAME, folder.resolve()
    images: dict[str, tuple[str, list[str]]] = {}  # id and captions by name
    for number, line in lines_of(path):
        skipped.total += 1
        try:
            name, caption, image_id = _parse_record(line)
            if name not in images:
                _check_file(folder, resolved, name)
        except ValueError as error:
            skipped.add(f"{path}:{number}", str(error))
        else:
            images.setdefault(name, (image_id, []))[1].append(caption)
    return [CaptionedImage(folder / n, tuple(texts), i) for n, (i, texts) in images.items()]


def _parse_record(line: bytes) -> tuple[str, str, str]:
    """Return image path, caption and id. Raises ValueError why a line cannot be used."""
    try:
        record = parse_json(line.decode("utf-8"))
    except ValueError as error:
        is_binary = isinstance(error, UnicodeError)
        raise ValueError("not UTF-8 text" if is_binary else "not a JSON object") from None
    record = record if isinstance(record, dict) else {}
    name, caption, image_id = map(record.get, ("image_path", "caption", "original_id"))
    if not is_text(name) or not is_text(caption):
        raise ValueError("needs the texts image_path, caption")
    if not caption.strip():
        raise ValueError("an empty caption")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"a caption of {len(caption):,} characters")
    return name, caption, image_id if is_text(image_id) else PurePosixPath(name).stem


def _check_file(folder: Path, resolved: Path, name: str) -> None:
    """Raise ValueError where an image file cannot be used, without opening it."""
    path = inside(folder, name)
    try:
        if not path.is_file():
            raise ValueError(f"image {path} is missing")
    except OSError as error:
        raise ValueError(f"image path of {len(name):,} characters: {error.strerror}") from None
    if not is_inside(resolved, path):
        raise ValueError(f"image {path} is a link that leads out of {folder}")


def fingerprint(lines: Mapping[str, Iterable[str]], images: Mapping[str, Mapping[str, str]]) -> str:
    """Hash the content of a caption folder, whatever its order.

    Args:
        lines: the lines of each split's ``captions.jsonl``.
        images: for each split, SHA-256 of each image file by its path relative to the split.
    """
    total = hashlib.sha256()
    for split in SPLITS:
        for line in sorted(lines.get(split, ())):
            total.update(f"{split}\tcaption\t{line}\n".encode())
        for path, digest in sorted(images.get(split, {}).items()):
            total.update(f"{split}\timage\t{path}\t{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _image_files(split_dir: Path) -> list[Path]:
    """Return the files beside captions, without what file managers leave in folders."""
    return sorted((split_dir / IMAGES_NAME).glob("[!.]*"))


class _Manifest(BaseModel):
    format: Literal["vlm-bridge caption folder"]
    format_version: Literal[1]
    counts: dict[str, dict[str, int]]
    fingerprint: str


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``ROOT/manifest.json``; DataError where it is damaged or of another format."""
    path = root / MANIFEST_NAME
    try:
        manifest = parse_json(path.read_bytes())
        _Manifest.model_validate(manifest)
    except ValueError as error:  # pydantic's too
        why = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or of another version: make it again ({why})") from None
    return manifest


def _facts(root: Path) -> dict[str, Any]:
    """Return what the manifest of a folder would hold that other tools prepared.

    Raises:
        DataError: no line of a split can be used.
    """
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        path, skipped = root / split / CAPTIONS_NAME, Skipped(f"{split} captions")
        images = _read_captions(path.parent, skipped) if path.is_file() else []
        if len(skipped) and not images:
            raise DataError(
                f"none of the {skipped.total:,} lines of {path} can be used: {skipped.summary()}; "
                f"captions in another form: `vlm-data transform --source local --input-dir {root} "
                "--output-dir NEW_FOLDER`"
            )
        counts[split] = {"images": len(images)}
    return {"source": "prepared by other tools", "counts": counts, "fingerprint": _state(root)}


def _state(root: Path) -> str:
    """Hash caption files, and names and sizes of images: what each start can afford."""
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        path = root / split / CAPTIONS_NAME
        if path.is_file():
            digest.update(f"{split}\0{_sha256(path)}\0".encode())
            for image in _image_files(root / split):
                line = f"{image.name}\0{image.stat().st_size}\0"
                digest.update(line.encode(errors="surrogateescape"))
    return f"blake2b:{digest.hexdigest()}"
