"""Small public datasets of drawn images, in the layouts of their authors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage

COLORS = ("red", "green", "blue", "yellow")
FLICKR8K_SPLITS = {"train": "train", "val": "dev", "test": "test"}
WORDINGS = ("{} .", "There is {} .", "Here is {} .", "A picture of {} .", "Somebody drew {} .")


def draw(path: Path, index: int) -> str:
    """Save an image of one color, different from all others; return its caption."""
    image = Image.new("RGB", (80, 60), COLORS[index % 4])
    image.putpixel((index, index), (0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"A large {COLORS[index % 4]} square."


def write_coco(root: Path) -> Path:
    """12 training and 4 validation images with their captions, as COCO 2017 lays them out."""
    (root / "annotations").mkdir(parents=True)
    for part, ids in (("train", range(12)), ("val", range(12, 16))):
        names = {index: f"{index:012d}.jpg" for index in ids}
        content = {
            "images": [{"id": index, "file_name": name} for index, name in names.items()],
            "annotations": [
                {
                    "image_id": index,
                    "id": index,
                    "caption": draw(root / f"{part}2017" / name, index),
                }
                for index, name in names.items()
            ],
        }
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    return root


def write_flickr30k(root: Path) -> Path:
    """6 training and 2 validation images with Karpathy's captions and splits."""
    images = [
        {
            "filename": f"{index}.jpg",
            "sentences": [{"raw": draw(root / "flickr30k-images" / f"{index}.jpg", index)}],
            "split": "train" if index < 6 else "val",
        }
        for index in range(8)
    ]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return root


def write_flickr8k(root: Path, splits: Mapping[str, Sequence[CaptionedImage]]) -> Path:
    """Write images with five captions each and the official lists of Flickr8k."""
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, images in splits.items():
        for image in images:
            shutil.copy(image.path, root / "Images")
            thing = image.captions[0].lower().removesuffix(".")
            lines += [
                f"{image.path.name}#{n}\t{words.format(thing)}\n"
                for n, words in enumerate(WORDINGS)
            ]
        names = "".join(f"{image.path.name}\n" for image in images)
        (root / f"Flickr_8k.{FLICKR8K_SPLITS[split]}Images.txt").write_text(names, encoding="utf-8")
    (root / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
    return root
