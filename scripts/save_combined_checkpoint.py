"""Write a combined file of pretrained models and a fresh projection, or of a trained run.

python scripts/save_combined_checkpoint.py --pvt OpenGVLab/pvt_v2_b0 \
    --blip Salesforce/blip-image-captioning-base --projection linear --output checkpoints/blip_pvt_combined.pth
python scripts/save_combined_checkpoint.py --pvt-checkpoint final_model.pth
python scripts/save_combined_checkpoint.py --checkpoint runs/blip-pvt-flickr30k --output checkpoints/flickr30k.pth
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from vlm_bridge.cli.main import run_program


class Projection(StrEnum):
    linear = "linear"
    mlp = "mlp"
    conv3x3 = "conv3x3"


class LayoutName(StrEnum):
    auto = "auto"
    original = "original"
    own = "own"


def save_combined_checkpoint(
    output: Path = typer.Option(
        "checkpoints/blip_pvt_combined.pth", "--output", "--out", help="The combined file to write."
    ),
    pvt: str = typer.Option(
        "OpenGVLab/pvt_v2_b1",
        "--pvt",
        "--pvt-checkpoint",
        help="The encoder: a hub name, a folder, or a .pth file with the original's PVT.",
    ),
    blip: str = typer.Option(
        "Salesforce/blip-image-captioning-base",
        "--blip",
        "--blip-model",
        help="Whose text decoder: a hub name or a folder.",
    ),
    projection: Projection = typer.Option(
        None,
        help="Between them; its weights are random and must be trained. (default: conv3x3; linear for a .pth file)",
    ),
    seed: int = typer.Option(0, min=0, help="Of the projection's random weights."),
    checkpoint: Path = typer.Option(
        None, help="A checkpoint or the folder of a run instead: its trained weights."
    ),
    layout: LayoutName = typer.Option(
        LayoutName.auto,
        help="original is what the original's loader reads. (default: that where possible)",
    ),
) -> None:
    """Write a combined file: the weights of PVT, BLIP's text decoder and the projection in one."""
    from vlm_bridge.cli.options import quiet_transformers
    from vlm_bridge.finetuning.combined import combine_checkpoint
    from vlm_bridge.formats.pvt_blip import combine_models, write_combined

    quiet_transformers()
    if checkpoint is not None:
        state = combine_checkpoint(checkpoint)
    else:
        state = combine_models(pvt, blip, projection and projection.value, seed=seed)
    write_combined(output, state, layout.value)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, {len(state)} tensors)")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(save_combined_checkpoint)
    run_program(app)
