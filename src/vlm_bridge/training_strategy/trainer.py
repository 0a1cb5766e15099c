"""The training loop: step, log, save and validate, read from top to bottom in `train`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vlm_bridge import device
from vlm_bridge.configuration import Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.errors import TrainingError
from vlm_bridge.model_architecture.captioner import (
    CaptionModel,
    build_captioner,
    trained_parameters,
)
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import (
    World,
    check_folders,
    check_machine,
    joined,
    memory_explained,
)
from vlm_bridge.training_strategy.monitor import Monitor
from vlm_bridge.training_strategy.objectives import OBJECTIVES
from vlm_bridge.training_strategy.resume import (
    Found,
    Interrupted,
    Interruption,
    Saver,
    continue_from,
    find_checkpoint,
)
from vlm_bridge.training_strategy.state import TrainState, WeightAverage
from vlm_bridge.training_strategy.step import StepResult, TrainStep, adamw
from vlm_bridge.training_strategy.validation import Validation, Validator

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
FEW_IMAGES = 500
MIN_LOGGED_STEPS = 10  # however short a run is


@dataclass(frozen=True)
class TrainingResult:
    """End of a run."""

    checkpoint_dir: Path
    steps: int  # in all, with those before a resume
    seconds: float  # of this call
    best_loss: float  # of validation, in nats per token
    validation: Validation | None  # the last one
    decoded: dict[str, float] | None  # `bleu4` and `cider` of the last decoded captions


def train(
    recipe: Recipe | str | Path,
    *,
    resume: str | Path | None = None,
    initial_weights: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingResult:
    """Train the parameters that a recipe names under `trainable`.

    Raises VLMBridgeError before anything is written, and Interrupted after the state was saved.

    Args:
        recipe: a recipe, its file, or the name of one that ships.
        resume: a checkpoint to continue, a folder of them, or `auto`.
        initial_weights: start of some or all trained weights of a new run, by name.
        force: continue although recipe or data have changed.
        progress: called after each step with the steps done and all steps.
    """
    started, recipe = time.perf_counter(), Recipe.load(recipe)
    with joined(recipe.device) as world, memory_explained(world.device):
        check_machine(recipe, world)
        folder = open_data_folder(recipe.data_dir)
        found = find_checkpoint(resume, recipe, folder.fingerprint, world, force=force)
        places = {"checkpoint_dir": recipe.checkpoint_dir, "log_dir": recipe.log_dir}
        world.from_first(lambda: check_folders(**places))
        model = prepare_model(recipe, world)
        data = TrainingData.open(folder, model, recipe, world)
        autocast = partial(device.autocast, world.device, recipe.autocast_dtype)
        objective = OBJECTIVES[recipe.objective](model, recipe, data.format, data.train, autocast)
        optimizer, rates = adamw(trained_parameters(model, recipe.trained), recipe)
        scaler = torch.GradScaler(world.device.type, enabled=recipe.amp_dtype == "float16")
        state = TrainState(model, optimizer, scaler, WeightAverage(model, recipe.weight_averaging))
        start(state, data, initial_weights, found)
        take_step = TrainStep(
            state, objective, recipe, world,
            total_steps=data.total_steps, relative_rates=rates, autocast=autocast,
        )  # fmt: skip
        saver = Saver(state, recipe, world, folder.fingerprint)
        log_dir = Path(recipe.log_dir) if world.is_first else None
        monitor = Monitor(log_dir, recipe.to_yaml(), data.total_steps)
        with closing(monitor), Interruption().watched() as interruption:
            validator = Validator(state, data, monitor, saver, autocast)
            log_start(data, validator)
            model.train()
            validator.validate_if_due()  # a resumed run stopped before it was done
            while not validator.is_finished:
                steps = data.steps_in_epoch(state.epoch)
                for batches in data.steps(objective.load, state.epoch, state.step_in_epoch):
                    result = take_step(batches, steps)
                    log_step(result, take_step, monitor, saver)
                    progress(state.step, data.total_steps)
                    saver.after_step()
                    validator.validate_if_due()
                    if signal_number := max(world.gather(interruption.received)):
                        raise Interrupted(signal_number, saver.latest())
                    if validator.is_finished:
                        break
        last = state.best_loss, validator.validation, validator.decoded
        return TrainingResult(saver.folder, state.step, time.perf_counter() - started, *last)


def prepare_model(recipe: Recipe, world: World) -> CaptionModel:
    """Build the captioner on the device, with gradient checkpointing and compilation as asked."""
    model = build_captioner(recipe).to(world.device)
    if recipe.gradient_checkpointing:
        model.language_model.checkpoint_activations()
    if recipe.compile and device.has_compiler():
        model.language_model.compile_body()
    elif recipe.compile:
        logger.info("compile=true has no effect here: there is no C++ compiler (g++, clang++)")
    return model


def start(
    state: TrainState,
    data: TrainingData,
    initial_weights: Mapping[str, torch.Tensor] | None,
    found: Found | None,
) -> None:
    """Continue the run found, or initialize a new one: seed, weights, facts of the features."""
    if found is not None:
        continue_from(found, state, data)
        return
    recipe, model, world = data.recipe, state.model, data.world
    torch.manual_seed(recipe.seed)  # of dropout
    if (path := recipe.start_from) is not None:
        content = world.from_first(lambda: checkpoints.load_checkpoint(path))
        checkpoints.restore(model, content, path, is_start=True)
        logger.info(f"starts from the weights of {checkpoints.checkpoint_path(path)}")
    elif (count := len(data.train.images)) < FEW_IMAGES and not initial_weights:
        logger.warning(
            f"{count} images are few to train a bridge from nothing: vlm-bridge finetune IMAGES "
            "--output-dir FOLDER (or start_from=bundled) begins with a trained one"
        )
    if initial_weights:
        weights = {**model.trained_state_dict(), **initial_weights}
        checkpoints.load_weights(model, weights, "what training starts from")
    is_new = model.feature_scale is not None and recipe.start_from is None
    if is_new or model.familiarity is not None:
        features_bnd = data.sample_features(model)
        if model.feature_scale is not None and is_new:
            model.feature_scale.measure(features_bnd)
        if model.familiarity is not None:
            model.familiarity.remember(model.bridge_features(features_bnd))
    # Processors differ in how they round.
    world.copy_from_first(list(model.trained_state_dict().values()))
    state.average.restart()


def log_start(data: TrainingData, validator: Validator) -> None:
    if validator.is_finished and not validator.is_due:
        logger.info("nothing is left to train")
    parameters = list(validator.state.model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    processes = f", {data.world.size} processes" if data.world.size > 1 else ""
    logger.info(
        f"training {trained:,} of {total:,} parameters ({trained / total:.1%}) on "
        f"{len(data.train.images):,} images, {data.train.captions.num_captions:,} captions; "
        f"{data.total_steps:,} steps on {data.world.device}{processes}"
    )


def log_step(result: StepResult, take_step: TrainStep, monitor: Monitor, saver: Saver) -> None:
    """Log what the recipe asks for. Raises TrainingError where too many steps were skipped."""
    state, recipe, world = take_step.state, take_step.recipe, take_step.world
    is_last = state.step == take_step.total_steps
    monitor.step(result)
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        saved_to = saver.step()
        world.wait()
        raise TrainingError(
            f"stopped at step {state.step}: {state.skipped_in_a_row} steps in a row were skipped, "
            f"since their loss or gradient was not finite. {saved_to} has the weights from before "
            f"them: resume with a learning_rate below {recipe.learning_rate:g}"
        )
    log_every = max(1, min(recipe.log_every_n_steps, take_step.total_steps // MIN_LOGGED_STEPS))
    if state.step == 1 or state.step % log_every == 0 or is_last:
        statistics = take_step.objective.statistics(world.sum)
        if not result.was_skipped:
            monitor.training(state.last_epoch, result, statistics)
    if state.step_in_epoch == 0 or is_last:
        if state.epoch_steps:
            monitor.epoch(state.last_epoch, state.epoch_loss / state.epoch_steps)
        state.epoch_loss, state.epoch_steps = 0.0, 0
