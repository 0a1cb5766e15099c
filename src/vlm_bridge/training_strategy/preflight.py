"""Refuse a training that would stop later, before models are loaded or an image is encoded."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.device import cpu_has_bfloat16, set_threads
from vlm_bridge.errors import ConfigurationError, TrainingError
from vlm_bridge.model_architecture.weights import position_limit
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
        if recipe.autocast_dtype and cpu_has_bfloat16() is False:
            logger.info("this processor emulates bfloat16: amp_dtype=float32 is quicker here")
    places = recipe.keys_marked("place")
    world.check_same({key: value for key, value in recipe.to_dict().items() if key not in places})


def check_positions(recipe: Recipe) -> None:
    """Raise ConfigurationError if captions may exceed the positions of the language model."""
    limit = position_limit(recipe.language_model)
    if limit is not None and recipe.decode.max_new_tokens >= limit:
        raise ConfigurationError(
            f"decode.max_new_tokens={recipe.decode.max_new_tokens} and the start token are more "
            f"than the {limit} positions of {recipe.language_model.name}: ask for fewer"
        )


def check_folders(recipe: Recipe) -> None:
    """Raise ConfigurationError if checkpoints or logs cannot be written. Nothing is left behind."""
    for key in ("checkpoint_dir", "log_dir"):
        folder = Path(getattr(recipe, key))
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {key}={folder}: {error.strerror or error} (free some space, "
                f"or choose another folder with {key}=...)"
            ) from error
        finally:
            for place in missing:
                with suppress(OSError):
                    place.rmdir()


@contextmanager
def memory_explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Raise TrainingError where memory runs out, with settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # The CPU and Apple's GPUs raise a plain RuntimeError.
        if not ran_out and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        size = "batch_size" if recipe.tokens_per_batch is None else "tokens_per_batch"
        settings = [
            f"a {size} below {getattr(recipe, size)} with more than "
            f"gradient_accumulation_steps={recipe.gradient_accumulation_steps}"
        ]
        if not recipe.gradient_checkpointing:
            settings.append("gradient_checkpointing=true")
        if recipe.amp_dtype == "float32":
            settings.append("amp_dtype=bfloat16")
        if recipe.language_model.dtype == "float32":
            settings.append("language_model.dtype=bfloat16")
        raise TrainingError(
            f"out of memory on {device}{f', asking for {asked[1]}' if asked else ''}: try "
            f"{' or '.join(settings)}"
        ) from error
