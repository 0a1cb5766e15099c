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
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.data_pipeline.images import IMAGE_SUFFIXES
from vlm_bridge.data_pipeline.samples import CaptionedImage, Skipped, inside, is_inside
from vlm_bridge.data_pipeline.shards import ShardFolder
from vlm_bridge.data_pipeline.splits import SPLITS, SplitName
from vlm_bridge.errors import DataError
from vlm_bridge.files import write_atomically
from vlm_bridge.parsing import is_text, lines_of, parse_json

FORMAT = "vlm-bridge caption folder"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CAPTIONS_NAME = "captions.jsonl"
IMAGES_NAME = "images"
UNFINISHED_NAME = ".unfinished"  # working files of `transform`
PREPARED_ELSEWHERE = "prepared by other tools"  # `source` of a folder without a manifest
TRANSFORM = "vlm-data transform --source local --input-dir IMAGES --output-dir NEW_FOLDER"


@dataclass(frozen=True)
class CaptionFolder:
    """A finished caption folder; make one with :meth:`open`."""

    root: Path
    manifest: dict[str, Any]
    notes_dir: ClassVar[Path | None] = None

    @classmethod
    def open(cls, root: str | Path) -> CaptionFolder:
        """Open the caption folder at ``root``, also one that other tools prepared.

        Raises:
            DataError: missing, unfinished, damaged or of another format.
        """
        root = Path(root)
        if is_prepared_elsewhere(root):
            return cls(root, _facts(root))
        if (root / MANIFEST_NAME).is_file():
            folder = cls(root, read_manifest(root))
            for path in (root / split / CAPTIONS_NAME for split in folder.splits):
                if not path.is_file():
                    raise DataError(f"{path} is missing: make the caption folder again")
            return folder
        if (root / UNFINISHED_NAME).is_dir():
            raise DataError(
                f"caption folder {root} is unfinished: "
                "continue it with the same `vlm-data transform` command"
            )
        raise DataError(
            f"{root} is no caption folder (neither {MANIFEST_NAME} nor train/{CAPTIONS_NAME}) and "
            f"no shard folder (no *.tar in {'/, '.join(SPLITS)}/): make one with `{TRANSFORM}`"
        )

    @property
    def fingerprint(self) -> str:
        """Hash over every caption line and every image, as recorded in the manifest."""
        return self.manifest["fingerprint"]

    @property
    def splits(self) -> list[str]:
        """The splits that hold at least one image, in the order train, val, test."""
        counts = self.manifest["counts"]
        return [split for split in SPLITS if counts.get(split, {}).get("images", 0) > 0]

    def split(self, name: SplitName, skipped: Skipped | None = None) -> list[CaptionedImage]:
        """Return the images of a split with their captions, in the order of the file.

        Args:
            skipped: takes the lines that cannot be used; without it, the first is an error.

        Raises:
            DataError: no such split, or a line that cannot be used (with file and line).
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"caption folder {self.root} has no {name} images (it has: {known})")
        found = Skipped(name) if skipped is None else skipped
        images = _read_captions(self.root / name, found)
        if skipped is None:
            found.refuse("make the folder again")
        return images

    def compute_fingerprint(self) -> str:
        """Read every file and return the fingerprint; another one where a file was changed."""
        if "format" not in self.manifest:
            return _state(self.root)
        folders = {split: self.root / split for split in self.splits}
        images = {split: _image_digests(folder) for split, folder in folders.items()}
        return fingerprint({split: _lines(folder) for split, folder in folders.items()}, images)


def _read_captions(folder: Path, skipped: Skipped) -> list[CaptionedImage]:
    """Read a ``captions.jsonl``; images come in the order of their first lines."""
    path, resolved = folder / CAPTIONS_NAME, folder.resolve()
    captions: dict[str, list[str]] = {}
    ids: dict[str, str] = {}
    problems: dict[str, str] = {}
    for number, line in lines_of(path):
        skipped.total += 1
        try:
            record = _parse_record(line)
            name = record["image_path"]
            if name not in problems:
                problems[name] = _problem(folder, name, resolved)
            if problems[name]:
                raise ValueError(problems[name])
        except ValueError as error:
            skipped.add(f"{path}:{number}", str(error))
            continue
        captions.setdefault(name, []).append(record["caption"])
        image_id = record.get("original_id")
        ids.setdefault(name, image_id if is_text(image_id) else PurePosixPath(name).stem)
    return [
        CaptionedImage(folder / name, tuple(texts), ids[name]) for name, texts in captions.items()
    ]


def _parse_record(line: bytes) -> dict[str, Any]:
    """Return the record of a line. Raises ValueError with the reason why it cannot be used."""
    try:
        record = parse_json(line.decode("utf-8"))
    except ValueError as error:
        is_binary = isinstance(error, UnicodeError)
        raise ValueError("not UTF-8 text" if is_binary else "not a JSON object") from None
    keys = ("image_path", "caption")
    if not isinstance(record, dict) or not all(is_text(record.get(key)) for key in keys):
        raise ValueError(f"needs the texts {', '.join(keys)}")
    if not record["caption"].strip():
        raise ValueError("an empty caption")
    if len(record["caption"]) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"a caption of {len(record['caption']):,} characters")
    return record


def _problem(folder: Path, name: str, resolved: Path) -> str:
    """Return why an image file cannot be used, without opening it; empty where it can."""
    try:
        path = inside(folder, name)
        if not path.is_file():
            return f"image {path} is missing"
        is_link = not is_inside(resolved, path)
        return f"image {path} is a link that leads out of {folder}" if is_link else ""
    except OSError as error:
        return f"an image path of {len(name):,} characters ({error.strerror})"
    except ValueError as error:
        return str(error)


class CaptionFolderWriter:
    """Writes the parts of a caption folder; the manifest, which makes it whole, comes last."""

    def __init__(self, root: Path):
        self.root = root
        self.working_dir = root / UNFINISHED_NAME

    def prepare(self) -> None:
        self.working_dir.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            self.images_dir(split).mkdir(parents=True, exist_ok=True)

    def images_dir(self, split: str) -> Path:
        return self.root / split / IMAGES_NAME

    def write_captions(self, split: str, lines: Iterable[str]) -> None:
        content = "".join(f"{line}\n" for line in lines)
        write_atomically(self.root / split / CAPTIONS_NAME, _encoded(content))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.root / MANIFEST_NAME, _encoded(text))


def caption_line(file_name: str, caption: str, original_id: str) -> str:
    """Return one line of ``captions.jsonl``, without its newline."""
    record = {"image_path": f"{IMAGES_NAME}/{file_name}", "caption": caption}
    return json.dumps({**record, "original_id": original_id}, ensure_ascii=False)


def fingerprint(lines: Mapping[str, Iterable[str]], images: Mapping[str, Mapping[str, str]]) -> str:
    """Hash the content of a caption folder, whatever its order.

    Args:
        lines: the lines of each split's ``captions.jsonl``.
        images: for each split, SHA-256 of each image file by its path relative to the split.
    """
    total = hashlib.sha256()
    for split in SPLITS:
        for line in sorted(lines.get(split, ())):
            total.update(_encoded(f"{split}\tcaption\t{line}\n"))
        for path, digest in sorted(images.get(split, {}).items()):
            total.update(f"{split}\timage\t{path}\t{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _encoded(text: str) -> bytes:
    """Encode text that may hold half characters (names of files that are not UTF-8), escaped."""
    return text.encode(errors="backslashreplace")


def _image_digests(split_dir: Path) -> dict[str, str]:
    return {f"{IMAGES_NAME}/{path.name}": _sha256(path) for path in _image_files(split_dir)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _image_files(split_dir: Path) -> list[Path]:
    """Return the image files of a split by name, without what file managers leave in folders."""
    found = sorted((split_dir / IMAGES_NAME).glob("[!.]*"))
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]


def _lines(split_dir: Path) -> list[str]:
    text = (split_dir / CAPTIONS_NAME).read_text(encoding="utf-8", errors="backslashreplace")
    return text.removesuffix("\n").split("\n")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``ROOT/manifest.json``; DataError where it is damaged or of another format."""
    path = root / MANIFEST_NAME
    try:
        manifest = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): make the caption folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a caption folder: choose another folder")
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, not {FORMAT_VERSION}: make the folder again"
        )
    counts = manifest.get("counts")
    are_counts = isinstance(counts, dict) and all(isinstance(n, dict) for n in counts.values())
    if not (are_counts and isinstance(manifest.get("fingerprint"), str)):
        raise DataError(f"{path} lacks counts, fingerprint: make the caption folder again")
    return manifest


# Folders that other tools prepared.


def is_prepared_elsewhere(root: Path) -> bool:
    """Return whether a folder has the layout, and no manifest of `transform`."""
    has_captions = any((root / split / CAPTIONS_NAME).is_file() for split in SPLITS)
    if not has_captions or (root / UNFINISHED_NAME).is_dir():
        return False
    is_bare = not (root / MANIFEST_NAME).is_file()
    return is_bare or read_manifest(root).get("source") == PREPARED_ELSEWHERE


def _facts(root: Path) -> dict[str, Any]:
    """Return what the manifest of a folder would hold that other tools prepared.

    Raises:
        DataError: no line of a split can be used.
    """
    state = _state(root)
    if (root / MANIFEST_NAME).is_file():  # earlier versions wrote one
        manifest = read_manifest(root)
        if manifest.get("state") == state:
            return manifest
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        path, skipped = root / split / CAPTIONS_NAME, Skipped(f"{split} captions")
        images = _read_captions(path.parent, skipped) if path.is_file() else []
        if skipped and not images:
            raise DataError(
                f"none of the {skipped.total:,} lines of {path} can be used: {skipped.summary()}; "
                f"captions in another form: `vlm-data transform --source local --input-dir {root} "
                "--output-dir NEW_FOLDER`"
            )
        counts[split] = {"images": len(images)}
    if not any(count["images"] for count in counts.values()):
        raise DataError(f"the {CAPTIONS_NAME} files in {root} have no lines: prepare it again")
    return {"source": PREPARED_ELSEWHERE, "counts": counts, "fingerprint": state}


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


DataFolder = CaptionFolder | ShardFolder


def open_data_folder(path: str | Path) -> DataFolder:
    """Open a recipe's ``data_dir``: a caption folder or a shard folder.

    Raises:
        DataError: neither of them, or one that cannot be used.
    """
    root = Path(path)
    is_ours = (root / MANIFEST_NAME).exists() or (root / UNFINISHED_NAME).is_dir()
    places = [root, *(root / split for split in SPLITS)]
    has_tars = any(any(place.glob("*.tar*")) for place in places)
    if has_tars and not is_ours and not is_prepared_elsewhere(root):
        return ShardFolder.open(root)
    return CaptionFolder.open(root)


def readable_split(folder: DataFolder, split: SplitName) -> tuple[list[CaptionedImage], Skipped]:
    """Return the images of a split, and the samples that were skipped.

    Raises:
        DataError: no such split, or more than `MAX_SKIPPED_SHARE` of its samples are skipped.
    """
    skipped = Skipped(f"{split} samples")
    images = folder.split(split, skipped)
    skipped.check()
    return images, skipped
