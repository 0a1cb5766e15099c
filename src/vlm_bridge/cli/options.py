"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="A checkpoint, or the folder of a training run. (default: the bundled captioner)"
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Recipe of a checkpoint that names none (the original project's)."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images captioned together.")]
NumBeams = Annotated[
    int | None, typer.Option(min=1, help="Beams; 1 is greedy. (default: the recipe's)")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest caption, in tokens. (default: the recipe's)")
]
MinNewTokens = Annotated[
    int | None, typer.Option(min=0, help="Shortest caption, in tokens. (default: the recipe's)")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1 discourages repeated tokens. (default: the recipe's)"),
]
NoRepeatNgramSize = Annotated[
    int | None,
    typer.Option(
        min=0, help="Never repeat n-grams of this size; 0 is off. (default: the recipe's)"
    ),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(help="Above 0 favors long captions among beams. (default: the recipe's)"),
]
ObjectBonus = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Nats for naming what the encoder's classifier recognizes; 0 is off. "
        "(default: the recipe's)",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
