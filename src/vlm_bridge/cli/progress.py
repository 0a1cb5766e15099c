"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 5.0


def note(line: str) -> None:
    """Print a line on stderr, beside the results on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield ``report(done, total)``; ``what`` names the things counted ("images")."""
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
