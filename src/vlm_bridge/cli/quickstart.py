"""`vlm-bridge quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vlm_bridge.quickstart import QuickstartResult


def quickstart(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Overrides of config/quickstart.yaml."
    ),
    output_dir: Path = typer.Option(Path("runs/quickstart"), help="Where everything is written."),
    photo_checkpoint: Path = typer.Option(
        Path("runs/lite-flickr8k"), help="A bridge trained on photographs; used where it exists."
    ),
) -> None:
    """Draw scenes, train a bridge on this machine's CPU, and caption pictures it never saw."""
    import os

    from vlm_bridge import quickstart as first_minutes
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.cli.train import exit_when_interrupted
    from vlm_bridge.configuration import load_recipe, shipped_recipe
    from vlm_bridge.training_strategy.checkpoint import has_checkpoint

    quiet_transformers()
    places = {"data_dir": "data", "checkpoint_dir": "checkpoints", "log_dir": "logs"}
    located = [f"{key}={output_dir / folder}" for key, folder in places.items()]
    recipe = load_recipe(shipped_recipe("quickstart"), [*located, *(overrides or ())])
    with exit_when_interrupted():
        result = first_minutes.run(recipe, output_dir, workers=os.cpu_count() or 1)
    _print_scores(result)
    print(f"Open {output_dir / 'report.html'} and {output_dir / 'contact_sheet.png'}.")

    if has_checkpoint(photo_checkpoint) and (photographs := first_minutes.real_photographs()):
        captioner = Captioner.from_pretrained(photo_checkpoint)
        print(f"\nReal photographs, with the bridge in {photo_checkpoint}:")
        captions = captioner.caption([picture for _, picture in photographs])
        for (name, _), caption in zip(photographs, captions, strict=True):
            print(f"  {name}: {caption.caption}")
    print("\nWhat to type next:")
    print(f"  vlm-bridge caption {output_dir / 'data/test/images'} --checkpoint {output_dir}")
    print("  vlm-data transform --source flickr8k --input-dir DIR --output-dir data/flickr8k")
    print("  vlm-training --config config/lite-flickr8k.yaml")
    print("  vlm-bridge caption PHOTO.jpg --checkpoint runs/lite-flickr8k")


def _print_scores(result: QuickstartResult) -> None:
    metrics = result.metrics
    print()
    for prediction in result.evaluation.predictions[:8]:
        image = prediction.image
        print(f"  {image.path.name}: {prediction.caption}   (a reference: {image.captions[0]})")
    scenes = f"{metrics['num_images']} scenes made of colour-shape pairs"
    print(f"\nOn {scenes} that training never showed:")
    print(f"  colour and shape right   {metrics['colour_shape_accuracy']:.1%}")
    print(f"  relation right           {metrics['relation_accuracy']:.1%}")
    print(f"  visual gain              {metrics['visual_gain']:.2f} nats per token")
    cider, bleu, perplexity = (metrics[name] for name in ("CIDEr", "BLEU-4", "perplexity"))
    print(f"  CIDEr {cider:.2f}, BLEU-4 {bleu:.2f}, perplexity {perplexity:.2f}")
    total, training = metrics["total_seconds"], metrics["train_seconds"]
    print(
        f"  {total:.0f} s in all, {training:.0f} s of it training, "
        f"peak memory {metrics['peak_rss_gib']:.1f} GiB"
    )
