"""Text states cached on disk: what enters the bridge's first layer does not depend on any image.

Below that layer nothing is trained and captions are the same in every epoch. Their states there [positions, H] are
computed once, memory-mapped, and a training step runs the upper layers alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.feature_cache import cache_key
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches, whole_rows
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionerModel
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.features import cache_root

LAYOUT = "1"
STATES_NAME, INDEX_NAME = "states.npy", "index.json"
IMAGES_AT_ONCE = 16
SAY_EVERY_SECONDS = 10.0
FREE_SPACE_TO_LEAVE = 512 * 2**20

Say = Callable[[str], None]


class TextStates:
    """States of all caption positions of a split, by place: ``states[places]`` is [*shape of places, H]."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.array = np.load(path, mmap_mode="r")
        self.dtype = dtype

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.array[indices]).view(self.dtype)


def split_text_states(
    model: CaptionerModel,
    recipe: Recipe,
    split: str,
    data: TokenizedImages,
    autocast: Callable[[], Any],
    say: Say,
    world: World | None = None,
) -> TextStates:
    """The cached text states of a split's captions, computed if they are not there.

    They are stored in the type that training computes in: 16 bits with ``use_amp`` or 16-bit weights, else 32. The
    processes of a machine share the work.

    Raises:
        ConfigurationError: the bridge enters at layer 0, or the language model is trained: states would change.
        ModelError: the language model gives other results when it starts from cached states.
    """
    world = world or World(model.device)
    layer: int = model.bridge.first_layer  # type: ignore[assignment]
    language_model: LanguageModel = model.language_model
    if not layer:
        raise ConfigurationError(
            "text_state_cache=true needs a bridge that enters above layer 0: set bridge.enter_at_layer (deep_prefix or "
            "cross_attention)"
        )
    if language_model.is_trained:
        raise ConfigurationError(
            "text_state_cache=true needs a frozen language model: its states change while it is trained"
        )
    _check_starting_from_states(model, data, autocast)
    dtype = getattr(torch, recipe.amp_dtype) if recipe.use_amp else _weight_dtype(language_model)
    shape = int(data.caption_lengths.sum()), language_model.embed_dim
    key = cache_key(
        LAYOUT,
        language_model_fingerprint(language_model),
        str(layer),
        f"{dtype} {recipe.use_amp}",
        data.digest(),
    )
    root = Path(recipe.data_dir) / ".features" if recipe.feature_cache == "off" else cache_root(recipe)
    folder = root / "text" / key
    wanted = {"key": key, "shape": list(shape), "dtype": str(dtype)}
    if world.largest(not _is_whole(folder, wanted)):
        _build(folder, wanted, model, data, dtype, autocast, lambda line: say(f"{split} {line}"), world)
    return TextStates(folder / STATES_NAME, dtype)


def language_model_fingerprint(language_model: LanguageModel) -> str:
    """Hash over a language model's weights and what else its states depend on."""
    digest = hashlib.blake2b(digest_size=12)
    config = language_model.text_config.to_dict()
    # Where and how it was loaded changes nothing; its attention implementation rounds alike within 16 bits.
    digest.update(json.dumps({k: config[k] for k in sorted(config) if k[:1] != "_"}, default=str).encode())
    for name, tensor in sorted(language_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _build(
    folder: Path,
    wanted: dict[str, Any],
    model: CaptionerModel,
    data: TokenizedImages,
    dtype: torch.dtype,
    autocast: Callable[[], Any],
    say: Say,
    world: World,
) -> None:
    """Compute the states of all captions into a folder that appears when it is whole.

    The first process of a machine makes the files, and each of them fills in its share.
    """
    positions, width = wanted["shape"]
    size = positions * width * dtype.itemsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < size + FREE_SPACE_TO_LEAVE:
        raise ConfigurationError(
            f"no room for {size / 2**30:.1f} GiB of text states below {folder.parent}: use text_state_cache=false"
        )
    say(f"text states: {size / 2**20:,.0f} MiB below {folder.parent}")
    name = f".building-{folder.name}-{platform.node()}-{os.getpid()}"
    building = folder.parent / world.gather(name)[world.rank - world.local_rank]
    is_maker = world.local_rank == 0
    try:
        if is_maker:
            building.mkdir(exist_ok=True)
            np.lib.format.open_memmap(
                building / STATES_NAME, mode="w+", dtype=_numpy_type(dtype), shape=(positions, width)
            )
        world.wait()
        array = np.lib.format.open_memmap(building / STATES_NAME, mode="r+")
        started = said = time.perf_counter()
        rows, by_length = whole_rows(data.captions_per_image), np.argsort(-data.image_lengths, kind="stable")
        done = 0
        batches = in_batches([rows[image] for image in by_length], IMAGES_AT_ONCE)
        for some in batches[world.local_rank :: world.local_size]:
            batch = data.pack(some)
            ids, segments = (torch.from_numpy(a).to(model.device) for a in (batch.input_ids, batch.segments))
            with autocast():
                states = model.text_at_bridge(ids, segments).to(dtype).cpu()
            if not states.isfinite().all():
                raise ModelError(
                    f"text states do not fit into {dtype}: use text_state_cache=false or amp_dtype=bfloat16"
                )
            is_text = batch.segments != 0
            array[batch.places[is_text]] = states.view(_bits(dtype)).numpy()[is_text]
            done += len(some) * world.local_size
            if time.perf_counter() - said > SAY_EVERY_SECONDS:
                said = time.perf_counter()
                say(
                    f"text states: {min(done, len(rows))}/{len(rows)} images ({done / (said - started):.0f}/s)"
                )
        array.flush()
        world.wait()
        if is_maker:
            (building / INDEX_NAME).write_text(json.dumps(wanted), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            try:
                building.rename(folder)
            except OSError:
                if not _is_whole(
                    folder, wanted
                ):  # another machine may have the same disk, and have been quicker
                    raise
        world.wait()
    finally:
        if is_maker:
            shutil.rmtree(building, ignore_errors=True)


def _is_whole(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        array = np.load(folder / STATES_NAME, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # what numpy and json make of missing and truncated files
        return False
    return index == wanted and list(array.shape) == wanted["shape"]


@torch.no_grad()
def _check_starting_from_states(
    model: CaptionerModel, data: TokenizedImages, autocast: Callable[[], Any]
) -> None:
    """Compare, on one image's captions, the last states with and without the layers below the bridge.

    Whether a transformers model can start from the states of a layer is not written anywhere.
    """
    batch = data.pack(whole_rows(data.captions_per_image)[:1])
    ids, segments = (torch.from_numpy(a).to(model.device) for a in (batch.input_ids, batch.segments))
    encoder: Any = model.vision_encoder
    features = torch.zeros(1, encoder.num_tokens, encoder.embed_dim, device=model.device)
    with autocast():
        state = model.image_state(features)
        whole = model.text_states(ids, state, segments)
        started = model.text_states(ids, state, segments, text_at_bridge=model.text_at_bridge(ids, segments))
    error = (whole.float() - started.float()).abs().max() / whole.float().abs().max()
    if not error < 1e-5:  # the same operations on the same numbers
        raise ModelError(
            f"{type(model.language_model.causal_lm).__name__} does not give the same states when it starts from those "
            f"of layer {model.bridge.first_layer}: use text_state_cache=false"
        )


def _weight_dtype(language_model: LanguageModel) -> torch.dtype:
    return next(language_model.parameters()).dtype


def _bits(dtype: torch.dtype) -> torch.dtype:
    """A type of the same size that numpy has."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _numpy_type(dtype: torch.dtype) -> type[np.generic]:
    return np.int16 if dtype.itemsize == 2 else np.int32
