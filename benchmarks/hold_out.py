"""Hold training images out, to choose settings on: the validation images then only report.

    python -m benchmarks.hold_out --data-dir data/flickr8k --output-dir data/flickr8k-held-out

Copies a caption folder: a twelfth of its training images (500 of Flickr8k's), drawn by ``--seed``, become the
validation images of the new folder, and the others its training images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from vlm_bridge.data_pipeline.caption_folder import CAPTIONS_NAME, IMAGES_NAME, open_data_folder

SHARE = 1 / 12


def hold_out(data_dir: Path, output_dir: Path, seed: int) -> dict[str, int]:
    """Write the new folder; return the number of images of its splits."""
    images = open_data_folder(data_dir).split("train")
    count = max(1, round(SHARE * len(images)))
    order = np.random.default_rng(seed).permutation(len(images))
    splits = {"val": np.sort(order[:count]), "train": np.sort(order[count:])}
    for split, indices in splits.items():
        folder = output_dir / split
        (folder / IMAGES_NAME).mkdir(parents=True)
        with (folder / CAPTIONS_NAME).open("w", encoding="utf-8") as file:
            for image in (images[index] for index in indices):
                name = f"{IMAGES_NAME}/{image.path.name}"
                (folder / name).write_bytes(image.path.read_bytes())
                for caption in image.captions:
                    line = {
                        "image_path": name,
                        "caption": caption,
                        "original_id": image.original_id,
                    }
                    file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
    return {split: len(indices) for split, indices in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output_dir.exists():
        parser.error(f"{options.output_dir} exists: remove it first")
    try:
        print(hold_out(options.data_dir, options.output_dir, options.seed))
    except BaseException:
        shutil.rmtree(options.output_dir, ignore_errors=True)  # nothing half-made stays
        raise


if __name__ == "__main__":
    main()
