"""Options that several commands share, progress on stderr, and quiet libraries."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge import configuration

Option = typer.Option
Checkpoint = Annotated[Path | None, Option(help="Checkpoint or run folder. (default: bundled)")]
Config = Annotated[Path | None, Option("--config", "-c", help="For checkpoints without recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
RecipeFile = Annotated[Path | None, Option("--config", "-c", help="(default: training-default)")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, Option(min=1, help="Images captioned together.")]
# Settings of generation; the recipe's own without them.
NumBeams = Annotated[int | None, Option(min=1, help="Beams; 1 is greedy.")]
MaxNewTokens = Annotated[int | None, Option(min=1, help="Longest caption, in tokens.")]
LengthPenalty = Annotated[float | None, Option(help="Above 0 favors long captions among beams.")]
ObjectBonus = Annotated[float | None, Option(min=0, help="Nats for naming recognized objects.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier one.")]

PLAIN_INTERVAL_S = 5.0


def load_recipe(config: Path | None, overrides: list[str] | None) -> configuration.Recipe:
    """Return a recipe file's recipe, or training-default, with overrides."""
    from vlm_bridge import configuration

    file = config or configuration.shipped_recipe(configuration.DEFAULT_RECIPE)
    return configuration.load_recipe(file, overrides or ())


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise UsageError for a file that would be replaced without --overwrite."""
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists: choose another --output-dir, or give --overwrite")


def note(line: str) -> None:
    """Print a line on stderr, beside the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print columns of equal width on a terminal, tab-separated lines on a pipe."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("".join(padded) if sys.stdout.isatty() else "\t".join(row))


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `report(done, total)`: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        what: names the things counted ("images").
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PLAIN_INTERVAL_S:
            last = time.monotonic()
            note(f"{what}: {done} of {total}")

    yield report


def quiet_transformers() -> None:
    """Turn off progress bars and warnings of transformers and the hub; errors still show."""
    # tqdm reads this once, when it is imported; transformers shows a bar while it reads GGUF.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection while models load: it takes a fifth of that time.

    Frozen objects are never looked at again, which saves a second at exit.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
