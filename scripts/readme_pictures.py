"""Make the picture of the README from real output.

    python scripts/readme_pictures.py [CHECKPOINT]

Writes docs/images/photographs.png: photographs that scikit-image and scikit-learn carry, captioned by a checkpoint or,
as in the README, by the captioner that comes with the package.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vlm_bridge.captioning.explain import SheetItem, draw_sheet
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.cli.options import quiet_transformers
from vlm_bridge.quickstart import real_photographs

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main(checkpoint: str | None = None) -> None:
    quiet_transformers()
    photographs = real_photographs()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, picture in photographs:
            paths.append(Path(folder) / f"{name}.png")
            picture.save(paths[-1])
        results = Captioner.from_pretrained(checkpoint).caption(paths)
        sheet = [
            SheetItem(path, result.caption or "", path.stem)
            for path, result in zip(paths, results, strict=True)
        ]
        draw_sheet(sheet, columns=len(sheet)).save(IMAGES / "photographs.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
