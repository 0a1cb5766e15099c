"""Make the pictures of the README from real output.

    python scripts/readme_pictures.py runs/lite-flickr8k runs/quickstart

Writes docs/images/photographs.png (photographs that scikit-image and scikit-learn carry, captioned by the first
checkpoint) and docs/images/scenes.png (drawn scenes of unseen colour-shape pairs, captioned by the second).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.cli.quiet import quiet_transformers
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.evaluation.contact_sheet import SheetItem, contact_sheet
from vlm_bridge.quickstart import real_photographs

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SCENES = 8


def main(photo_run: str, scene_run: str) -> None:
    quiet_transformers()
    photographs = real_photographs()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, picture in photographs:
            paths.append(Path(folder) / f"{name}.png")
            picture.save(paths[-1])
        results = Captioner.from_pretrained(photo_run).caption(paths)
        sheet = [
            SheetItem(path, result.caption or "", path.stem)
            for path, result in zip(paths, results, strict=True)
        ]
        contact_sheet(sheet, IMAGES / "photographs.png", columns=len(sheet))

    scenes = CaptionFolder.open(Path(scene_run) / "data").split("test")[:SCENES]
    results = Captioner.from_pretrained(scene_run).caption([scene.path for scene in scenes])
    sheet = [
        SheetItem(scene.path, result.caption or "", scene.captions[0])
        for scene, result in zip(scenes, results, strict=True)
    ]
    contact_sheet(sheet, IMAGES / "scenes.png", columns=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
