"""Find a checkpoint to continue, and continue from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_bridge.configuration import Recipe, published_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import original_run
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.out_of_memory import is_out_of_memory
from vlm_bridge.training_strategy.preflight import check_resume
from vlm_bridge.training_strategy.state import TrainState, seed_all

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Resume the newest sound checkpoint in the recipe's ``checkpoint_dir``, if there is one."""


class Found(NamedTuple):
    """A checkpoint to continue, and the changes since (`check_resume`)."""

    path: Path
    content: dict[str, Any]
    changes: Sequence[str]
    is_other_data: bool


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

    Raises:
        CheckpointError: there is none, it is damaged, or (without ``force``) of another training.
    """
    folder = Path(recipe.checkpoint_dir)
    resume = world.from_first(lambda: resume)
    if resume is None:
        if (folder / checkpoints.LATEST).is_file():
            logger.info(
                f"{folder} holds an earlier run; its checkpoints will be replaced (--resume continues it)"
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
    path, content = found
    changes, other_data = check_resume(content, path, recipe, manifest, force=force)
    return Found(path, content, changes, other_data)


def resumed_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a run; of dinov2-gemma's own code, its settings over training-default."""
    _, content = find_run(path)
    if "recipe" not in content and checkpoints.ORIGINAL_TRAINING in content:
        settings = content[checkpoints.ORIGINAL_TRAINING].get("config") or {}
        recipe = published_recipe(settings, str(path))
    else:
        recipe = checkpoints.recipe_of(content, path)
    return recipe.replace(resume_from_checkpoint=str(path))


def continue_from(found: Found, state: TrainState, data: TrainingData) -> None:
    """Load a checkpoint into the state of a training.

    Raises:
        CheckpointError: its optimizer has other groups, or it holds no state of a training.
    """
    path, content = found.path, found.content
    checkpoints.restore(state.model, content, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        _continue_original(path, content, state, data)
        return
    training = content["training"]
    if _names_by_group(training["optimizer"]) not in (
        None,
        _names_by_group(state.optimizer.state_dict()),
    ):
        raise CheckpointError(
            f"{path} has its optimizer's state for other groups of parameters: keep the patterns under "
            "trainable in their order (their learning rates may change)"
        )
    try:
        if state.average is not None:
            state.average.restart()
        state.load_state_dict(training, path)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} has a state that no training saves ({type(error).__name__}): train on from its "
            f"weights with start_from={path}"
        ) from error
    logger.info(f"resumed {path} at step {state.step} of {data.total_steps}")
    for change in found.changes:
        logger.info(f"changed by --force: {change}")
    if state.step_in_epoch and (found.is_other_data or training["data_order"] != data.order()):
        logger.info(
            "the rest of this epoch is of another order: some captions come twice in it, others not at all"
        )
    has, needs = content.get("versions", {}), checkpoints.package_versions()
    if others := [
        f"{k} {needs[k]}, was {has[k]}" for k in needs if has.get(k, needs[k]) != needs[k]
    ]:
        logger.info(f"other versions may round otherwise: {', '.join(others)}")
    before, now = training.get("scheduler", {}), schedule_facts(data.recipe, data.total_steps)
    if changed := [
        f"{key}={now[key]}, not {value}"
        for key, value in before.items()
        if now.get(key, value) != value
    ]:
        logger.info(
            f"the learning rate follows another schedule from here on: {', '.join(changed)}"
        )


def schedule_facts(recipe: Recipe, total_steps: int) -> dict[str, Any]:
    """Return the settings that decide the learning rate of a step."""
    names = ("scheduler_type", "learning_rate", "min_lr", "warmup_steps", "trainable")
    return {"total_steps": total_steps, **{name: getattr(recipe, name) for name in names}}


def _continue_original(
    path: Path, content: Mapping[str, Any], state: TrainState, data: TrainingData
) -> None:
    """Continue a run of dinov2-gemma's own code: moments and position where they fit."""
    training = content[checkpoints.ORIGINAL_TRAINING]
    seed_all(data.recipe.seed)  # of dropout
    place = original_run.position(training)
    state.epoch = min(place.epochs, data.recipe.num_epochs)
    steps = sum(data.steps_in_epoch(epoch) for epoch in range(state.epoch))
    state.step = state.validated_step = min(steps, data.total_steps)
    taken = original_run.take_moments(state.optimizer, training)
    logger.info(
        f"resumed {path} of the original project at epoch {state.epoch + 1}, step {state.step} of "
        f"{data.total_steps}, with {'its optimizer' if taken else 'a new optimizer'}; its best loss is "
        "not taken, for it counts pads"
    )
    if place.step is not None and (place.step, place.total_steps) != (state.step, data.total_steps):
        logger.info(
            f"its schedule stood at step {place.step} of {place.total_steps}: its data or settings are "
            "others, and the learning rate is this recipe's for the same epoch"
        )


def _names_by_group(optimizer_state: dict[str, Any]) -> list[list[str]] | None:
    """Return parameter names of each group; None where an early version wrote no names."""
    groups = optimizer_state["param_groups"]
    return [group["param_names"] for group in groups] if "param_names" in groups[0] else None
