"""`vlm-bridge quickstart`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vlm_bridge.evaluation.run import Evaluation

NEXT = """
What to type next:
  vlm-bridge caption {folder}/data/test/images --checkpoint {folder}
  vlm-data transform --source flickr8k --input-dir DIR --output-dir data/flickr8k
  vlm-training --config config/lite-flickr8k.yaml
  vlm-bridge caption PHOTO.jpg --checkpoint runs/lite-flickr8k"""


def quickstart(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Overrides of config/quickstart.yaml."
    ),
    output_dir: Path = typer.Option(Path("runs/quickstart"), help="Where everything is written."),
    photo_checkpoint: Path = typer.Option(
        Path("runs/lite-flickr8k"), help="A bridge trained on photos; used where it exists."
    ),
) -> None:
    """Draw scenes, train a bridge on this machine's CPU, and caption images it never saw."""
    from vlm_bridge import configuration
    from vlm_bridge import quickstart as first_minutes
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.cli.train import exit_when_interrupted
    from vlm_bridge.training_strategy.checkpoint import has_checkpoint

    quiet_transformers()
    places = {"data_dir": "data", "checkpoint_dir": "checkpoints", "log_dir": "logs"}
    located = [f"{key}={output_dir / folder}" for key, folder in places.items()]
    recipe = configuration.load_recipe(
        configuration.shipped_recipe("quickstart"), [*located, *(overrides or ())]
    )
    with exit_when_interrupted():
        metrics, evaluation = first_minutes.run(recipe, output_dir, workers=os.cpu_count() or 1)
    _print_scores(metrics, evaluation)
    print(f"Open {output_dir / 'report.html'} and {output_dir / 'contact_sheet.png'}.")

    if has_checkpoint(photo_checkpoint) and (photos := first_minutes.real_photographs()):
        captioner = Captioner.from_pretrained(photo_checkpoint)
        print(f"\nReal photos, with the bridge in {photo_checkpoint}:")
        captions = captioner.caption([photo for _, photo in photos])
        for (name, _), caption in zip(photos, captions, strict=True):
            print(f"  {name}: {caption.caption}")
    print(NEXT.format(folder=output_dir))


def _print_scores(metrics: dict[str, Any], evaluation: Evaluation) -> None:
    print()
    for prediction in evaluation.predictions[:8]:
        image = prediction.image
        print(f"  {image.path.name}: {prediction.caption}   (a reference: {image.captions[0]})")
    print(
        "\nOn {num_images} scenes made of colour-shape pairs that training never showed:\n"
        "  colour and shape right   {colour_shape_accuracy:.1%}\n"
        "  relation right           {relation_accuracy:.1%}\n"
        "  visual gain              {visual_gain:.2f} nats per token\n"
        "  CIDEr {CIDEr:.2f}, BLEU-4 {BLEU-4:.2f}, perplexity {perplexity:.2f}\n"
        "  {total_seconds:.0f} s in all, {train_seconds:.0f} s of it training, "
        "peak memory {peak_rss_gib:.1f} GiB".format(**metrics)
    )
