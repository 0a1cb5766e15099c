"""What the number format of the feature cache costs in captions: a trained captioner reads its features in each format.

    python -m benchmarks.feature_formats --checkpoint runs/lite-flickr8k --data-dir data/flickr8k [--json FILE]
    python -m benchmarks.feature_formats --tiny                                  does it run at all?

Every picture is encoded once; its features then pass through the records that a cache would hold. The scores are those
of `vlm-bridge evaluate`, on the same pictures and with the same decoding; the captions that changed are counted against
those from features that were never stored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.harness import environment, markdown, prepare
from benchmarks.systems import EOS, START, build_system
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.features import FeatureDtype, FeatureFormat
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches
from vlm_bridge.device import autocast
from vlm_bridge.metrics import score_captions
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy.validation import validate

SCORES = ("CIDEr", "BLEU-4", "METEOR")
BATCH = 32
NOT_STORED = "not stored"


@dataclass(frozen=True)
class Subject:
    """A captioner and the images that it captions.

    Attributes:
        references: the human captions of each image.
        features_bnd: [images, N, D] in float32, as the encoder made them.
        text: token ids -> caption.
        amp_dtype: autocast's, None for none.
    """

    model: CaptionModel
    data: TokenizedImages
    references: Sequence[Sequence[str]]
    features_bnd: torch.Tensor
    decode: DecodeSettings
    text: Callable[[list[int]], str]
    amp_dtype: str | None

    def autocast(self) -> Any:
        return autocast(self.model.device, self.amp_dtype)


def trained(options: argparse.Namespace) -> Subject:
    """A checkpoint and the pictures of a caption folder, each encoded once."""
    captioner = Captioner.from_pretrained(options.checkpoint, options.device)
    model, recipe = captioner.model, captioner.recipe
    images = CaptionFolder.open(options.data_dir).split(options.split)[: options.limit]
    batches = in_batches([image.path for image in images], BATCH)
    features = [
        model.encode_images([open_image(path) for path in batch]).float().cpu() for batch in batches
    ]
    return Subject(
        model,
        TokenizedImages(images, captioner.format),
        [image.captions for image in images],
        torch.cat(features),
        recipe.decode,
        model.language_model.decode,
        recipe.autocast_dtype,
    )


def random(options: argparse.Namespace, device: torch.device) -> Subject:
    """A small captioner of random weights, whose captions are numbers."""
    system = build_system("lite", device, num_captions=40, seed=options.seed, tiny=True)
    model = system.model.eval()
    model.language_model.start_id, model.language_model.eos_id = START, EOS

    def text(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    references = [
        [
            text(system.data.caption(image, number).labels[:-1]) for number in range(count)
        ]  # without EOS
        for image, count in enumerate(system.data.captions_per_image)
    ]
    features = torch.from_numpy(np.asarray(system.features)).float()
    decode = DecodeSettings(num_beams=2, max_new_tokens=6)
    return Subject(model, system.data, references, features, decode, text, None)


def stored(features_bnd: torch.Tensor, dtype: FeatureDtype) -> torch.Tensor:
    """The same after a cache of this format."""
    format = FeatureFormat(*features_bnd.shape[1:], dtype=dtype)
    return torch.cat(
        [format.unpack(format.pack(batch)).float() for batch in features_bnd.split(BATCH)]
    )


def captions_of(subject: Subject, features_bnd: torch.Tensor) -> list[str]:
    captions = []
    for batch in features_bnd.split(BATCH):
        with subject.autocast():
            found = subject.model.generate(batch, subject.data.format.prompt_ids, subject.decode)
        captions += [subject.text(caption.ids) for caption in found]
    return captions


def measure(subject: Subject, formats: Sequence[FeatureDtype]) -> list[dict[str, Any]]:
    """A row for features that were never stored, and one for each format."""
    exact = subject.features_bnd
    references = {str(number): captions for number, captions in enumerate(subject.references)}
    rows: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {}
    for name, features in {
        NOT_STORED: exact,
        **{dtype: stored(exact, dtype) for dtype in formats},
    }.items():
        said[name] = captions_of(subject, features)
        scores = score_captions(
            references, {str(n): caption for n, caption in enumerate(said[name])}
        ).corpus
        as_read: Any = np.asarray(features)
        loss = validate(subject.model, subject.data, as_read, autocast=subject.autocast).loss
        changed = sum(
            caption != other for caption, other in zip(said[name], said[NOT_STORED], strict=True)
        )
        kept = {metric: scores[metric] for metric in SCORES if metric in scores}
        rows.append({"format": name, **kept, "loss": loss, "captions_changed": changed})
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--checkpoint", help="a trained captioner")
    subject.add_argument(
        "--tiny", action="store_true", help="small random models: does it run at all?"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data/flickr8k"))
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="the first pictures only")
    parser.add_argument(
        "--formats", nargs="+", choices=get_args(FeatureDtype), default=get_args(FeatureDtype)
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and captions of --tiny")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    device = prepare(options)

    rows = measure(random(options, device) if options.tiny else trained(options), options.formats)
    print(
        markdown(
            {
                key: [
                    f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key])
                    for row in rows
                ]
                for key in rows[0]
            }
        )
    )
    if options.json:
        report = {"rows": rows, "environment": environment(device, options.seed)}
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
