"""Refuse a training that would stop later, before models are loaded or an image is encoded."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.device import cpu_emulates_bfloat16, set_threads
from vlm_bridge.errors import ConfigurationError, TrainingError
from vlm_bridge.training_strategy.distributed import World

logger = logging.getLogger(__name__)

PROBE_BYTES = 1 << 20  # on a full disk, making an empty file succeeds


def check_machine(recipe: Recipe, world: World) -> None:
    """Refuse settings that this machine cannot run, and recipes that differ between processes."""
    if recipe.autocast_dtype == "float16" and world.device.type != "cuda":
        raise ConfigurationError(
            "amp_dtype=float16 needs a CUDA GPU; use amp_dtype=bfloat16 or float32"
        )
    if world.device.type == "cpu":
        set_threads()
        if recipe.autocast_dtype and cpu_emulates_bfloat16():
            logger.info("this processor emulates bfloat16: amp_dtype=float32 is quicker here")
    places = recipe.keys_marked("place")
    world.check_same({key: value for key, value in recipe.to_dict().items() if key not in places})


def check_folders(checkpoint_dir: str, log_dir: str) -> None:
    """Raise ConfigurationError if checkpoints or logs cannot be written; leave nothing behind."""
    for key, folder in (("checkpoint_dir", checkpoint_dir), ("log_dir", log_dir)):
        try:
            places = (Path(folder), *Path(folder).parents)
            with tempfile.TemporaryFile(dir=next(p for p in places if p.exists())) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {key}={folder}: {error.strerror or error} (free some space, "
                f"or choose another folder with {key}=...)"
            ) from error


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Raise TrainingError where memory runs out, with settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # The CPU and Apple's GPUs raise a plain RuntimeError.
        if not ran_out and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        raise TrainingError(
            f"out of memory on {device}: try a smaller batch_size with more "
            "gradient_accumulation_steps, gradient_checkpointing=true, amp_dtype=bfloat16 or "
            "language_model.dtype=bfloat16"
        ) from error
