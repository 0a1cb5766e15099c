"""`vlm-bridge average`."""

from __future__ import annotations

from pathlib import Path

import typer


def average(
    checkpoint: list[str] = typer.Argument(
        ..., help="Two or more checkpoints, folders of runs, or models on the hub."
    ),
    output_dir: Path = typer.Option(..., help="Folder of the averaged run; made if need be."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier average."),
) -> None:
    """Average the trained weights of several runs, which often captions better than any of them.

    The runs start from the same weights and see other views, samples or orders of the data (model
    soups: Wortsman et al. 2022; of self-critical runs: Ramé et al. 2024, WARP).
    """
    from vlm_bridge.errors import UsageError
    from vlm_bridge.training_strategy import checkpoint as checkpoints

    if len(checkpoint) < 2:
        raise UsageError("an average needs two checkpoints or more")
    target = output_dir / "checkpoints" / checkpoints.BEST_WEIGHTS
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target} exists; choose another --output-dir, or replace it with --overwrite"
        )
    paths = [checkpoints.find_checkpoint(name) for name in checkpoint]
    checkpoints.save_average(target, paths)
    typer.echo(f"wrote {target}, the mean of {', '.join(map(str, paths))}")
    typer.echo(f"next: vlm-bridge caption IMAGE --checkpoint {output_dir}")
