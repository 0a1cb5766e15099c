"""Shards as img2dataset writes them, of given members or of a caption folder's images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder

Members = list[tuple[str, bytes]]


def jpeg(index: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (index * 37 % 256, index * 11 % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(index: int, caption: str | None = None) -> Members:
    text = f"image number {index}" if caption is None else caption
    return [(f"{index:05d}.jpg", jpeg(index)), (f"{index:05d}.txt", text.encode())]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shard_folder(root: Path, shards: int = 3, each: int = 10) -> Path:
    """``shards`` tars of ``each`` samples for training, and one of four for validation."""
    for number in range(shards):
        members = [member for n in range(each) for member in sample(number * each + n)]
        write_tar(root / "train" / f"{number:05d}.tar", members)
    write_tar(root / "val" / "00000.tar", [member for n in range(900, 904) for member in sample(n)])
    return root


def shards_of(folder: CaptionFolder, root: Path, each: int = 10) -> Path:
    """The images of a caption folder in its order, each with its first caption, as shards."""
    for split in folder.splits:
        images = folder.split(split)  # type: ignore[arg-type] - the splits that it has
        for start in range(0, len(images), each):
            members: Members = []
            for image in images[start : start + each]:
                members.append((f"{image.original_id}.jpg", image.path.read_bytes()))
                members.append((f"{image.original_id}.txt", image.captions[0].encode()))
            write_tar(root / split / f"{start // each:05d}.tar", members)
    return root
