"""`vlm-bridge new-decoder`."""

from __future__ import annotations

from pathlib import Path

import typer


def new_decoder(
    data_dir: Path = typer.Option(..., help="Caption folder; its words become word pieces."),
    output_dir: Path = typer.Option(..., help="Where to write it, for `language_model.name`."),
    layers: int = typer.Option(6, min=1, help="Layers."),
    width: int = typer.Option(256, min=1, help="Width; feed-forward layers are 4x as wide."),
    heads: int = typer.Option(4, min=1, help="Attention heads; they must divide the width."),
    vocabulary: int = typer.Option(6000, min=100, help="Word pieces at most."),
    dropout: float = typer.Option(0.1, min=0.0, max=0.9, help="Dropout in training."),
    seed: int = typer.Option(0, min=0, help="Seed of the random weights."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier one."),
) -> None:
    """Make a small decoder with cross-attention, to be trained from nothing on your captions."""
    from vlm_bridge.data_pipeline.caption_folder import open_data_folder, readable_split
    from vlm_bridge.errors import UsageError

    if (output_dir / "config.json").exists() and not overwrite:
        raise UsageError(
            f"{output_dir} holds a model; choose another --output-dir, or replace it with "
            "--overwrite"
        )
    images, _ = readable_split(open_data_folder(data_dir), "train")

    from vlm_bridge.cli.quiet import quiet_transformers
    from vlm_bridge.model_architecture.new_decoder import DecoderSize, write_new_decoder

    quiet_transformers()
    size = DecoderSize(layers, width, heads, vocabulary, dropout)
    captions = (caption for image in images for caption in image.captions)
    pieces, parameters = write_new_decoder(captions, output_dir, size, seed=seed)
    print(
        f"{output_dir}: {layers} layers of width {width}, {pieces:,} word pieces, "
        f"{parameters:,} parameters"
    )
    print(
        f"next: train it whole: vlm-training --config RECIPE language_model.name={output_dir} "
        "'trainable.bridge.*=null' 'trainable.language_model.*=null'"
    )
