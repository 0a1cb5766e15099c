"""Text states cached on disk: what enters the bridge's first layer does not depend on any image.

Below that layer nothing is trained and captions are the same in every epoch. Their states there [positions, H] are
computed once, memory-mapped, and a training step runs the upper layers alone.

::

    ROOT/text/KEY/states      of all caption positions, image after image
    ROOT/text/KEY/checksums   the CRC-32 of each image's states
    ROOT/text/KEY/index.json  what they are; the folder has its name when all three are on disk and were read back
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.feature_cache import (
    BUILDING,
    as_bytes,
    cache_key,
    lock_cache,
    remove_unfinished,
)
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches, whole_rows
from vlm_bridge.durable_files import bring_to_disk, not_as_written, sync_folder, write_bytes_durably
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.features import cache_root

LAYOUT = "2"
STATES_NAME, CHECKSUMS_NAME, INDEX_NAME = "states", "checksums", "index.json"
IMAGES_CHECKED = 64
"""Images, chosen at random, whose checksums are compared when a cache is opened."""
IMAGES_AT_ONCE = 16
SAY_EVERY_SECONDS = 10.0
FREE_SPACE_TO_LEAVE = 512 * 2**20

Say = Callable[[str], None]


class TextStates:
    """States of all caption positions of a split, by place: ``states[places]`` is [*shape of places, H]."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: torch.dtype):
        self.array = np.memmap(path, _numpy_type(dtype), "r", shape=shape)
        self.dtype = dtype

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.array[indices]).view(self.dtype)


@dataclass(frozen=True)
class StateFiles:
    """The files of a cache, of states [positions, width] in ``dtype``.

    Attributes:
        image_lengths: [images], positions of each.
    """

    folder: Path
    key: str
    image_lengths: np.ndarray
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.image_lengths.sum()), self.width

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @cached_property
    def starts(self) -> np.ndarray:
        """[images + 1], the first position of each image; and behind them all, their number."""
        return np.concatenate(([0], np.cumsum(self.image_lengths)))

    @property
    def index(self) -> bytes:
        facts = {"key": self.key, "shape": list(self.shape), "dtype": str(self.dtype)}
        return json.dumps(facts).encode()

    def create(self, folder: Path) -> None:
        """Make the files in a folder, empty but of their size."""
        folder.mkdir(exist_ok=True)
        for name, size in (
            (STATES_NAME, self.num_bytes),
            (CHECKSUMS_NAME, 4 * len(self.image_lengths)),
        ):
            with (folder / name).open("wb") as file:
                file.truncate(size)

    def fill(self, folder: Path, states: Iterable[tuple[int, np.ndarray]]) -> None:
        """Write the states [positions of the image, width] of some images, by index, and bring them to disk."""
        with (
            (folder / STATES_NAME).open("r+b") as file,
            (folder / CHECKSUMS_NAME).open("r+b") as checksums,
        ):
            for image, of_image in states:
                content = of_image.tobytes()
                file.seek(int(self.starts[image]) * self.row_bytes)
                file.write(content)
                checksums.seek(4 * image)
                checksums.write(zlib.crc32(content).to_bytes(4, "little"))
            bring_to_disk(file)
            bring_to_disk(checksums)

    def finish(self, building: Path) -> None:
        """Give a folder whose files are filled its name. Raises OSError where it is not what was written."""
        if not self._agrees(building, range(len(self.image_lengths))):
            raise not_as_written(self.folder)
        write_bytes_durably(building / INDEX_NAME, self.index)
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            building.rename(self.folder)
        except OSError:
            if not self.is_whole():  # another machine may have the same disk, and have been quicker
                raise
        sync_folder(self.folder.parent)

    def is_whole(self) -> bool:
        """Whether the cache is there, with the right sizes and, of some images, the right checksums."""
        try:
            if (self.folder / INDEX_NAME).read_bytes() != self.index:
                return False
            some = np.random.default_rng().integers(len(self.image_lengths), size=IMAGES_CHECKED)
            return self._agrees(self.folder, some.tolist())
        except OSError:
            return False

    def _agrees(self, folder: Path, images: Iterable[int]) -> bool:
        """Whether the files have their sizes, and these images the states that their checksums are of."""
        states, checksums = folder / STATES_NAME, (folder / CHECKSUMS_NAME).read_bytes()
        if len(checksums) != 4 * len(self.image_lengths) or states.stat().st_size != self.num_bytes:
            return False
        with states.open("rb") as file:
            for image in images:
                file.seek(int(self.starts[image]) * self.row_bytes)
                content = file.read(int(self.image_lengths[image]) * self.row_bytes)
                if (
                    zlib.crc32(content).to_bytes(4, "little")
                    != checksums[4 * image : 4 * image + 4]
                ):
                    return False
        return True


def split_text_states(
    model: CaptionModel,
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
            "cross_attention), or text_state_cache=false"
        )
    if language_model.is_trained:
        raise ConfigurationError(
            "text_state_cache=true needs a frozen language model, for its states change while it is trained: use "
            "text_state_cache=false"
        )
    _check_starting_from_states(model, data, autocast)
    dtype = getattr(torch, recipe.autocast_dtype) if recipe.autocast_dtype else language_model.dtype
    key = cache_key(
        LAYOUT,
        language_model_fingerprint(language_model),
        str(layer),
        f"{dtype} {recipe.autocast_dtype is not None}",
        data.digest(),
    )
    root = (
        Path(recipe.data_dir) / ".features" if recipe.feature_cache == "off" else cache_root(recipe)
    )
    files = StateFiles(
        root / "text" / key, key, data.image_lengths, language_model.embed_dim, dtype
    )
    try:
        if world.largest(not files.is_whole()):
            _build(files, model, data, autocast, lambda line: say(f"{split} {line}"), world)
        return TextStates(files.folder / STATES_NAME, files.shape, dtype)
    except OSError as error:
        raise ConfigurationError(
            f"cannot cache text states in {files.folder}: {error.strerror or error} (use text_state_cache=false)"
        ) from error


def language_model_fingerprint(language_model: LanguageModel) -> str:
    """Hash over a language model's weights and what else its states depend on."""
    digest = hashlib.blake2b(digest_size=12)
    config = language_model.text_config.to_dict()
    # Where and how it was loaded changes nothing; its attention implementation rounds alike within 16 bits.
    digest.update(
        json.dumps({k: config[k] for k in sorted(config) if k[:1] != "_"}, default=str).encode()
    )
    for name, tensor in sorted(language_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _build(
    files: StateFiles,
    model: CaptionModel,
    data: TokenizedImages,
    autocast: Callable[[], Any],
    say: Say,
    world: World,
) -> None:
    """Compute the states of all captions into a folder that appears when it is whole.

    The first process of a machine makes the files, and each of them fills in its share.
    """
    root = files.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _check_room(files, root)
    say(f"text states: {files.num_bytes / 2**20:,.0f} MiB below {root}")
    name = f"{BUILDING}{files.folder.name}-{platform.node()}-{os.getpid()}"
    building = root / world.gather(name)[world.rank - world.local_rank]
    is_maker = world.local_rank == 0
    rows, by_length = (
        whole_rows(data.captions_per_image),
        np.argsort(-data.image_lengths, kind="stable"),
    )
    batches = in_batches([rows[image] for image in by_length], IMAGES_AT_ONCE)

    def states() -> Iterable[tuple[int, np.ndarray]]:
        started = said = time.perf_counter()
        done = 0
        for some in batches[world.local_rank :: world.local_size]:
            batch = data.pack(some)
            ids, segments = (
                torch.from_numpy(a).to(model.device) for a in (batch.input_ids, batch.segments)
            )
            with autocast():
                states = model.text_at_bridge(ids, segments).to(files.dtype).cpu()
            if not states.isfinite().all():
                raise ModelError(
                    f"text states do not fit into {files.dtype}: use text_state_cache=false or amp_dtype=bfloat16"
                )
            # A row has all captions of its image, in order: as they stand in the file.
            bits, is_text = states.view(_bits(files.dtype)).numpy(), batch.segments != 0
            for row, image in enumerate(batch.image_indices.tolist()):
                yield image, bits[row, is_text[row]]
            done += len(some) * world.local_size
            if time.perf_counter() - said > SAY_EVERY_SECONDS:
                said = time.perf_counter()
                say(
                    f"text states: {min(done, len(rows))}/{len(rows)} images ({done / (said - started):.0f}/s)"
                )

    lock = None
    try:
        if is_maker:
            remove_unfinished(root)
            lock = lock_cache(building)
            files.create(building)
        world.wait()
        files.fill(building, states())
        world.wait()
        if is_maker:
            files.finish(building)
        world.wait()
    finally:
        if is_maker:
            shutil.rmtree(building, ignore_errors=True)
        if lock is not None:
            lock.close()


def _check_room(files: StateFiles, root: Path) -> None:
    """Raise ConfigurationError where the disk has no room for text states."""
    if shutil.disk_usage(root).free < files.num_bytes + FREE_SPACE_TO_LEAVE:
        raise ConfigurationError(
            f"no room for {as_bytes(files.num_bytes)} of text states below {root}, with "
            f"{as_bytes(FREE_SPACE_TO_LEAVE)} left for checkpoints: use text_state_cache=false"
        )


@torch.no_grad()
def _check_starting_from_states(
    model: CaptionModel, data: TokenizedImages, autocast: Callable[[], Any]
) -> None:
    """Compare, on one image's captions, the last states with and without the layers below the bridge.

    Whether a transformers model can start from the states of a layer is not written anywhere.
    """
    batch = data.pack(whole_rows(data.captions_per_image)[:1])
    ids, segments = (
        torch.from_numpy(a).to(model.device) for a in (batch.input_ids, batch.segments)
    )
    encoder: Any = model.vision_encoder
    features = torch.zeros(1, encoder.num_tokens, encoder.embed_dim, device=model.device)
    with autocast():
        image = model.image_inputs(features)
        whole = model.text_states(ids, image, segments)
        started = model.text_states(
            ids, image, segments, text_at_bridge=model.text_at_bridge(ids, segments)
        )
    error = (whole.float() - started.float()).abs().max() / whole.float().abs().max()
    if not error < 1e-5:  # the same operations on the same numbers
        raise ModelError(
            f"{type(model.language_model.causal_lm).__name__} does not give the same states when it starts from those "
            f"of layer {model.bridge.first_layer}: use text_state_cache=false"
        )


def _bits(dtype: torch.dtype) -> torch.dtype:
    """A type of the same size that numpy has."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _numpy_type(dtype: torch.dtype) -> type[np.generic]:
    return np.int16 if dtype.itemsize == 2 else np.int32
