"""Load a combined file (PVT, projection and BLIP's text decoder).

from scripts.load_combined_checkpoint import load_combined_model
pvt, blip, proj = load_combined_model("checkpoints/blip_pvt_combined.pth")

python scripts/load_combined_checkpoint.py --checkpoint checkpoints/blip_pvt_combined.pth
"""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_bridge.cli.main import run_program
from vlm_bridge.formats.pvt_blip import BLIP, DEFAULT_FILE, load_combined_model

__all__ = ["load_combined_model"]


def main(
    checkpoint: Path = typer.Option(DEFAULT_FILE, help="A combined file in any layout."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps."),
    pvt: str = typer.Option(
        None, help="Name or folder of the encoder's configuration. (default: from the tensors)"
    ),
    blip_model: str = typer.Option(
        BLIP, "--blip-model", "--blip", help="Name or folder of the BLIP whose decoder it holds."
    ),
) -> None:
    """Load a combined file and print what is in it."""
    from vlm_bridge.cli.options import quiet_transformers

    quiet_transformers()
    model = load_combined_model(checkpoint, device, blip_model, pvt)
    print("Successfully loaded:")
    for name, part in zip(("PVT", "BLIP", "Projection"), model, strict=True):
        print(f"  - {name}: {type(part).__name__ if part is not None else None}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run_program(app, logs_to_stdout=True)
