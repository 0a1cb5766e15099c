"""Find a checkpoint to continue, refuse one of another training, and continue from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_bridge.configuration import Recipe, flat, published_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats.dinov2_gemma import ORIGINAL_NAMES
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.state import TrainState, seed_all

logger = logging.getLogger(__name__)

AUTO = "auto"  # the newest sound checkpoint in the recipe's checkpoint_dir, if there is one
DATASET_FACTS = ("source", "counts", "split_rule", "seed", "settings", "fingerprint")


class Found(NamedTuple):
    """A checkpoint to continue, with the changes of recipe and data since."""

    path: Path
    content: dict[str, Any]
    changes: Sequence[str] = ()


def find_run(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint and its content; of a folder, the newest sound one."""
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
        CheckpointError: there is none, it is damaged, or (without ``force``) its recipe or the
            data that ``manifest`` describes have changed.
    """
    folder = Path(recipe.checkpoint_dir)
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
    path, content = found
    checkpoints.check_architecture(content, recipe, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        return Found(path, content)
    if (training := content.get("training")) is None:
        raise CheckpointError(
            f"{path} holds weights only; resume from {checkpoints.LATEST} or {checkpoints.BEST}, "
            f"or train on from these weights with start_from={path}"
        )
    before = training.get("dataset", {"fingerprint": training["dataset_fingerprint"]})
    of_recipe = recipe.changes_since(checkpoints.recipe_of(content, path, to_build=False))
    changes = dataset_changes(before, dataset_facts(manifest)) + of_recipe
    if changes and not force:
        raise CheckpointError(
            f"{path} is of a training with other settings: {'; '.join(changes)} (go back to what "
            "it was, or continue all the same with --force)"
        )
    return Found(path, content, changes)


def dataset_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a caption folder that a checkpoint holds, with dotted keys."""
    return flat({key: manifest[key] for key in DATASET_FACTS if key in manifest})


def dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two `dataset_facts`; none where the fingerprints are equal."""
    if before["fingerprint"] == now["fingerprint"]:
        return []
    return [
        f"data {key}={now.get(key, 'nothing')}, was {value}"
        for key, value in before.items()
        if key not in now or now[key] != value
    ]


def resumed_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a run; dinov2-gemma's own settings go over training-default."""
    _, content = find_run(path)
    if "recipe" in content:
        recipe = checkpoints.recipe_of(content, path)
    else:
        settings = content[checkpoints.ORIGINAL_TRAINING].get("config") or {}
        recipe = published_recipe(settings, str(path))
    return recipe.replace(resume_from_checkpoint=str(path))


def continue_from(found: Found, state: TrainState, data: TrainingData) -> None:
    """Load a checkpoint into the state of a training. Raises CheckpointError."""
    path, content, changes = found
    checkpoints.restore(state.model, content, path)
    if checkpoints.ORIGINAL_TRAINING in content:
        _continue_original(path, content[checkpoints.ORIGINAL_TRAINING], state, data)
        return
    training = content["training"]
    try:
        before = [group.get("param_names") for group in training["optimizer"]["param_groups"]]
        now = [group["param_names"] for group in state.optimizer.state_dict()["param_groups"]]
        if before[0] is not None and before != now:  # an early version wrote no names
            raise CheckpointError(
                f"{path} has its optimizer's state for other groups of parameters: keep the "
                "patterns under trainable in their order (their learning rates may change)"
            )
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
    for change in changes:
        logger.info(f"changed by --force: {change}")
    was, versions = content.get("versions", {}), checkpoints.package_versions()
    if others := [f"{k}={v}, was {was[k]}" for k, v in versions.items() if was.get(k, v) != v]:
        logger.info(f"other versions may round otherwise: {', '.join(others)}")


def _continue_original(
    path: Path, training: Mapping[str, Any], state: TrainState, data: TrainingData
) -> None:
    """Continue a run of dinov2-gemma's own code: moments where they fit, and the epoch."""
    seed_all(data.recipe.seed)  # of dropout
    epochs = training.get("epoch")
    state.epoch = min(epochs if type(epochs) is int else 0, data.recipe.num_epochs)
    steps = sum(data.steps_in_epoch(epoch) for epoch in range(state.epoch))
    state.step = state.validated_step = min(steps, data.total_steps)
    taken = take_original_moments(state.optimizer, training)
    logger.info(
        f"resumed {path} of the original project at epoch {state.epoch + 1}, step {state.step} of "
        f"{data.total_steps}, with {'its optimizer' if taken else 'a new optimizer'}; its best "
        "loss is not taken, for it counts pads"
    )


def take_original_moments(optimizer: torch.optim.Optimizer, training: Mapping[str, Any]) -> bool:
    """Load AdamW's moments of dinov2-gemma's own code, in ORIGINAL_NAMES' order, if they fit."""
    ours = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in ours["param_groups"] for name in group["param_names"]]
    try:
        theirs = training["optimizer_state_dict"]["state"]
        by_name = {name: theirs[number] for number, name in enumerate(ORIGINAL_NAMES)}
        moments = {}
        for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            exp_avg, exp_avg_sq = (by_name[name][key] for key in ("exp_avg", "exp_avg_sq"))
            if not exp_avg.shape == exp_avg_sq.shape == parameter.shape:
                return False
            step = torch.as_tensor(by_name[name]["step"])
            moments[number] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    except (KeyError, TypeError, AttributeError):
        return False
    optimizer.load_state_dict({"state": moments, "param_groups": ours["param_groups"]})
    return True
