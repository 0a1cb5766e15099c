"""Which layers of EfficientNet-Lite0 know colour, and which know shape, of pairs they were not probed on?

    python -m benchmarks.layer_probe

Logistic regression on pooled features of single drawn objects: fitted on training pairs, tested on held-out
colour-shape pairs. Needs the `photos` extra (scikit-learn).
"""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vlm_bridge.configuration import VisionEncoderConfig
from vlm_bridge.data_pipeline.sources.scenes import Kind, make_scene
from vlm_bridge.data_pipeline.splits import SplitName
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder

LAYERS = (0, 2, 4, 10, 15, 16)
NUM_TRAIN, NUM_TEST, BATCH = 400, 100, 32


def single_objects(split: SplitName, count: int) -> tuple[list, list[Kind]]:
    pictures, kinds = [], []
    index = 0
    while len(pictures) < count:
        scene = make_scene(1, split, index)
        index += 1
        if scene.facts.count == 1:
            pictures.append(scene.draw())
            kinds.append(scene.facts.kinds[0])
    return pictures, kinds


def pooled(encoder, pictures: list) -> torch.Tensor:
    """Mean, maximum and minimum over the grid, [pictures, 3 D]."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(pictures), BATCH):
            features = encoder(encoder.preprocess(pictures[start : start + BATCH]))
            parts.append(torch.cat((features.mean(1), features.amax(1), features.amin(1)), dim=1))
    return torch.cat(parts)


def main() -> None:
    train_pictures, train_kinds = single_objects("train", NUM_TRAIN)
    test_pictures, test_kinds = single_objects("test", NUM_TEST)
    print("layer  width  colour of unseen pairs  shape of unseen pairs")
    for layer in LAYERS:
        encoder = build_vision_encoder(VisionEncoderConfig(layers=(layer,)))
        train, test = (
            pooled(encoder, pictures).numpy() for pictures in (train_pictures, test_pictures)
        )
        scores = []
        for what in ("color", "shape"):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
            probe.fit(train, [getattr(kind, what) for kind in train_kinds])
            scores.append(probe.score(test, [getattr(kind, what) for kind in test_kinds]))
        print(f"{layer:5}  {encoder.embed_dim:5}  {scores[0]:22.2f}  {scores[1]:21.2f}")


if __name__ == "__main__":
    main()
