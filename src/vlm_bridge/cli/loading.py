"""Loading libraries and models without needless work."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For the imports of torch and transformers and for loading models.

    They make a million objects and drop few: looking for garbage among them again and again is a fifth of the time, and
    once more when the program ends, a second. What was loaded stays until then, so later collections leave it alone.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
