"""What to say, and to do, when memory runs out: what used it, and which settings would need less.

A kernel that kills the process (the OOM killer) leaves nobody to speak.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.errors import TrainingError
from vlm_bridge.runtime import peak_rss_gib

GIB = 2**30
NUM_SUGGESTIONS = 3
_SAID_BY_TORCH = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
"""Of the devices for which torch raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of a GPU, of the CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID_BY_TORCH)
    )


@contextmanager
def memory_explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Raises TrainingError for memory that runs out inside: what used it, and what to try, in one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(explanation(error, recipe, device)) from error


def explanation(error: BaseException, recipe: Recipe, device: torch.device) -> str:
    """One line: how much was asked for, what is in use, what a training needs it for, and settings that need less."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    parts = [f"out of memory on {device}" + (f", asking for {asked[1]}" if asked else "")]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        in_use, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        parts.append(
            f"{in_use / GIB:.2f} GiB in use by tensors, {(kept - in_use) / GIB:.2f} GiB kept by torch's allocator, "
            f"{free / GIB:.2f} of {total / GIB:.2f} GiB free"
        )
    else:
        parts.append(f"{peak_rss_gib():.2f} GiB in use at most so far")
    parts.append(f"try {' or '.join(suggestions(recipe, device)[:NUM_SUGGESTIONS])}")
    return "; ".join(parts)


def suggestions(recipe: Recipe, device: torch.device) -> list[str]:
    """Settings that need less memory, with what they are now; those first that change the result least."""
    smaller = _smaller_batch(recipe)
    found = [smaller] if smaller is not None else []
    frozen = not any(pattern.startswith("language_model") for pattern in recipe.trainable)
    candidates: list[tuple[bool, str, object]] = [
        (not recipe.gradient_checkpointing, "gradient_checkpointing", True),
        (recipe.amp_dtype == "float32", "amp_dtype", "bfloat16"),
        (frozen and recipe.language_model.dtype == "float32", "language_model.dtype", "bfloat16"),
        (recipe.max_caption_tokens > 1, "max_caption_tokens", recipe.max_caption_tokens // 2),
        (
            frozen and not recipe.language_model.quantization and device.type == "cuda",
            "language_model.dtype",
            "nf4",
        ),
        (recipe.captions_per_image > 1, "captions_per_image", 1),
        (recipe.feature_cache == "off", "feature_cache", "auto"),
        (recipe.decode.num_beams > 1, "decode.num_beams", 1),
        (recipe.num_workers > 0, "num_workers", 0),
    ]
    for applies, key, value in candidates:
        if applies:
            section, _, name = key.rpartition(".")
            now = getattr(getattr(recipe, section) if section else recipe, name)
            found.append(f"{key}={_yaml(value)} (now {_yaml(now)})")
    return found


def _smaller_batch(recipe: Recipe) -> str | None:
    """Half the micro-batch and twice as many of them to a step: the step is the same."""
    steps = recipe.gradient_accumulation_steps
    together = f"gradient_accumulation_steps={2 * steps}"
    if recipe.tokens_per_batch is not None:
        return f"tokens_per_batch={recipe.tokens_per_batch // 2} {together} (now {recipe.tokens_per_batch} and {steps})"
    per_row = recipe.scst_samples if recipe.objective == "scst" else recipe.captions_per_image
    if (rows := recipe.batch_size // per_row) < 2:
        return None
    return f"batch_size={rows // 2 * per_row} {together} (now {recipe.batch_size} and {steps})"


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
