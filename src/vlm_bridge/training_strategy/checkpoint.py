"""Checkpoints: only what was trained, with the recipe and the names of the frozen parts."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vlm_bridge import __version__
from vlm_bridge.configuration import Recipe, recipe_from_dict, same_setting
from vlm_bridge.credentials import hub_problem, reach_hub
from vlm_bridge.errors import CheckpointError, ConfigurationError
from vlm_bridge.formats import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    DamagedCheckpointError,
    check_content,
    check_weights,
    dinov2_gemma,
    misfits,
    quantized,
    read_file,
    read_folder,
    shortened,
    write_file,
)
from vlm_bridge.model_architecture.attach import embedding_scale
from vlm_bridge.model_architecture.bridges import CrossAttentionBridge
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner
from vlm_bridge.parsing import shown

logger = logging.getLogger(__name__)

FORMAT = "vlm-bridge checkpoint"
BUNDLED, BUNDLED_FOLDER = "bundled", Path(__file__).parents[1] / "bundled"
# Since 2, a cross_attention bridge at layer 0 changes embeddings before a model scales them.
FORMAT_VERSION = 2
ORIGINAL_TRAINING = "original_training"  # state that the original project saves
PARTS = {"weights", "model_state_dict", "recipe", "training"}
STEP, STEP_PATTERN = "step_{:08d}.pth", "step_*.pth"
LATEST, BEST = "latest_checkpoint.pth", "best_model.pth"
BEST_WEIGHTS = "best_model_weights_only.pth"
ARCHITECTURE = {
    "vision_encoder": ("name", "revision", "image_size", "layers", "resample"),
    "language_model": ("name", "revision", "add_cross_attention", "lora"),
}
StorageDtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]


def save_checkpoint(
    path: Path,
    recipe: Recipe,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, Any] | None = None,
    *,
    format_version: int = FORMAT_VERSION,
) -> None:
    """Replace a checkpoint by a new one, or leave it as it was. Raises CheckpointError.

    Args:
        training: optimizer, position and so on; left out of weights-only files.
        format_version: of the checkpoint that the weights were read from.
    """
    content = {
        **header(recipe.to_dict(), format_version),
        "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
    }
    write_file(path, content if training is None else {**content, "training": training})


def header(recipe: Mapping[str, Any], format_version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return the content of a checkpoint beside its tensors."""
    versions = {"vlm_bridge": __version__, "torch": str(torch.__version__)}
    facts = {"format": FORMAT, "format_version": format_version, "versions": versions}
    return {**facts, "recipe": dict(recipe)}


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: our own, the original project's, or an exported Hugging Face folder.

    Returns:
        ``format_version``, ``weights``; ``recipe`` and ``training`` where the file has them;
        ``original_training`` of the original project's.

    Raises:
        CheckpointError: missing, damaged, none of these, or written by a newer vlm-bridge.
    """
    path = checkpoint_path(path)
    logger.debug("reading checkpoint %s", path)
    content: Any
    if path.name == WEIGHTS_NAME:
        config, weights = read_folder(path.parent)
        content = {**config, "weights": weights}
    else:
        content = read_file(path)
    try:
        if is_original := dinov2_gemma.is_original(content):
            # One with a recipe was exported by us, and an older one had no version.
            content.setdefault("format_version", 1 if "recipe" in content else FORMAT_VERSION)
        _check_layout(content, is_original)
        if content["format_version"] > FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by a newer vlm-bridge; update this one")
        if is_original:
            weights = dinov2_gemma.from_original(content.pop("model_state_dict"), path)
            kept = {key: content[key] for key in ("format_version", "recipe") if key in content}
            content = {**kept, "weights": weights, ORIGINAL_TRAINING: content}
        check_weights(content["weights"])
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{path} is not a vlm-bridge checkpoint that can be used: {error}; "
            "use an earlier checkpoint, or train again"
        ) from None
    return content


def _check_layout(content: Any, is_original: bool) -> None:
    """Refuse missing parts and parts of wrong types. Raises ValueError."""
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_original and not (is_ours and {"recipe", "weights"} <= content.keys()):
        raise ValueError("it has other keys")
    if not all(isinstance(content[key], Mapping) for key in PARTS & content.keys()):
        raise ValueError("a part of it is no mapping")
    check_content(content.get("recipe"), 0)  # no tensors
    for name, tensor in content["model_state_dict" if is_original else "weights"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"its weight {shown(name)} is no tensor")
    version = content.get("format_version")
    if type(version) is not int or version < 1:  # True is an int, too
        raise ValueError(f"its format_version is {shown(version)}, not a whole number from 1")


def stored_as(weights: Mapping[str, torch.Tensor], dtype: StorageDtype) -> dict[str, torch.Tensor]:
    """Return weights in another dtype, with facts of the features as they are.

    In int8 and int4 vectors are float16. Raises CheckpointError for a weight that is too large.
    """
    if dtype in ("int8", "int4"):
        matrices = {name: tensor.float() for name, tensor in weights.items() if tensor.ndim >= 2}
        vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim < 2}
        return stored_as(vectors, "float16") | quantized(matrices, bits=int(dtype[3:]))
    facts = ("feature_scale.", "familiarity.")
    stored = {
        name: tensor if name.startswith(facts) else tensor.to(getattr(torch, dtype))
        for name, tensor in weights.items()
    }
    for name, tensor in stored.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(f"{name} does not fit into {dtype}")
    return stored


def save_average(target: Path, paths: Sequence[Path], plain: Path | None = None) -> None:
    """Write the mean of checkpoints' weights in float32, with the recipe of the first.

    Raises CheckpointError where they are not of one architecture.

    Args:
        plain: checkpoint whose bridge captions images without an object in the prompt; the mean is
            for the others (`prompt_delta`).
    """
    contents = [load_checkpoint(path) for path in paths]
    recipe = recipe_of(contents[0], paths[0], is_built=False)
    for path, content in zip(paths, contents, strict=True):
        check_architecture(content, recipe, path)
        _refuse(misfits(content["weights"], contents[0]["weights"]), path)
    mean = {
        name: torch.stack([c["weights"][name].double() for c in contents]).mean(0).float()
        for name in contents[0]["weights"]
    }
    # Runs of other seeds remember other images.
    mean |= {n: x for n, x in contents[0]["weights"].items() if n.startswith("familiarity.")}
    if plain is not None:
        recipe = recipe.replace(prompt_delta=True)
        mean = _apart_from(plain, recipe, mean)
    version = min(content["format_version"] for content in contents)
    save_checkpoint(target, recipe, mean, format_version=version)


def _apart_from(
    plain: Path, recipe: Recipe, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return weights with the bridge of ``plain``, and their own one as a difference from it."""
    content, bridge = load_checkpoint(plain), "bridge."
    check_architecture(content, recipe, plain)
    of_plain = {n: x.float() for n, x in content["weights"].items() if n.startswith(bridge)}
    own = {n: x for n, x in weights.items() if n.startswith(bridge)}
    _refuse(misfits(of_plain, own), plain)
    delta = {f"prompt_delta.{n.removeprefix(bridge)}": own[n] - of_plain[n] for n in own}
    return weights | of_plain | delta


# --- where checkpoints are ---


def discard_unfinished(folder: Path) -> None:
    """Delete the unfinished files that killed processes left."""
    for left in folder.glob(".*.pth.*.tmp"):
        left.unlink(missing_ok=True)


def newest_sound(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the last written checkpoint that a run can continue, with its content."""
    found = [path for pattern in (LATEST, BEST, STEP_PATTERN) for path in folder.glob(pattern)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            content = load_checkpoint(path)
        except DamagedCheckpointError as damage:
            logger.warning(f"skipping damaged checkpoint: {damage}")
            continue
        if "training" in content or ORIGINAL_TRAINING in content:
            return path, content
    return None


def checkpoint_path(path: str | Path) -> Path:
    """Return the checkpoint file of a file, a run's folder, its `checkpoints`, or an export.

    `bundled` is the captioner of this package. Raises CheckpointError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if str(path) == BUNDLED and not path.exists():
        path = BUNDLED_FOLDER
        if not path.is_dir():
            raise CheckpointError("no captioner is bundled with this build: give --checkpoint")
    for folder in (path, path / "checkpoints"):
        for name in (BEST_WEIGHTS, BEST, LATEST, WEIGHTS_NAME):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(
        f"no checkpoint at {path}; train one with vlm-training, or run vlm-bridge quickstart"
    )


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """Return `checkpoint_path` of a path, or download `owner/model` of the Hugging Face hub.

    Raises CheckpointError where nothing is there, or the hub does not give it.
    """
    path = Path(name)
    model = path.as_posix()
    is_file_name = path.suffix in (".pth", ".pt", ".safetensors")
    is_ours = path.exists() or path.parent.is_dir() or path.parts[0] in ("runs", "checkpoints")
    if is_ours or is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for models on the hub, not for {path}")
        return checkpoint_path(path)
    from huggingface_hub import snapshot_download

    try:
        reach_hub(model, revision)
        wanted = [CONFIG_NAME, WEIGHTS_NAME]
        return checkpoint_path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises errors of several libraries
        if (problem := hub_problem(error, model)) is None:
            raise
        message = f"no checkpoint at {path}, and none from the hub: {problem}"
        raise CheckpointError(message) from error


# --- what belongs to a checkpoint ---


def recipe_of(
    content: dict[str, Any],
    where: str | Path,
    given: Recipe | None = None,
    *,
    is_built: bool = True,
) -> Recipe:
    """Return the recipe that a checkpoint was trained with.

    Args:
        given: the user's, used instead if its architecture is the checkpoint's.
        is_built: whether a captioner may be built from it, which imports what it names.

    Raises:
        CheckpointError: no recipe, a wrong one, or one of another architecture; or it would import
            code that the checkpoint alone names.
    """
    if given is not None:
        check_architecture(content, given, where)
        return given
    if "recipe" not in content:
        raise CheckpointError(
            f"{where} comes from the original project and names no recipe: convert it once with "
            f"`vlm-bridge export {where} --config config/training-default.yaml --output-dir DIR` "
            "(training takes its own settings, or a recipe by --config)"
        )
    if content["recipe"].get("feature_cache_pooling", 1) != 1:
        raise CheckpointError(
            f"{where} was trained on pooled features (feature_cache_pooling), which are no longer "
            "supported: train again without"
        )
    try:
        recipe = recipe_from_dict(content["recipe"], where=str(where))
    except ConfigurationError as error:
        raise CheckpointError(f"{where}: its recipe cannot be understood: {error}") from error
    if is_built:
        refuse_own_code(recipe, where)
    return recipe


def refuse_own_code(recipe: Recipe, where: str | Path) -> None:
    """Raise CheckpointError if a recipe that somebody else may have written names code."""
    if recipe.own_code:
        raise CheckpointError(
            f"{where} needs {' and '.join(recipe.own_code)}: code is imported for a recipe of your "
            "own alone, so give the one it was trained with (--config, or recipe= in Python)"
        )


def check_sizes(content: dict[str, Any], recipe: Recipe, where: str | Path) -> None:
    """Compare weights with a recipe's captioner, before memory is allocated for one.

    Raises CheckpointError where they differ, or no captioner can be built.
    """
    try:
        model: Any = build_captioner(recipe, meta=True)
    except (ConfigurationError, RuntimeError, OverflowError) as error:  # a tensor of 2**63 bytes
        raise CheckpointError(f"{where}: its recipe cannot be built: {error}") from error
    any_size = model.vision_encoder.num_tokens  # unknown without the encoder's processor

    def same(has: torch.Size, wants: torch.Size) -> bool:
        sizes = zip(has, wants, strict=False)
        return len(has) == len(wants) and all(w in (h, any_size) for h, w in sizes)

    _refuse(misfits(content["weights"], model.trained_state_dict(), same), where)


def check_architecture(
    content: dict[str, Any], wanted: Recipe, where: str | Path, *, is_start: bool = False
) -> None:
    """Raise CheckpointError where encoder, language model or bridge are not those of a recipe.

    Args:
        is_start: the recipe's LoRA adapters may be new.
    """
    if "recipe" in content:
        has = architecture(recipe_of(content, where, is_built=False))
    else:
        has = dinov2_gemma.original_architecture(content["weights"])
    wants = architecture(wanted)
    if is_start and has.get("language_model.lora") is None:
        del wants["language_model.lora"]
    changed = [k for k in has.keys() & wants.keys() if not same_setting(k, has[k], wants[k])]
    if "bridge.kind" in changed:  # the options of two kinds cannot be compared
        changed = [k for k in changed if k == "bridge.kind" or not k.startswith("bridge.")]
    _refuse([f"it has {k}={has[k]}, wanted is {wants[k]}" for k in sorted(changed)], where)


def architecture(recipe: Recipe) -> dict[str, Any]:
    """Return the dotted keys of a recipe that decide what a bridge's weights mean."""
    plain = recipe.to_dict()
    keys = {**ARCHITECTURE, "bridge": [key for key in plain["bridge"] if key != "dropout"]}
    named = {f"{part}.{key}": plain[part][key] for part, names in keys.items() for key in names}
    (named["language_model.lora"] or {}).pop("dropout", None)
    return {**named, "trainable": sorted(plain["trainable"])}


def restore(
    model: CaptionModel, content: Mapping[str, Any], where: str | Path, *, is_start: bool = False
) -> None:
    """Load a checkpoint's weights into a captioner. Raises CheckpointError.

    Args:
        is_start: adapters, remembered images and the difference for prompts that the checkpoint
            does not have stay as they are; those that the captioner does not have are left out.
    """
    scale = embedding_scale(model.language_model.causal_lm.get_input_embeddings())
    bridge = model.bridge
    edits_embeddings = isinstance(bridge, CrossAttentionBridge) and bridge.first_layer == 0
    if content["format_version"] < 2 and edits_embeddings and float(scale) != 1:
        raise CheckpointError(
            f"{where} was trained by an earlier vlm-bridge, whose bridge changed embeddings after "
            "the language model had scaled them; now, as published, it changes them before: train "
            "it again"
        )
    weights = content["weights"]
    ours = model.trained_state_dict()
    for part in (".lora_", "familiarity.", "prompt_delta.") if is_start else ():
        if not any(part in name for name in weights):
            weights = {name: ours[name] for name in ours if part in name} | weights
        elif part != ".lora_" and not any(part in name for name in ours):
            weights = {name: x for name, x in weights.items() if part not in name}
    load_weights(model, weights, where)


def load_weights(model: Any, weights: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Load trained weights into a captioner. Raises CheckpointError if names or shapes differ."""
    _refuse(misfits(weights, model.trained_state_dict()), where)
    model.load_state_dict(weights, strict=False)


def _refuse(problems: list[str], where: str | Path) -> None:
    if problems:
        raise CheckpointError(
            f"{where} belongs to another architecture: {shortened(problems)}; "
            "use the recipe it was trained with"
        )
