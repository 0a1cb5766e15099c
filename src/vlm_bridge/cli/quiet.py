"""Keep libraries' chatter (loading bars, advice) out of our commands' output."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Errors of transformers and the hub still show; progress bars and warnings do not."""
    import os
    import warnings

    # transformers shows a bar of its own while it reads GGUF; tqdm looks at this once, when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
