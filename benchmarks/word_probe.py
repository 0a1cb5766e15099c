"""How much of what captions say can be read from an encoder's features? Minutes, where training a bridge takes hours.

    python -m benchmarks.word_probe --data-dir data/flickr8k efficientnet-lite0 efficientnet-lite2

Ridge regression from the mean and maximum of the grid to the words of a photograph's captions, fitted on training and
scored on validation photographs: the mean average precision over words. Needs the `photos` extra (scikit-learn).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder

NUM_WORDS, BATCH = 350, 32
FUNCTION_WORDS = {
    *("a", "an", "the", "is", "are", "has", "his", "her", "their", "it", "its", "that", "who"),
    *("in", "on", "of", "with", "and", "to", "at", "by", "for", "from", "as", "while"),
}


def words_of(image: CaptionedImage) -> set[str]:
    return {
        word for text in image.captions for word in re.findall("[a-z]+", text.lower())
    } - FUNCTION_WORDS


def says(images: Sequence[CaptionedImage], words: Sequence[str]) -> np.ndarray:
    """[images, words]: does any caption of the image have the word?"""
    return np.array([[word in of_image for word in words] for of_image in map(words_of, images)])


@torch.no_grad()
def pooled(name: str, images: Sequence[CaptionedImage]) -> tuple[np.ndarray, int]:
    """Mean and maximum over the grid [images, 2 D], and D."""
    encoder = build_vision_encoder(VisionEncoderConfig(name=name))
    parts = []
    for start in range(0, len(images), BATCH):
        pixels = encoder.preprocess(
            [open_image(image.path) for image in images[start : start + BATCH]]
        )  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(pixels).float()
        parts.append(torch.cat((features.mean(1), features.amax(1)), dim=1))
    return torch.cat(parts).numpy(), int(encoder.embed_dim)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "encoders", nargs="+", metavar="ENCODER", help="as a recipe's vision_encoder.name"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/flickr8k"), help="caption folder"
    )
    parser.add_argument("--train-images", type=int, default=2400)
    parser.add_argument("--val-images", type=int, default=800)
    options = parser.parse_args()
    folder = CaptionFolder.open(options.data_dir)
    train = list(folder.split("train"))[: options.train_images]
    val = list(folder.split("val"))[: options.val_images]
    counts = Counter(word for image in train for word in words_of(image))
    in_val = set().union(*map(words_of, val))
    words = [word for word, _ in counts.most_common(NUM_WORDS) if word in in_val]
    targets, truth = says(train, words), says(val, words)
    print(f"{len(train)} training and {len(val)} validation photographs, {len(words)} words")
    print("mean average precision  width  encoder")
    for name in options.encoders:
        features, width = pooled(name, [*train, *val])
        scaler = StandardScaler().fit(features[: len(train)])
        scaled = scaler.transform(features)
        # As many times the width as features are many: standardised, they then weigh the same however wide they are.
        probe = Ridge(alpha=3.0 * features.shape[1]).fit(scaled[: len(train)], targets)
        score = average_precision_score(truth, probe.predict(scaled[len(train) :]), average="macro")
        print(f"{score:22.3f}  {width:5}  {name}", flush=True)


if __name__ == "__main__":
    main()
