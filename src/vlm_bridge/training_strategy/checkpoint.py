"""Checkpoints: only what was trained, with the recipe and the names of the frozen parts beside it.

Files are read with ``weights_only=True``: a checkpoint can never run code. They carry a hash over all that they hold,
and are written durably (`durable_files`): a new one is read back and its hash compared before it takes the place of the
previous one. Checkpoints of the original project and exported Hugging Face folders (`model_architecture.interchange`)
are read like our own.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import platform
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import torch

from vlm_bridge import __version__
from vlm_bridge.configuration import Recipe, recipe_from_dict, same_setting
from vlm_bridge.durable_files import not_as_written, previous_of, write_durably
from vlm_bridge.errors import CheckpointError, ConfigurationError
from vlm_bridge.hub import hub_problem, reach_hub
from vlm_bridge.model_architecture import interchange
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.parsing import shown
from vlm_bridge.training_strategy.checkpoint_limits import (
    MAX_PICKLE_BYTES,
    check_content,
    check_plain,
    check_weights,
)

logger = logging.getLogger(__name__)

FORMAT = "vlm-bridge checkpoint"
ORIGINAL_FORMAT = "original project"
ORIGINAL_TRAINING = "original_training"
FORMAT_VERSION = 2
"""2: a cross_attention bridge at layer 0 changes embeddings before a model scales them; in 1 it did afterwards."""
_DOS_DIRECTORY = 0x10
ORIGINAL_ENTRIES = ("config", "epoch", "optimizer_state_dict", "scheduler_state_dict")
"""What is read of the original project's checkpoints beside weights. Its losses count pads: no best one is taken."""
STEP = "step_{:08d}.pth"
"""Name of a checkpoint that is kept for its step."""
STEP_PATTERN = "step_*.pth"
LATEST, BEST, BEST_WEIGHTS = (
    "latest_checkpoint.pth",
    "best_model.pth",
    "best_model_weights_only.pth",
)
VERSIONED_PACKAGES = ("torch", "transformers", "accelerate", "numpy")
"""Packages that decide what a step computes."""
StorageDtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
"""How weights can be stored."""


class DamagedCheckpointError(CheckpointError):
    """A file that no part of a checkpoint is taken from."""


def save_checkpoint(
    path: Path,
    recipe: Recipe,
    weights: Mapping[str, torch.Tensor],
    training: dict[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    format_version: int = FORMAT_VERSION,
) -> None:
    """Write a checkpoint atomically.

    Args:
        training: optimiser, position and so on; left out of weights-only files.
        sizes: `captioner_sizes`, so that a captioner of other sizes can be refused by name.
        format_version: of the checkpoint that the weights were read from.

    Raises:
        CheckpointError: it cannot be written; an earlier file of this name is left as it was.
    """
    content = {
        "format": FORMAT,
        "format_version": format_version,
        "versions": package_versions(),
        "recipe": recipe.to_dict(),
        "sizes": dict(sizes or {}),
        "weights": dict(weights),
    }
    if training is not None:
        content |= {"training": training, "saved_at": time.time()}
    content = _on_cpu(content)
    digest = content_hash(content)
    _write(path, {**content, "content_hash": digest}, digest)


def package_versions() -> dict[str, str]:
    """Versions of what decides what a step computes."""
    return {
        "vlm_bridge": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONED_PACKAGES},
    }


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash over all that a checkpoint holds, whatever file format it is in; not over a hash that it carries."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"sequence {len(value)};".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add({key: value for key, value in content.items() if key != "content_hash"})
    return digest.hexdigest()


def _on_cpu(value: Any) -> Any:
    """The same containers with their tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value


def keep_newest_steps(folder: Path, count: int) -> None:
    """Delete all but the newest ``count`` checkpoints of single steps; the latest and the best are never touched.

    The newest are those written last: a run that starts again at an earlier step must not delete its own for what
    another left behind.
    """
    for old in step_checkpoints(folder)[:-count]:
        old.unlink(missing_ok=True)


def discard_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder of checkpoints: it would take room for ever."""
    for left in folder.glob(".*.pth.*.tmp"):
        left.unlink(missing_ok=True)


def newest_sound(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in a folder that a run can continue from and that was saved last, with its content.

    Args:

    Raises:
        CheckpointError: the newest was written by a newer vlm-bridge.
    """
    names = [path for pattern in (LATEST, BEST, STEP_PATTERN) for path in folder.glob(pattern)]
    names += [path for name in (LATEST, BEST) if (path := previous_of(folder / name)).is_file()]
    files = {
        path.stat().st_ino: path for path in reversed(names)
    }  # a file may have two names for a moment
    for path in sorted(files.values(), key=_when_saved, reverse=True):
        try:
            content = load_checkpoint(path)
        except DamagedCheckpointError as damage:
            logger.warning(f"skipping damaged checkpoint: {damage}")
            continue
        if "training" in content or content["format"] == ORIGINAL_FORMAT:
            return path, content
        logger.info(f"skipping {path}: it holds weights only")
    return None


def _when_saved(path: Path) -> float:
    """Seconds since the epoch. Files are copied from rented machines, and then their own times say little."""
    try:
        return float(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["saved_at"])
    except Exception:  # damaged, or written by an earlier version
        return path.stat().st_mtime


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of single steps in a folder, in the order they were written."""
    return sorted(folder.glob(STEP_PATTERN), key=lambda path: (path.stat().st_mtime_ns, path.name))


def save_original(
    path: Path, recipe: Recipe, content: Mapping[str, Any], where: str | Path
) -> None:
    """Write a weights-only checkpoint that the original project loads: bridge weights and flat configuration.

    The recipe goes along under a key of our own, which the original ignores and `load_checkpoint` finds.

    Args:
        content: an opened checkpoint, with its ``weights``.
        where: what it was read from, for messages.

    Raises:
        CheckpointError: the layout has no place for such weights, or the file cannot be written.
    """
    published = recipe.to_dict()
    if layer := published["bridge"].get("enter_at_layer"):
        raise CheckpointError(
            f"{where} cannot be written in the original layout, whose bridge changes the embeddings: this one has "
            f"bridge.enter_at_layer={layer}"
        )
    write_file(
        path,
        {
            "model_state_dict": interchange.to_original(content["weights"], where),
            "config": {
                key: value for key, value in published.items() if not isinstance(value, dict)
            },
            "recipe": published,
            "format_version": content.get("format_version", FORMAT_VERSION),
        },
    )


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """``torch.save`` that leaves either the whole new file, read back and compared, or the old one.

    Raises:
        CheckpointError: it cannot be written.
    """
    _write(path, content, content_hash(content))


def _write(path: Path, content: Mapping[str, Any], digest: str) -> None:
    def check(written: Path) -> None:
        try:
            found = content_hash(read_file(written, mmap=True))
        except CheckpointError as error:
            raise not_as_written(path) from error
        if found != digest:
            raise not_as_written(path)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda file: _serialise(content, file), check, keep_previous=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {reason} (free some space or change the folder)"
        ) from error


def _serialise(content: Mapping[str, Any], file: IO[bytes]) -> None:
    writer = _Writer(file)
    torch.save(dict(content), writer)  # type: ignore[arg-type]
    if writer.error is not None:
        raise writer.error


class _Writer:
    """What ``torch.save`` writes to. It makes another error of any that comes from below, so it is told of none."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing yet: the file is flushed when it is whole."""


def in_bfloat16(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights at half their size; feature statistics stay float32, since every feature is scaled by them."""
    return stored_as(weights, "bfloat16")


def stored_as(weights: Mapping[str, torch.Tensor], dtype: StorageDtype) -> dict[str, torch.Tensor]:
    """Weights in another dtype, but for feature statistics. A captioner computes in its own, whatever is stored.

    Args:
        dtype: int8 and int4 are for Hugging Face folders (`interchange.quantized`); vectors are float16 then.

    Raises:
        CheckpointError: a weight is too large for the dtype.
    """
    if dtype in ("int8", "int4"):
        vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim < 2}
        matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim >= 2}
        small = interchange.quantized(
            stored_as(matrices, "float32"), bits=8 if dtype == "int8" else 4
        )
        return stored_as(vectors, "float16") | small
    stored = {
        name: tensor if name.startswith("feature_scale.") else tensor.to(getattr(torch, dtype))
        for name, tensor in weights.items()
    }
    for name, tensor in stored.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(f"{name} does not fit into {dtype}")
    return stored


def save_average(target: Path, paths: Sequence[Path]) -> None:
    """Write the mean of some checkpoints' weights in float32, with the recipe of the first.

    Raises:
        CheckpointError: one is missing or damaged, or they are not of one architecture.
    """
    first, *others = (load_checkpoint(path) for path in paths)
    recipe = recipe_of(first, paths[0], to_build=False)
    mean = {name: tensor.double() for name, tensor in first["weights"].items()}
    for path, content in zip(paths[1:], others, strict=True):
        check_architecture(content, recipe, path)
        if wrong := interchange.wrong_names(content["weights"], mean):
            raise CheckpointError(
                f"{path} has other weights than {paths[0]}: {interchange.shortened(wrong)}"
            )
        for name, tensor in content["weights"].items():
            if tensor.shape != mean[name].shape:
                sizes = f"{list(tensor.shape)}, there {list(mean[name].shape)}"
                raise CheckpointError(f"{path} has another {name} than {paths[0]}: {sizes}")
            mean[name] += tensor.double()
    weights = {name: (tensor / len(paths)).float() for name, tensor in mean.items()}
    version = min(content["format_version"] for content in (first, *others))
    save_checkpoint(target, recipe, weights, sizes=first.get("sizes"), format_version=version)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: our own, one of the original project, or an exported Hugging Face folder.

    Args:
        path: the file, or a folder that holds one (the best weights are taken).

    Returns:
        ``format``, ``format_version``, ``weights`` (our names), ``sizes``; ``recipe`` unless the original project
        wrote it, whose other entries are in ``original_training`` then; ``training`` if a run can be continued.

    Raises:
        CheckpointError: missing, damaged, or none of these.
    """
    path = checkpoint_path(path)
    content = _read_exported(path) if path.name == interchange.WEIGHTS_NAME else read_file(path)
    if not _is_laid_out(content):
        raise DamagedCheckpointError(f"{path} is not a vlm-bridge checkpoint")
    _check_version(content, path)
    if interchange.is_original(content):
        content = _from_original(content, path)
    elif not {"format", "recipe", "weights"} <= content.keys() or content["format"] != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a vlm-bridge checkpoint")
    elif "content_hash" in content and content["content_hash"] != content_hash(content):
        raise DamagedCheckpointError(f"{path} is damaged: its content is not what its hash says")
    try:
        check_weights(content["weights"])
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{path} cannot be used: {error}; use an earlier checkpoint, or train again"
        ) from None
    return content


def _is_laid_out(content: Any) -> bool:
    """Whether all parts of a checkpoint that are there are of their kind, ours or the original project's."""
    if not isinstance(content, dict):
        return False
    tensors = [content[key] for key in ("weights", "model_state_dict") if key in content]
    mappings = [content[key] for key in ("recipe", "sizes", "training") if key in content]
    try:
        check_plain([content.get("recipe"), content.get("sizes")], 10_000, 50)
    except ValueError:
        return False
    return all(isinstance(part, Mapping) for part in [*tensors, *mappings]) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for part in tensors
        for name, value in part.items()
    )


def _check_version(content: Mapping[str, Any], path: Path) -> None:
    if "format_version" not in content:
        if "weights" in content:
            raise DamagedCheckpointError(
                f"{path} is not a vlm-bridge checkpoint: it has no format_version"
            )
        return
    version = content["format_version"]
    if type(version) is not int or version < 1:  # True is an int, too
        raise DamagedCheckpointError(
            f"{path} is not a vlm-bridge checkpoint: its format_version is {shown(version)}, not a whole number from 1"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a newer vlm-bridge; update this one")


def _from_original(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint of the original project as `load_checkpoint` returns it."""
    weights = interchange.from_original(content["model_state_dict"], path)
    recipe = {"recipe": content["recipe"]} if "recipe" in content else {}
    return {
        "format": ORIGINAL_FORMAT,
        "format_version": content.get("format_version", 1) if recipe else FORMAT_VERSION,
        "weights": weights,
        "sizes": interchange.original_sizes(weights),
        **recipe,
        ORIGINAL_TRAINING: {key: content[key] for key in ORIGINAL_ENTRIES if key in content},
    }


def read_file(path: Path, *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, and never code. Raises CheckpointError where it is damaged or holds anything else.

    Args:
        mmap: leave tensors in the file until they are read.
    """
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(
            f"{path} is not a vlm-bridge checkpoint, or holds code; it was not loaded"
        ) from error
    except Exception as error:  # damaged bytes meet the readers with almost any exception
        raise DamagedCheckpointError(
            f"{path} is damaged or is not a checkpoint: it cannot be read"
        ) from error
    try:
        check_content(content, path.stat().st_size)
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} is not a vlm-bridge checkpoint: {error}") from None
    return content


def _check_archive(path: Path) -> None:
    """Refuse a file whose parts are damaged, or larger than they may be. Raises zipfile.BadZipFile."""
    # torch leaves the checksums of its own zip format unread, and would load flipped bits as weights. A tensor marked
    # as a folder it does not read at all, and gives whatever lay in memory.
    with zipfile.ZipFile(path) as archive:
        # torch.save compresses nothing and writes every entry once: small files stay small when they are read.
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("its parts are larger than the file")
        if any(e.filename.endswith(".pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
            raise zipfile.BadZipFile("its pickle is too large")
        if any(entry.external_attr & _DOS_DIRECTORY for entry in entries):
            raise zipfile.BadZipFile("a tensor is marked as a folder")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)


def _read_exported(path: Path) -> dict[str, Any]:
    config, weights = interchange.read_folder(path.parent)
    return {**config, "weights": weights}


def exported_config(recipe: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder: all of a checkpoint but its weights, with this recipe."""
    return {
        "model_type": "vlm-bridge-captioner",
        "format": FORMAT,
        "format_version": content.get("format_version", FORMAT_VERSION),
        "versions": {"vlm_bridge": __version__, "torch": str(torch.__version__)},
        "recipe": dict(recipe),
        "sizes": dict(content.get("sizes", {})),
    }


def checkpoint_path(path: str | Path) -> Path:
    """The checkpoint file meant by a file or a folder (a run folder, its `checkpoints`, or an exported one)."""
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "checkpoints"):
            for name in (BEST_WEIGHTS, BEST, LATEST, interchange.WEIGHTS_NAME):
                if (folder / name).is_file():
                    return folder / name
        raise CheckpointError(f"no checkpoint in {path} ({BEST_WEIGHTS}, {BEST} or {LATEST})")
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}; train one with vlm-training, or run vlm-bridge quickstart"
        )
    return path


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """`checkpoint_path`, or what the Hugging Face hub holds under a name (`owner/model`) that is no path here.

    Args:
        revision: branch, tag or commit of the hub's model.

    Raises:
        CheckpointError: nothing is there, or the hub does not give it (the reason and what to do are named).
    """
    path = Path(name)
    if path.exists() or not _may_be_on_hub(path):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} is for models on the hub; {path} is a path here"
            )
        return checkpoint_path(path)
    from huggingface_hub import snapshot_download

    wanted = [interchange.CONFIG_NAME, interchange.WEIGHTS_NAME]
    try:
        reach_hub(path.as_posix(), revision)
        folder = snapshot_download(path.as_posix(), revision=revision, allow_patterns=wanted)
    except Exception as error:  # the hub's client raises errors of several libraries
        if (problem := hub_problem(error, path.as_posix())) is None:
            raise
        raise CheckpointError(
            f"no checkpoint at {path}, and none from the hub: {problem}"
        ) from error
    return checkpoint_path(folder)


def _may_be_on_hub(path: Path) -> bool:
    """`owner/model`, unless the first part is a folder here or usually is one: then a path is meant."""
    plain = all(re.fullmatch(r"[\w-][\w.-]*", part) for part in path.parts)
    is_file = path.suffix in (".pth", ".pt", ".safetensors")
    if len(path.parts) != 2 or not plain or is_file:
        return False
    return path.parts[0] not in ("runs", "checkpoints") and not Path(path.parts[0]).is_dir()


def has_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint file or a folder that holds one."""
    try:
        checkpoint_path(path)
    except CheckpointError:
        return False
    return True


def recipe_of(
    content: dict[str, Any],
    where: str | Path,
    given: Recipe | None = None,
    *,
    to_build: bool = True,
) -> Recipe:
    """The recipe a checkpoint was trained with.

    Args:
        given: taken in its stead, if its architecture is the checkpoint's (the original project's files name none).
        to_build: a captioner will be built of it: compare the sizes that it asks for with the weights first.

    Raises:
        CheckpointError: no recipe, one that cannot be understood, a given one of another architecture, or one of
            other sizes than the weights.
        ModelError: the configuration of a frozen part cannot be read.
    """
    if given is not None:
        check_architecture(content, given, where)
        recipe = given
    elif "recipe" not in content:
        raise CheckpointError(
            f"{where} comes from the original project and names no recipe: convert it once with `vlm-bridge export "
            f"{where} --config config/training-default.yaml --output-dir DIR` (training takes its own settings, or "
            "a recipe by --config)"
        )
    else:
        try:
            recipe = recipe_from_dict(content["recipe"], where=str(where))
        except ConfigurationError as error:
            raise CheckpointError(f"{where}: its recipe cannot be understood: {error}") from error
        if content["recipe"].get("feature_cache_pooling", 1) != 1:
            raise CheckpointError(
                f"{where} was trained on averaged features (feature_cache_pooling=2), which are no "
                "longer supported: train it again"
            )
    if to_build:
        _check_sizes(recipe, content, where)
    return recipe


def _check_sizes(recipe: Recipe, content: Mapping[str, Any], where: str | Path) -> None:
    """Compare the shapes of a recipe's captioner with a checkpoint's weights before any of it is allocated.

    Raises:
        CheckpointError: the recipe asks for other tensors than the checkpoint holds.
        ModelError: the configuration of a frozen part cannot be read.
    """
    try:
        model: Any = build_captioner(recipe, meta=True)
    except ConfigurationError as error:
        raise CheckpointError(f"{where}: its recipe cannot be built: {error}") from error
    except (RuntimeError, OverflowError) as error:  # torch's word for a tensor of 2**63 bytes
        raise CheckpointError(f"{where}: its recipe asks for impossible sizes") from error
    _check_widths(model, content, where)
    # Without its processor, an encoder may be of another image size.
    _check_names_and_shapes(
        model, content["weights"], where, any_size=model.vision_encoder.num_tokens
    )


def check_architecture(content: dict[str, Any], wanted: Recipe, where: str | Path) -> None:
    """Refuse, key by key, a checkpoint whose encoder, language model or bridge is not that of a recipe.

    Raises:
        CheckpointError: each key that differs is named, with what the checkpoint has and what is wanted.
    """
    has = (
        architecture(recipe_of(content, where, to_build=False))
        if "recipe" in content
        else interchange.original_architecture(content["weights"])
    )
    wants = architecture(wanted)
    if has["bridge.kind"] != wants["bridge.kind"]:  # the options of two kinds cannot be compared
        has = {
            key: value
            for key, value in has.items()
            if key == "bridge.kind" or not key.startswith("bridge.")
        }
    _refuse_other(
        {k: v for k, v in has.items() if k in wants and not same_setting(k, v, wants[k])},
        wants,
        where,
    )


def architecture(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys of a recipe that decide what a bridge's weights mean."""
    plain = recipe.to_dict()
    keys = {
        "vision_encoder": ("name", "revision", "image_size", "layers", "resample"),
        "language_model": ("name", "revision", "add_cross_attention"),
        "bridge": [key for key in plain["bridge"] if key != "dropout"],
    }
    named = {f"{part}.{key}": plain[part][key] for part, names in keys.items() for key in names}
    return {
        **named,
        "trainable": sorted(plain["trainable"]),
    }


def captioner_sizes(model: Any) -> dict[str, int]:
    """Widths D and H of the frozen parts that a captioner's bridge connects."""
    return {
        "vision_encoder.embed_dim": model.vision_encoder.embed_dim,
        "language_model.embed_dim": model.language_model.embed_dim,
    }


def restore(model: Any, content: dict[str, Any], where: str | Path) -> None:
    """Put a checkpoint's weights into a captioner.

    Raises:
        CheckpointError: it belongs to a captioner of other widths or another bridge (what differs is named), or its
            bridge was trained on embeddings that the language model had scaled (format version 1).
    """
    if content["format_version"] < 2 and model.edits_scaled_embeddings:
        raise CheckpointError(
            f"{where} was trained by an earlier vlm-bridge, whose bridge changed embeddings after "
            f"{type(model.language_model.causal_lm).__name__} had scaled them; as published, it changes them before "
            "that, and these weights mean something else there: train it again"
        )
    _check_widths(model, content, where)
    load_weights(model, content["weights"], where)


def _check_widths(model: Any, content: Mapping[str, Any], where: str | Path) -> None:
    """Raise CheckpointError where the frozen parts are of other widths than those the checkpoint was trained with."""
    wanted = captioner_sizes(model)
    has = content.get("sizes", {})
    _refuse_other(
        {key: has[key] for key in wanted if key in has and has[key] != wanted[key]}, wanted, where
    )


def _refuse_other(has: Mapping[str, Any], wanted: Mapping[str, Any], where: str | Path) -> None:
    if has:
        differences = interchange.shortened(
            [f"it has {k}={v}, wanted is {wanted[k]}" for k, v in has.items()]
        )
        raise CheckpointError(
            f"{where} belongs to another architecture: {differences}; use the recipe it was trained with"
        )


def load_weights(model: Any, weights: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Put trained weights into a captioner; every key and shape must fit.

    Raises:
        CheckpointError: it belongs to another architecture; the first keys that do not fit are named.
    """
    _check_names_and_shapes(model, weights, where)
    model.load_state_dict(weights, strict=False)


def _check_names_and_shapes(
    model: Any,
    weights: Mapping[str, torch.Tensor],
    where: str | Path,
    *,
    any_size: int | None = None,
) -> None:
    """Compare weights with a captioner's, which may be on the meta device.

    Args:
        any_size: a dimension of this size in the captioner may have another one.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    wanted = model.trained_state_dict()

    def differs(has: torch.Size, wants: torch.Size) -> bool:
        sizes = zip(has, wants, strict=False)
        return len(has) != len(wants) or any(h != w and w != any_size for h, w in sizes)

    problems = sorted(
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if differs(weights[name].shape, wanted[name].shape)
    ) + interchange.wrong_names(weights, wanted)
    if problems:
        raise CheckpointError(
            f"{where} belongs to another architecture: {interchange.shortened(problems)}"
        )
