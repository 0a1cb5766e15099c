"""How much memory and time the captions of a huge caption folder take to open and to read.

    python -m benchmarks.many_captions [--lines 1000000 10000000] [--tiny]

Writes a caption folder with so many lines, five an image, into a temporary folder (pictures are links to a few files,
since captions are what is measured), opens its split, which checks every line, and reads images at random. Peaks are
of a process of its own and count the mapped file as far as it was read.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.harness import GIB, environment, markdown, peak_in_child, print_peak, watch_peak
from vlm_bridge.data_pipeline.caption_folder import (
    CAPTIONS_NAME,
    FORMAT,
    FORMAT_VERSION,
    IMAGES_NAME,
    MANIFEST_NAME,
    CaptionFolder,
    caption_line,
)

CAPTIONS_PER_IMAGE = 5
LINKS_PER_FILE = 30_000
"""File systems allow no more than some 65,000 names of one file."""
READ = 10_000
TINY_LINES = (100, 1000)


def write_folder(root: Path, num_lines: int) -> None:
    """A caption folder whose pictures are names of a few files."""
    images_dir = root / "train" / IMAGES_NAME
    images_dir.mkdir(parents=True)
    num_images = num_lines // CAPTIONS_PER_IMAGE
    with (root / "train" / CAPTIONS_NAME).open("w", encoding="utf-8") as file:
        for image in range(num_images):
            name = f"{image}.jpg"
            if image % LINKS_PER_FILE == 0:
                original = images_dir / name
                Image.new("RGB", (8, 8)).save(original)
            else:
                (images_dir / name).hardlink_to(original)
            for number in range(CAPTIONS_PER_IMAGE):
                text = f"A brown dog number {image} is running through the tall grass, for the {number}th time."
                file.write(caption_line(name, text, str(image)) + "\n")
    counts = {"train": {"images": num_images, "captions": num_lines}}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "counts": counts,
        "fingerprint": "sha256:0",
    }
    (root / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")


def open_and_read(root: Path) -> None:
    images = CaptionFolder.open(root).split("train")
    draw = random.Random(0)
    for _ in range(READ):
        assert images[draw.randrange(len(images))].captions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, nargs="+", default=(1_000_000, 10_000_000))
    parser.add_argument("--tiny", action="store_true", help="a few lines: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if options.peak_of:
        print_peak(watch_peak(lambda: open_and_read(options.peak_of), device, times=1))
        return 0
    rows = []
    for num_lines in TINY_LINES if options.tiny else options.lines:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "captions")
            write_folder(root, num_lines)
            size = (root / "train" / CAPTIONS_NAME).stat().st_size
            begun = time.perf_counter()
            peak = peak_in_child("benchmarks.many_captions", ["--peak-of", str(root)])
            rows.append(
                {
                    "lines": num_lines,
                    "file_bytes": size,
                    "seconds": time.perf_counter() - begun,
                    "peak_bytes": peak.absolute,
                    "over_start_bytes": peak.over_models,
                }
            )
    columns = {
        "lines": [f"{row['lines']:,}" for row in rows],
        "file GiB": [f"{row['file_bytes'] / GIB:.2f}" for row in rows],
        "seconds": [f"{row['seconds']:.1f}" for row in rows],
        "peak GiB": [f"{row['peak_bytes'] / GIB:.2f}" for row in rows],
        "over start GiB": [f"{row['over_start_bytes'] / GIB:.2f}" for row in rows],
    }
    print(markdown(columns))
    if options.json:
        content = {"rows": rows, "environment": environment(device, 0)}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
