"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines: logs stay short, and nobody thinks the command hangs."""


def note(line: str) -> None:
    """Print a line on stderr, beside the results on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield ``report(done, total)``; ``what`` says what is counted, as in "pictures"."""
    with _bar(what) if sys.stderr.isatty() else _lines(what) as report:
        yield report


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _lines(what: str) -> Iterator[Callable[[int, int], None]]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PLAIN_INTERVAL_S:
            last = now
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield report
