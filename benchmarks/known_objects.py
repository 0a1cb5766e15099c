"""Which of ImageNet's objects do the training captions name often? Those the bridge names by itself.

    python -m benchmarks.known_objects --data-dir data/flickr8k

Prints `decode.known_objects` for a recipe with `decode.object_threshold`: the names that so many captions use.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.model_architecture.generation import object_names


def known_objects(captions: Iterable[str], at_least: int) -> list[str]:
    """Names that, alone or in the plural, at least so many captions use as whole words."""
    counts: Counter[str] = Counter()
    names = object_names()
    forms = {form: name for name in names for form in (name, f"{name}s", f"{name}es")}
    pattern = re.compile(
        rf"\b({'|'.join(sorted(map(re.escape, forms), key=len, reverse=True))})\b", re.IGNORECASE
    )
    for caption in captions:
        counts.update({forms[found.lower()] for found in pattern.findall(caption)})
    return sorted(name for name, count in counts.items() if count >= at_least)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="caption folder")
    parser.add_argument("--at-least", type=int, default=300, help="captions (%(default)s)")
    options = parser.parse_args(arguments)
    images = CaptionFolder.open(options.data_dir).split("train")
    names = known_objects(
        (caption for image in images for caption in image.captions), options.at_least
    )
    print(f"known_objects: [{', '.join(names)}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
