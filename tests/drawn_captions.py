"""A small caption folder of drawn images in the on-disk format, written byte by byte."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from vlm_bridge.data_pipeline.caption_folder import FORMAT, FORMAT_VERSION, fingerprint

COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("square", "circle")
IMAGES = {"train": 24, "val": 8, "test": 8}
SIDE = 64


def write_drawn_caption_folder(root: Path) -> Path:
    """Write images of one colored shape each, with two captions; every split has all of them."""
    rng = random.Random(0)
    lines: dict[str, list[str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for split, num_images in IMAGES.items():
        (root / split / "images").mkdir(parents=True)
        lines[split], digests[split] = [], {}
        for index in range(num_images):
            color, shape = COLORS[index % 4], SHAPES[index // 4 % 2]
            name, path = f"{split}-{index:02d}", f"images/{split}-{index:02d}.jpg"
            _draw(color, shape, rng).save(root / split / path, quality=90)
            digests[split][path] = hashlib.sha256((root / split / path).read_bytes()).hexdigest()
            for caption in (f"A {color} {shape}.", f"There is a {shape}, and it is {color}."):
                record = {"image_path": path, "caption": caption, "original_id": name}
                lines[split].append(json.dumps(record))
        text = "\n".join(lines[split]) + "\n"
        (root / split / "captions.jsonl").write_text(text, encoding="utf-8")
    manifest = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "source": "drawn by the tests",
        "licence": "made by this project", "seed": 0, "split_rule": "written as it is",
        "counts": {split: {"images": n, "captions": 2 * n} for split, n in IMAGES.items()},
        "rejected": [], "fingerprint": fingerprint(lines, digests),
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return root


def _draw(color: str, shape: str, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    size = rng.randint(20, 36)
    left, top = rng.randint(2, SIDE - size - 2), rng.randint(2, SIDE - size - 2)
    pen = ImageDraw.Draw(image)
    draw = pen.rectangle if shape == "square" else pen.ellipse
    draw((left, top, left + size, top + size), fill=color)
    return image
