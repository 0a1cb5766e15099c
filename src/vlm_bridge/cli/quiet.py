"""Load libraries and models quickly and without their own output."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Pause garbage collection while torch, transformers and models load.

    They make a million objects and drop few. Collection takes a fifth of that time, and a second
    more at exit: frozen objects are never looked at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
