"""A small caption folder of drawn pictures in the on-disk format, written byte by byte."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from vlm_bridge.data_pipeline.caption_folder import FORMAT, FORMAT_VERSION, fingerprint

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle")
IMAGES_PER_SPLIT = {"train": 24, "val": 8, "test": 8}
CAPTIONS_PER_IMAGE = 2
SIDE = 64


def write_drawn_caption_folder(root: Path) -> Path:
    """Write 24 / 8 / 8 pictures of one coloured shape each, two captions a picture, and return ``root``.

    Every split holds every colour and shape equally often; places and sizes are drawn from a fixed seed.
    """
    rng = random.Random(0)
    lines: dict[str, list[str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for split, num_images in IMAGES_PER_SPLIT.items():
        folder = root / split
        (folder / "images").mkdir(parents=True)
        lines[split], digests[split] = [], {}
        for index in range(num_images):
            colour, shape = (
                COLOURS[index % len(COLOURS)],
                SHAPES[index // len(COLOURS) % len(SHAPES)],
            )
            name = f"{split}-{index:02d}"
            image_path = f"images/{name}.jpg"
            _draw(colour, shape, rng).save(folder / image_path, quality=90)
            digests[split][image_path] = hashlib.sha256(
                (folder / image_path).read_bytes()
            ).hexdigest()
            for caption in (f"A {colour} {shape}.", f"There is a {shape}, and it is {colour}."):
                record = {"image_path": image_path, "caption": caption, "original_id": name}
                lines[split].append(json.dumps(record))
        (folder / "captions.jsonl").write_text("\n".join(lines[split]) + "\n", encoding="utf-8")

    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": "drawn by the tests",
        "licence": "made by this project",
        "seed": 0,
        "split_rule": "written as it is",
        "counts": {
            split: {"images": num_images, "captions": num_images * CAPTIONS_PER_IMAGE}
            for split, num_images in IMAGES_PER_SPLIT.items()
        },
        "rejected": [],
        "fingerprint": fingerprint(lines, digests),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return root


def _draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    size = rng.randint(20, 36)
    left, top = rng.randint(2, SIDE - size - 2), rng.randint(2, SIDE - size - 2)
    draw = ImageDraw.Draw(picture)
    (draw.rectangle if shape == "square" else draw.ellipse)(
        (left, top, left + size, top + size), fill=colour
    )
    return picture
