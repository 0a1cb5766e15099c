"""What the number format of the feature cache costs in captions: a trained captioner reads its features in each format.

    python -m benchmarks.feature_formats --checkpoint runs/lite-flickr8k --data-dir data/flickr8k [--json FILE]

Every picture is encoded once; its features then pass through the records that a cache would hold. The scores are those
of `vlm-bridge evaluate`, on the same pictures and with the same decoding; the captions that changed are counted against
those from features that were never stored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.harness import environment, markdown
from vlm_bridge import runtime
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.cli.quiet import quiet_transformers
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.feature_format import FeatureDtype, FeatureFormat
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches
from vlm_bridge.evaluation.metrics import score_captions
from vlm_bridge.training_strategy.validation import validate

SCORES = ("CIDEr", "BLEU-4", "METEOR")
BATCH = 32
NOT_STORED = "not stored"


def encode(captioner: Captioner, images: list[CaptionedImage]) -> torch.Tensor:
    """Features [images, N, D] in float32."""
    batches = in_batches([image.path for image in images], BATCH)
    return torch.cat(
        [captioner.model.encode_images([open_image(p) for p in b]).float().cpu() for b in batches]
    )


def stored(features_bnd: torch.Tensor, dtype: FeatureDtype) -> torch.Tensor:
    """The same after a cache of this format."""
    format = FeatureFormat(*features_bnd.shape[1:], dtype=dtype)
    return torch.cat([format.unpack(format.pack(batch)).float() for batch in features_bnd.split(BATCH)])


def captions_of(captioner: Captioner, features_bnd: torch.Tensor) -> list[str]:
    model, captions = captioner.model, []
    for batch in features_bnd.split(BATCH):
        with autocast(captioner):
            ids, _ = model.generate_captions(batch, captioner.format.prompt_ids, captioner.recipe.decode)
        captions += map(model.language_model.decode, ids)
    return captions


def autocast(captioner: Captioner) -> Any:
    recipe = captioner.recipe
    return runtime.autocast(captioner.model.device, recipe.amp_dtype if recipe.use_amp else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data/flickr8k"))
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="the first pictures only")
    parser.add_argument(
        "--formats", nargs="+", choices=get_args(FeatureDtype), default=get_args(FeatureDtype)
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    quiet_transformers()

    captioner = Captioner.from_pretrained(options.checkpoint, options.device)
    images = CaptionFolder.open(options.data_dir).split(options.split)[: options.limit]
    references = {str(number): image.captions for number, image in enumerate(images)}
    data = TokenizedImages(images, captioner.format)
    exact = encode(captioner, images)
    forms = {NOT_STORED: exact} | {dtype: stored(exact, dtype) for dtype in options.formats}

    rows: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {}
    for name, features in forms.items():
        said[name] = captions_of(captioner, features)
        scores = score_captions(references, {str(n): caption for n, caption in enumerate(said[name])}).corpus
        loss = validate(
            captioner.model, data, np.asarray(features), autocast=lambda: autocast(captioner)
        ).loss
        changed = sum(ours != exact for ours, exact in zip(said[name], said[NOT_STORED], strict=True))
        kept = {metric: scores[metric] for metric in SCORES if metric in scores}
        rows.append({"format": name, **kept, "loss": loss, "captions_changed": changed})
        print(rows[-1], flush=True)

    print(
        markdown(
            {
                key: [f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for row in rows]
                for key in rows[0]
            }
        )
    )
    if options.json:
        report = {"rows": rows, "environment": environment(captioner.model.device, 0)}
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
