"""Options that several commands share, progress on stderr, and quiet libraries."""

from __future__ import annotations

import difflib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_bridge.errors import UsageError

if TYPE_CHECKING:
    from vlm_bridge import configuration

Option = typer.Option
Checkpoint = Annotated[Path | None, Option(help="Checkpoint or run folder. (default: bundled)")]
Config = Annotated[
    Path | None, Option("--config", "-c", help="For checkpoints without one, or with your code.")
]
RecipeFile = Annotated[Path | None, Option("--config", "-c", help="(default: training-default)")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, Option(min=1, help="Images captioned together.")]
# Settings of generation; the recipe's own without them.
NumBeams = Annotated[int | None, Option(min=1, help="Beams; 1 is greedy.")]
MaxNewTokens = Annotated[int | None, Option(min=1, help="Longest caption, in tokens.")]
MinNewTokens = Annotated[int | None, Option(min=0, help="Shortest caption, in tokens.")]
LengthPenalty = Annotated[float | None, Option(help="Above 0 favors long captions among beams.")]
RepetitionPenalty = Annotated[float | None, Option(help="Above 1: fewer repeats.")]
NoRepeatNgramSize = Annotated[int | None, Option(min=0, help="No n-gram twice.")]
ObjectThreshold = Annotated[
    float | None, Option(min=0, max=1, help="Name objects so sure in the prompt; 0: none.")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier one.")]

PLAIN_INTERVAL_S = 5.0


def _check_overrides(context: typer.Context, overrides: list[str] | None) -> list[str] | None:
    """Raise UsageError for an unknown option, with the key or option that it resembles."""
    words = overrides or []
    for position, word in enumerate(words):
        if word.startswith("-"):
            from vlm_bridge.configuration import nearest_key

            option, _, value = word.partition("=")
            known = [name for parameter in context.command.params for name in parameter.opts]
            hint = next(iter(difflib.get_close_matches(option, known, n=1, cutoff=0.8)), None)
            if hint is None and (key := nearest_key(option)):
                following = (each for each in words[position + 1 :][:1] if each[:1] != "-")
                hint = f"{key}={value or next(following, 'VALUE')}"
            meant = f"; did you mean {hint}?" if hint else " (see --help)"
            raise UsageError(f"no such option: {option}{meant}")
    return overrides


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", callback=_check_overrides)
]


def given_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of generation among a command's options that were given."""
    from vlm_bridge.configuration import DecodeSettings

    return {n: v for n in DecodeSettings.model_fields if (v := given.get(n)) is not None}


def load_recipe(config: Path | None, overrides: list[str] | None) -> configuration.Recipe:
    """Return a recipe file's recipe, or training-default, with overrides."""
    from vlm_bridge import configuration

    file = config or configuration.shipped_recipe(configuration.DEFAULT_RECIPE)
    return configuration.load_recipe(file, overrides or ())


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise UsageError for a file that would be replaced without --overwrite."""
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists: choose another --output-dir, or give --overwrite")


def refuse_file(parameter: typer.CallbackParam, value: Path | None) -> None:
    """Raise UsageError for an option that named a file in earlier versions."""
    if value is not None:
        raise UsageError(f"{parameter.opts[-1]} is now --output-dir FOLDER (for report.html)")


def is_quiet() -> bool:
    """Return whether --quiet was given (or this is not the first of several processes)."""
    return logging.getLogger("vlm_bridge").level == logging.WARNING


def note(line: str, *, always: bool = False) -> None:
    """Print a line on stderr, beside the results on stdout; with --quiet only if ``always``."""
    if always or not is_quiet():
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
def show_progress(what: str, *, plain_lines: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield `report(done, total)`: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        what: names the things counted ("images").
        plain_lines: False for work that logs its progress itself.
    """
    if sys.stderr.isatty() and not is_quiet():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        # Lines printed meanwhile appear above the bar, except those that go to a file.
        console, redirect = Console(stderr=True), sys.stdout.isatty()
        with Progress(*columns, console=console, redirect_stdout=redirect) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if plain_lines and (done == total or time.monotonic() - last >= PLAIN_INTERVAL_S):
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
