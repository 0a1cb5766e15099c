"""Fine-tuning on few images: minutes, CIDEr, and the share of captions in the new style, before and after.

    python -m benchmarks.finetune --input-dir datasets/coco --images 40                 one caption an image
    python -m benchmarks.finetune --input-dir datasets/flickr8k --images 300 --captions 5
    python -m benchmarks.finetune --input-dir datasets/flickr8k --images 300 --captions 5 language_model.lora.r=8

Captions are rewritten into a style that is a structure, not a phrase: where something is comes first, then a colon, then
what is there ("A dog runs on the beach." is "On the beach: a dog runs."). `vlm-bridge finetune` gets a folder of some
training images with a captions.csv, and knows nothing else. The dataset's own validation images, which neither training
nor the choice of a checkpoint sees, are captioned by the captioner it started from and by the new one.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.cli.options import quiet_transformers, show_progress
from vlm_bridge.data_pipeline.samples import CaptionedImage
from vlm_bridge.data_pipeline.sources import SourceItem, find_source, make_source
from vlm_bridge.evaluation.run import evaluate_captioner, versions
from vlm_bridge.finetuning import finetune

PLACES = (
    "in", "on", "at", "near", "through", "over", "by", "with", "under", "behind", "across", "into", "along",
    "around", "beside", "next", "from", "above", "against", "down", "inside", "outside",
)  # fmt: skip
NOWHERE = "simply"
IN_STYLE = re.compile(rf"({'|'.join((*PLACES, NOWHERE))})\b[^:]*: [^:]+\.", re.IGNORECASE)


def restyled(caption: str) -> str:
    """Return a caption with its place first: "A dog runs on sand." becomes "On sand: a dog runs."."""
    words = [word.rstrip(",;:") for word in caption.strip().rstrip(" .").split()]
    starts = (at for at in range(2, len(words) - 1) if words[at].lower() in PLACES)
    at = next(starts, len(words))
    place, rest = " ".join(words[at:]) or NOWHERE, " ".join(words[:at])
    return f"{place[:1].upper()}{place[1:]}: {rest[:1].lower()}{rest[1:]}."


def write_folder(folder: Path, items: Sequence[SourceItem], num_captions: int) -> None:
    """Write images and captions.csv as a person would have them."""
    folder.mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for item in items:
            shutil.copy(str(item.image), folder)
            name = Path(str(item.image)).name
            writer.writerows([name, restyled(caption)] for caption in item.captions[:num_captions])


def measure(captioner: Captioner, items: Sequence[SourceItem], name: str) -> dict[str, float]:
    """Return scores against rewritten captions, and the share of captions in the style."""
    images = [
        CaptionedImage(Path(str(item.image)), tuple(map(restyled, item.captions)), item.image_id)
        for item in items
    ]
    with show_progress(f"captioned {name}") as report:
        run = evaluate_captioner(
            captioner, images, decode=captioner.recipe.decode,
            progress=lambda done: report(done, len(images)),
        )  # fmt: skip
    captions = [prediction.caption for prediction in run.predictions]
    print(f"{name}:", *captions[:4], sep="\n  ")
    in_style = sum(bool(IN_STYLE.fullmatch(caption)) for caption in captions) / len(captions)
    return {
        "in_style": in_style,
        **{k: run.scores[k] for k in ("CIDEr", "BLEU-4", "perplexity", "visual_gain")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input-dir", type=Path, required=True, help="a dataset with train and val images"
    )
    parser.add_argument("--images", type=int, default=40, help="images to fine-tune on")
    parser.add_argument("--captions", type=int, default=1, help="captions of each, at most")
    parser.add_argument("--held-out", type=int, help="images to measure on (default: all of val)")
    parser.add_argument("--from", dest="start", default="bundled", help="captioner to start from")
    parser.add_argument("--work-dir", type=Path, help="keep everything in this new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    given = parser.parse_args()
    quiet_transformers()
    name, _ = find_source(given.input_dir)
    items = make_source(name, given.input_dir).items()
    train = [item for item in items if item.split == "train"]
    held_out = [item for item in items if item.split == "val"][: given.held_out]
    chosen = random.Random(given.seed).sample(train, given.images)
    with TemporaryDirectory() as temporary:
        work = given.work_dir or Path(temporary)
        write_folder(work / "images", chosen, given.captions)
        scores = {"before": measure(Captioner.from_pretrained(given.start), held_out, "before")}
        result = finetune(
            work / "images", work / "run", start=given.start,
            overrides=[f"seed={given.seed}", *given.overrides], progress=show_progress,
        )  # fmt: skip
        scores["after"] = measure(Captioner.from_pretrained(work / "run"), held_out, "after")
        minutes = result.seconds / 60
    print(
        f"{given.images} images, {minutes:.1f} minutes; on {len(held_out)} held-out images of {name}:"
    )
    for score in scores["before"]:
        print(f"  {score:<12}" + "".join(f"{scores[when][score]:>10.3f}" for when in scores))
    if given.json:
        facts = {
            "images": given.images,
            "captions": given.captions,
            "seed": given.seed,
            "minutes": minutes,
        }
        given.json.write_text(
            json.dumps({**facts, **scores, "versions": versions()}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
