"""Find a checkpoint to continue, refuse one of another training, and continue from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_bridge.configuration import Recipe, published_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats.dinov2_gemma import ORIGINAL_NAMES
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState, seed_all

logger = logging.getLogger(__name__)

AUTO = "auto"  # the newest sound checkpoint in the recipe's checkpoint_dir, if there is one
MOMENTS = ("exp_avg", "exp_avg_sq")


class Found(NamedTuple):
    """A checkpoint to continue, with the changes of recipe and data since."""

    path: Path
    content: dict[str, Any]
    changes: Sequence[str] = ()
    is_other_data: bool = False


def find_run(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint and its content; of a folder, the newest sound one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and (found := checkpoints.newest_sound(folder)) is not None:
            return found
    path = checkpoints.checkpoint_path(path)
    return path, checkpoints.load_checkpoint(path)


def find_checkpoint(
    resume: str | Path | None,
    recipe: Recipe,
    manifest: Mapping[str, Any],
    world: World,
    *,
    force: bool,
) -> Found | None:
    """Return the checkpoint that a training continues; None for a new run.

    Args:
        manifest: of the data that the training reads.
        force: continue although recipe or data have changed.

    Raises:
        CheckpointError: there is none, it is damaged, or (without ``force``) of another training.
    """
    folder = Path(recipe.checkpoint_dir)
    resume = world.from_first(lambda: resume)
    if resume is None:
        if (folder / checkpoints.LATEST).is_file():
            logger.info(
                f"{folder} holds an earlier run; its checkpoints will be replaced "
                "(--resume continues it)"
            )
        if (start := recipe.start_from) is not None:
            content = world.from_first(lambda: checkpoints.load_checkpoint(start))
            checkpoints.check_architecture(content, recipe, start)
        return None
    if str(resume) == AUTO:
        found = world.from_first(lambda: checkpoints.newest_sound(folder))
        if found is None:
            logger.info(f"no checkpoint to resume from in {folder}: training starts anew")
            return None
    else:
        found = world.from_first(lambda: find_run(resume))
    return _check(Found(*found), recipe, manifest, force=force)


def _check(found: Found, recipe: Recipe, manifest: Mapping[str, Any], *, force: bool) -> Found:
    path, content, *_ = found
    checkpoints.check_architecture(content, recipe, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        return found
    if (training := content.get("training")) is None:
        raise CheckpointError(
            f"{path} holds weights only; resume from {checkpoints.LATEST} or {checkpoints.BEST}, "
            f"or train on from these weights with start_from={path}"
        )
    before = training.get("dataset", {"fingerprint": training["dataset_fingerprint"]})
    of_data = dataset_changes(before, dataset_facts(manifest))
    of_recipe = recipe.changes_since(checkpoints.recipe_of(content, path, to_build=False))
    changes = of_data + of_recipe
    if changes and not force:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(changes)} (go back to what "
            "it was, or continue all the same with --force)"
        )
    return Found(path, content, changes, bool(of_data))


def dataset_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a caption folder that a checkpoint holds, with dotted keys."""
    wanted = ("source", "counts", "split_rule", "seed", "settings", "fingerprint")
    return _flat({key: manifest[key] for key in wanted if key in manifest})


def dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two `dataset_facts`; none where the fingerprints are equal."""
    if before["fingerprint"] == now["fingerprint"]:
        return []
    return [
        f"data {key}={now.get(key, 'nothing')}, was {value}"
        for key, value in before.items()
        if key not in now or now[key] != value
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resumed_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a run; dinov2-gemma's own settings go over training-default."""
    _, content = find_run(path)
    if "recipe" not in content and checkpoints.ORIGINAL_TRAINING in content:
        settings = content[checkpoints.ORIGINAL_TRAINING].get("config") or {}
        recipe = published_recipe(settings, str(path))
    else:
        recipe = checkpoints.recipe_of(content, path)
    return recipe.replace(resume_from_checkpoint=str(path))


def continue_from(found: Found, state: TrainState, data: TrainingData) -> None:
    """Load a checkpoint into the state of a training, and log what may make it differ.

    Raises:
        CheckpointError: its optimizer has other groups, or it holds no state of a training.
    """
    path, content = found.path, found.content
    checkpoints.restore(state.model, content, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        _continue_original(path, content[checkpoints.ORIGINAL_TRAINING], state, data)
        return
    training = content["training"]
    before, now = (
        _names_by_group(s) for s in (training["optimizer"], state.optimizer.state_dict())
    )
    if before not in (None, now):
        raise CheckpointError(
            f"{path} has its optimizer's state for other groups of parameters: keep the patterns "
            "under trainable in their order (their learning rates may change)"
        )
    try:
        if state.average is not None:
            state.average.restart()
        state.load_state_dict(training, path)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} has a state that no training saves ({type(error).__name__}): train on from "
            f"its weights with start_from={path}"
        ) from error
    if state.step_in_epoch and state.step_in_epoch >= data.steps_in_epoch(state.epoch):
        # Early versions counted an epoch after its validation.
        state.epoch, state.step_in_epoch, state.validated_step = state.epoch + 1, 0, 0
    logger.info(f"resumed {path} at step {state.step} of {data.total_steps}")
    for change in found.changes:
        logger.info(f"changed by --force: {change}")
    if state.step_in_epoch and (
        found.is_other_data or _differing(training["data_order"], data.order(), "was")
    ):
        logger.info(
            "the rest of this epoch is of another order: some captions come twice in it, others "
            "not at all"
        )
    if others := _differing(content.get("versions", {}), checkpoints.package_versions(), "was"):
        logger.info(f"other versions may round otherwise: {', '.join(others)}")
    schedule = schedule_facts(data.recipe, data.total_steps)
    if others := _differing(training.get("scheduler", {}), schedule, "not"):
        logger.info(f"the learning rate follows another schedule from here on: {', '.join(others)}")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], word: str) -> list[str]:
    return [
        f"{key}={now[key]}, {word} {before[key]}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]


def schedule_facts(recipe: Recipe, total_steps: int) -> dict[str, Any]:
    """Return the settings that decide the learning rate of a step."""
    names = ("scheduler_type", "learning_rate", "min_lr", "warmup_steps", "trainable")
    return {"total_steps": total_steps, **{name: getattr(recipe, name) for name in names}}


def _names_by_group(optimizer_state: dict[str, Any]) -> list[list[str]] | None:
    """Return parameter names of each group; None where an early version wrote no names."""
    groups = optimizer_state["param_groups"]
    return [group["param_names"] for group in groups] if "param_names" in groups[0] else None


def _continue_original(
    path: Path, training: Mapping[str, Any], state: TrainState, data: TrainingData
) -> None:
    """Continue a run of dinov2-gemma's own code: moments and position where they fit."""
    seed_all(data.recipe.seed)  # of dropout
    epochs, schedule = training.get("epoch"), training.get("scheduler_state_dict")
    state.epoch = min(epochs if type(epochs) is int else 0, data.recipe.num_epochs)
    steps = sum(data.steps_in_epoch(epoch) for epoch in range(state.epoch))
    state.step = state.validated_step = min(steps, data.total_steps)
    taken = take_original_moments(state.optimizer, training)
    logger.info(
        f"resumed {path} of the original project at epoch {state.epoch + 1}, step {state.step} of "
        f"{data.total_steps}, with {'its optimizer' if taken else 'a new optimizer'}; its best "
        "loss is not taken, for it counts pads"
    )
    stood = schedule if isinstance(schedule, Mapping) else {}
    step, total = stood.get("last_epoch"), stood.get("T_max")
    if step is not None and (step, total) != (state.step, data.total_steps):
        logger.info(
            f"its schedule stood at step {step} of {total}: its data or settings are others, and "
            "the learning rate is this recipe's for the same epoch"
        )


def take_original_moments(optimizer: torch.optim.Optimizer, training: Mapping[str, Any]) -> bool:
    """Load AdamW's moments of dinov2-gemma's own code, whose one group has ORIGINAL_NAMES' order.

    Returns:
        Whether they fit every parameter of the optimizer.
    """
    ours = optimizer.state_dict()
    moments: dict[int, dict[str, torch.Tensor]] = {}
    try:
        theirs = training["optimizer_state_dict"]["state"]
        by_name = {name: theirs.get(number) for number, name in enumerate(ORIGINAL_NAMES)}
        for group, options in zip(optimizer.param_groups, ours["param_groups"], strict=True):
            members = zip(group["params"], options["params"], options["param_names"], strict=True)
            for parameter, number, name in members:
                found = by_name[name]
                if any(found[key].shape != parameter.shape for key in MOMENTS):
                    return False
                moments[number] = {key: found[key] for key in MOMENTS}
                moments[number]["step"] = torch.as_tensor(found["step"])
    except (KeyError, TypeError, AttributeError):
        return False
    optimizer.load_state_dict({"state": moments, "param_groups": ours["param_groups"]})
    return True
