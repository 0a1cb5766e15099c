"""Seconds from the last caption to the scores (all but SPICE), with METEOR started ahead and not.

    python -m benchmarks.scoring --data-dir data/flickr8k

Each image's last reference stands for its caption, and --ahead seconds of sleep for captioning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.metrics import CaptionScores, score_captions
from vlm_bridge.metrics.coco import Metric, started_meteor


def main() -> None:
    parser = harness.argument_parser(__doc__, repeats=3)
    parser.add_argument("--data-dir", type=Path, default=Path("data/flickr8k"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--ahead", type=float, default=15.0, help="seconds of captioning")
    options = parser.parse_args()
    device = harness.prepare(options)
    count = 20 if options.tiny else options.images
    images = open_data_folder(options.data_dir).split("val")[:count]
    references = {str(i.path): i.captions[:-1] or i.captions for i in images}
    hypotheses = {str(i.path): i.captions[-1] for i in images}

    def seconds(meteor: Metric | None) -> tuple[float, CaptionScores]:
        started = time.perf_counter()
        scores = score_captions(references, hypotheses, meteor=meteor)
        return time.perf_counter() - started, scores

    def ahead() -> tuple[float, CaptionScores]:
        with started_meteor() as meteor:
            time.sleep(0 if options.tiny else options.ahead)
            return seconds(meteor)

    ways: dict[str, Callable[[], tuple[float, CaptionScores]]] = {
        "METEOR started ahead": ahead,
        "METEOR started after": lambda: seconds(None),
    }
    seconds(None)  # imports, and files into memory
    print(harness.environment(device, options.seed))
    outcomes = {name: [run() for _ in range(options.repeats)] for name, run in ways.items()}
    for name, found in outcomes.items():
        each = [elapsed for elapsed, _ in found]
        took = ", ".join(f"{elapsed:.2f}" for elapsed in each)
        print(f"{name}: {statistics.median(each):.2f} s for {len(images)} images ({took})")
    same = len({repr(scores) for found in outcomes.values() for _, scores in found}) == 1
    print("scores of both:", "the same" if same else "DIFFERENT")


if __name__ == "__main__":
    main()
