"""Processes with limits on time and memory, for files from outside: a hostile one costs itself alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image

from vlm_bridge.data_pipeline import images
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ImageError

SECONDS_AN_IMAGE = 10.0
"""The largest that is let in takes two or three to decode."""
MEMORY_ABOVE_START = 2_147_483_648
"""Bytes of address space that a process may take beside what it begins with: twice what the largest image takes."""
Task = TypeVar("Task")
Result = TypeVar("Result")


class IsolatedPool(Generic[Task, Result]):
    """Processes that apply one function to tasks; one that takes too long or too much is killed and replaced.

    A script that makes one needs the usual ``if __name__ == "__main__":`` guard.

    Args:
        function: of a module, for the processes to import.
        workers: how many processes; they start with the first tasks.
    """

    def __init__(self, function: Callable[[Task], Result], workers: int = 1):
        self.function = function
        self._pool = ProcessPool(
            workers,
            context=get_context("spawn"),
            initializer=_begin,
            initargs=[images.LIMITS.max_pixels, MEMORY_ABOVE_START],
        )

    def submit(self, tasks: Sequence[Task]) -> ProcessFuture:
        """Begin some tasks in one process; `result` waits for them."""
        return self._pool.schedule(
            _each, args=[self.function, list(tasks)], timeout=SECONDS_AN_IMAGE * len(tasks)
        )

    def result(
        self, future: ProcessFuture, tasks: Sequence[Task], failed: Callable[[Task, str], Result]
    ) -> list[Result]:
        """Return the results of tasks that were submitted together; after a kill, each is done again alone.

        Args:
            failed: makes a result of a task and of the reason that it has none.
        """
        try:
            return future.result()
        except TimeoutError:
            reason = f"it takes more than {SECONDS_AN_IMAGE:.0f} s to read"
        except ProcessExpired:
            reason = "reading it ended its process: it takes too much memory, or a decoder crashed"
        except MemoryError:
            reason = f"it takes more than {MEMORY_ABOVE_START / 2**30:.0f} GiB of memory to read"
        if len(tasks) == 1:
            return [failed(tasks[0], reason)]
        return [self.result(self.submit([task]), [task], failed)[0] for task in tasks]

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()


class ImageReader:
    """`open_image` in processes of its own, from any number of threads."""

    def __init__(self, workers: int = 1):
        self._pool: IsolatedPool[str | ImageFile | bytes, Any] = IsolatedPool(_read, workers)

    def open_image(self, picture: str | ImageFile | bytes) -> Image.Image:
        """As `images.open_image`, also of a file's bytes. Raises ImageError."""
        (read,) = self._pool.result(
            self._pool.submit([picture]), [picture], lambda _, reason: reason
        )
        if isinstance(read, str):
            raise ImageError(images.name_of(picture), read)
        size, pixels = read
        return Image.frombytes("RGB", size, pixels)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(picture: str | ImageFile | bytes) -> tuple[tuple[int, int], bytes] | str:
    """Size and pixels of an image, upright and RGB; or why there are none."""
    try:
        image = images.decode_image(picture).image
    except ImageError as error:
        return error.reason
    return image.size, image.tobytes()


def _each(function: Callable[[Any], Any], tasks: list[Any]) -> list[Any]:
    return [function(task) for task in tasks]


def _begin(max_pixels: int, memory: int) -> None:
    """Set up a process: its limits, and Ctrl-C left to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    images.LIMITS.max_pixels = max_pixels
    with contextlib.suppress(
        ImportError, OSError, ValueError, IndexError
    ):  # Windows; macOS counts otherwise
        import resource

        if max_pixels:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
