"""Fine-tune a combined file on a dataset and write a combined file. The same command continues an interrupted run.

python scripts/finetune_combined.py --checkpoint checkpoints/blip_pvt_combined.pth --dataset flickr30k \
    --dataset_path DIR --epochs 5 --batch_size 32 --lr 1e-4 --output OUT.pth
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path

import typer

from vlm_bridge.cli.main import run_program


class DatasetName(StrEnum):
    flickr30k = "flickr30k"
    coco = "coco"
    coco_sample = "coco_sample"
    coco_small = "coco_small"
    conceptual = "conceptual"
    local = "local"


RECIPE_KEYS = {
    "epochs": "num_epochs",
    "batch_size": "batch_size",
    "lr": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_length": "max_caption_tokens",
    "image_size": "vision_encoder.image_size",
    "num_workers": "num_workers",
    "seed": "seed",
    "device": "device",
}
"""Our arguments that are keys of a recipe."""


def finetune_combined(
    context: typer.Context,
    checkpoint: Path = typer.Option(
        "checkpoints/blip_pvt_combined.pth", help="The combined file to start from, in any layout."
    ),
    dataset: DatasetName = typer.Option(
        ..., help="Its layout, and the recipe of config/ that is taken."
    ),
    dataset_path: Path = typer.Option(
        None,
        "--dataset_path",
        "--dataset-path",
        help="Its folder; or a caption folder, used as it is. (default: where vlm-data download leaves it)",
    ),
    output: Path = typer.Option(
        "checkpoints/blip_pvt_combined_finetuned.pth",
        "--output",
        "--out",
        help="The combined file to write; the run goes into a folder of its name.",
    ),
    epochs: int = typer.Option(None, help="(default of this and those below: the recipe's)"),
    batch_size: int = typer.Option(None, "--batch_size", "--batch-size"),
    lr: float = typer.Option(None, help="Learning rate."),
    dataset_size: int = typer.Option(
        None,
        "--dataset_size",
        "--dataset-size",
        "--num-samples",
        "--num_samples",
        min=1,
        help="At most N images a split. (default: 1000 for coco_sample)",
    ),
    warmup_steps: int = typer.Option(None, "--warmup_steps", "--warmup-steps"),
    weight_decay: float = typer.Option(None, "--weight_decay", "--weight-decay"),
    max_length: int = typer.Option(
        None, "--max_length", "--max-length", help="Tokens of a caption."
    ),
    image_size: int = typer.Option(None, "--image_size", "--image-size", help="Side in pixels."),
    num_workers: int = typer.Option(None, "--num_workers", "--num-workers"),
    seed: int = typer.Option(None),
    device: str = typer.Option(None, help="auto, cpu, cuda, mps."),
    config: Path = typer.Option(None, help="A recipe in the place of the dataset's."),
    pvt: str = typer.Option(
        None, help="Name or folder of the encoder's configuration. (default: from the tensors)"
    ),
    blip: str = typer.Option(
        None,
        "--blip",
        "--blip-model",
        help="Name or folder of the decoder's configuration and tokenizer. (default: the recipe's)",
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Any other key of the recipe; again and again."
    ),
    force: bool = typer.Option(
        False, "--force", help="Continue although the recipe or the data have changed."
    ),
    follow_links: bool = typer.Option(
        False,
        "--follow_links",
        "--follow-links",
        help="Read images that links outside the dataset's folder lead to.",
    ),
) -> None:
    """Fine-tune a combined file on a dataset; the best weights become another combined file."""
    given = {key: context.params[name] for name, key in RECIPE_KEYS.items()}
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]

    from vlm_bridge.cli.options import quiet_transformers, show_progress
    from vlm_bridge.configuration import load_recipe, shipped_recipe
    from vlm_bridge.finetuning import combined as finetuning
    from vlm_bridge.training_strategy.resume import Interrupted

    quiet_transformers()
    shipped = shipped_recipe(finetuning.DATASETS[dataset.value].recipe)
    recipe = load_recipe(config or shipped, [*changes, *overrides])
    settings = finetuning.FineTuning(
        checkpoint, dataset.value, dataset_path, output, dataset_size, pvt, blip, force,
        follow_links,
    )  # fmt: skip
    try:
        result = finetuning.finetune_combined(settings, recipe, show_progress)
    except Interrupted as interruption:
        print(f"{interruption}; the same command continues", file=sys.stderr)
        raise typer.Exit(interruption.exit_code) from None
    print(f"done: {result.steps} steps in {result.seconds / 60:.1f} min; wrote {output}")
    print(f"next: vlm-bridge caption IMAGE --checkpoint {settings.run_dir}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(finetune_combined)
    run_program(app, logs_to_stdout=True)
