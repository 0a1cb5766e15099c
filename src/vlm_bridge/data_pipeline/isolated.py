"""Read images from outside in processes with limits on time and memory."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image

from vlm_bridge.data_pipeline import images
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ImageError

# The largest image that is let in takes two or three to decode.
SECONDS_AN_IMAGE = 10.0
# Bytes of address space beside those at the start: twice what the largest image takes.
MEMORY_ABOVE_START = 2 << 30


class ImageReader:
    """Processes that read an image at a time, from any number of threads.

    One that takes too long or too much memory is ended and replaced, so that a hostile file costs
    itself alone. A script that makes a reader needs the usual ``if __name__ == "__main__":`` guard.
    """

    def __init__(self, workers: int = 1):
        self._pool = ProcessPool(
            workers,
            context=get_context("spawn"),
            initializer=_limit_process,
            initargs=[images.LIMITS.max_pixels, MEMORY_ABOVE_START],
        )

    def submit(self, function: Callable[..., object], *arguments: object) -> ProcessFuture:
        """Call a function of a module in one of the processes; `result_of` waits for it."""
        return self._pool.schedule(function, arguments, timeout=SECONDS_AN_IMAGE)

    def open_image(self, image: str | ImageFile | bytes) -> Image.Image:
        """As `images.open_image`, also of a file's bytes. Raises ImageError."""
        return result_of(self.submit(images.decode_image, image), images.name_of(image)).image

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def result_of(future: ProcessFuture, name: str) -> Any:
    """Return the result of a call that was submitted. Raises its ImageError, or one of a limit."""
    try:
        return future.result()
    except TimeoutError:
        reason = f"it takes more than {SECONDS_AN_IMAGE:.0f} s to read"
    except ProcessExpired:
        reason = "reading it ended its process: it takes too much memory, or a decoder crashed"
    except MemoryError:
        reason = f"it takes more than {MEMORY_ABOVE_START / 2**30:.0f} GiB of memory to read"
    raise ImageError(name, reason)


def _limit_process(max_pixels: int, memory: int) -> None:
    """Set the limits of a process, and leave Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    images.LIMITS.max_pixels = max_pixels
    # Windows has no limits, and macOS counts otherwise.
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        if max_pixels:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
