"""The training loop: prepare, then evaluate, sample, save, step and log, straight down.

What a recipe names under `trainable` is trained, usually the bridge alone. The loss of an optimiser step is the
sum over its supervised tokens divided by their number, whatever the accumulation; where the data order, the
learning rate and the randomness stand is a function of the step, so that a resumed run continues the interrupted
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from vlm_bridge import runtime
from vlm_bridge.configuration import DecodeSettings, Recipe, parse_interval, published_recipe
from vlm_bridge.data_pipeline.data_folder import SplitImages, open_data_folder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import (
    CaptionFormat,
    TokenizedImages,
    in_batches,
    prefetch,
)
from vlm_bridge.errors import CheckpointError, ConfigurationError, TrainingError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.trainable import trained_parameters
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import original_run
from vlm_bridge.training_strategy.changes import dataset_facts
from vlm_bridge.training_strategy.decoded_validation import DecodedValidation, decode_and_score
from vlm_bridge.training_strategy.distillation import check_distillation, distill_projection
from vlm_bridge.training_strategy.distributed import GradientSum, World, joined
from vlm_bridge.training_strategy.early_stopping import EarlyStopping
from vlm_bridge.training_strategy.features import SplitFeatures, split_features, usable_images
from vlm_bridge.training_strategy.health import FrozenParts, StepGuard, all_finite
from vlm_bridge.training_strategy.interruption import BrokenOff, Interruption
from vlm_bridge.training_strategy.monitor import Monitor, Sample, SilentMonitor, StepSize
from vlm_bridge.training_strategy.optimizer import adamw, gradient_scaler
from vlm_bridge.training_strategy.out_of_memory import is_out_of_memory, memory_explained
from vlm_bridge.training_strategy.plan import count_steps, epoch_plan
from vlm_bridge.training_strategy.preflight import check_folders, check_positions, check_resume
from vlm_bridge.training_strategy.randomness import random_states, restore_random_states, seed_all
from vlm_bridge.training_strategy.schedule import learning_rate_at, warmup_within
from vlm_bridge.training_strategy.self_critical import ImageBatch, SelfCritical, load_images
from vlm_bridge.training_strategy.validation import (
    LoadedBatch,
    Validation,
    batch_loss,
    load_batch,
    validate,
)
from vlm_bridge.training_strategy.weight_averaging import WeightAverage

AUTO = "auto"
"""The checkpoint to resume from: the newest sound one in the recipe's ``checkpoint_dir``, if there is one."""
STANDARDIZE_ON_IMAGES = 512
MAX_SKIPPED_STEPS = 10
KEPT_STEP_CHECKPOINTS = 3
RETURN_MEMORY_EVERY = 20
"""Steps on a CPU: what is given back is asked for again in the next one, which takes a tenth of a second."""
Say = Callable[[str], None]


class Interrupted(Exception):
    """Training stopped on a signal after saving; ``exit_code`` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, signal_number: int, saved_to: Path):
        self.exit_code = 128 + signal_number
        self.saved_to = saved_to
        super().__init__(f"interrupted; saved {saved_to}")


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_loss: float = float("inf")
    best_score: float = float("-inf")
    """Of the captions that validation decodes, where the recipe's `monitor` is bleu4 or cider."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, and which therefore changed nothing."""
    owes_decoding: bool = False
    """A signal broke off what a recipe decodes by steps, behind the last step."""


class Found(NamedTuple):
    """A checkpoint to continue: its content, and what has changed since (`check_resume`)."""

    path: Path
    content: dict[str, Any]
    changes: list[str]
    is_other_data: bool


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        checkpoint_dir: where its checkpoints are.
        steps: optimiser steps in all, those before a resume included.
        seconds: of this call.
        best_loss: the lowest validation loss, in nats per token.
        validation: the last one; None if there was none.
        decoded: the scores of the last captions decoded while training; None if there were none.
    """

    checkpoint_dir: Path
    steps: int
    seconds: float
    best_loss: float
    validation: Validation | None
    decoded: DecodedValidation | None


def train(
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    initial_weights: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
    say: Say = print,
) -> TrainingResult:
    """Train what a recipe names under `trainable`.

    Args:
        resume: a checkpoint to continue (its weights, optimiser, position and randomness), a folder of them, or `auto`.
        initial_weights: what a new run starts from instead of the recipe's own start, for some or all of what is
            trained; by a checkpoint's names.
        force: continue although the recipe or the data are others (`changes`).
        say: where console lines go.

    Raises:
        VLMBridgeError: data, models or the checkpoint cannot be used; nothing has been written then.
        Interrupted: a signal came; the state was saved first.
    """
    with joined(recipe.device) as world, memory_explained(recipe, world.device):
        return Trainer(recipe, say, world, resume=resume, force=force).run(initial_weights)


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        say: Say,
        world: World | None = None,
        *,
        resume: str | Path | None = None,
        force: bool = False,
    ):
        self.recipe = recipe
        self.world = world = world or World(runtime.resolve_device(recipe.device))
        self.say = say = say if world.is_first else _say_nothing
        self.device = world.device
        if recipe.autocast_dtype == "float16" and self.device.type != "cuda":
            raise ConfigurationError(
                "amp_dtype=float16 needs a CUDA GPU; use amp_dtype=bfloat16 or float32"
            )
        self.where = str(self.device)
        if self.device.type == "cpu":
            self.where += f" ({runtime.set_threads()} threads)"
            if recipe.autocast_dtype and runtime.cpu_has_bfloat16() is False:
                say("this processor emulates bfloat16: amp_dtype=float32 is quicker here")
        if world.size > 1:
            self.where += f", {world.size} processes"
        places = recipe.keys_marked("place")
        world.check_same(
            {key: value for key, value in recipe.to_dict().items() if key not in places}
        )
        self.folder = open_data_folder(recipe.data_dir, say)
        self.checkpoint_dir = Path(recipe.checkpoint_dir)
        self.found = self._find(resume, force=force)
        world.from_first(lambda: check_folders(recipe))
        check_positions(recipe)

        self.model = build_captioner(recipe).to(self.device)  # type: ignore[arg-type]
        language_model: LanguageModel = self.model.language_model
        if recipe.distillation is not None:
            check_distillation(self.model, recipe)
        log_dir = Path(recipe.log_dir) if world.is_first else None
        with world.first_of_machine_first():
            train_images = usable_images(self.folder, "train", recipe, log_dir)
            self.val_images = usable_images(self.folder, "val", recipe, log_dir)
        if recipe.gradient_checkpointing:
            language_model.checkpoint_activations()
        if recipe.compile:
            if lacking := runtime.missing_compiler(self.device):
                say(f"compile=true has no effect here: {lacking}")
            else:
                language_model.compile_body()
        self.frozen_parts = FrozenParts(self.model, self.model.trained_state_dict())
        format = caption_format(language_model, recipe)
        self.format = format
        self.train_paths = train_images.paths
        self.train_data = TokenizedImages(train_images, format)
        self.val_data = TokenizedImages(self.val_images, format)
        if world.size > 1:
            digests = self.train_data.digest(), self.val_data.digest()
            world.check_same({"data": self.folder.fingerprint, "captions in use": digests})
        self.train_features = self._features("train", train_images)
        self.val_features = self._features("val", self.val_images)

        self.self_critical = None
        if recipe.objective == "scst":
            self.self_critical = SelfCritical(
                self.model, recipe, format, train_images, self._autocast, say
            )

        data = self.train_data
        self.plan = epoch_plan(
            recipe, data.captions_per_image, data.caption_lengths, train_images.shards
        )
        self.total_steps = count_steps(recipe, self.plan)
        self.warmup_steps = warmup_within(recipe.warmup_steps, self.total_steps)
        if self.warmup_steps < recipe.warmup_steps:
            say(
                f"warm-up takes {self.warmup_steps} steps, a tenth of {self.total_steps}, and not "
                f"warmup_steps={recipe.warmup_steps}"
            )

        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.relative_learning_rates = adamw(
            trained_parameters(self.model, recipe.trainable), recipe
        )
        self.add_up_gradients = GradientSum(world, self.parameters)
        self.scaler = gradient_scaler(recipe, self.device)
        self.guard = StepGuard(MAX_SKIPPED_STEPS, self.device)
        self.average: WeightAverage | None = None
        self.early_stopping = EarlyStopping(recipe.early_stopping_patience)
        self.progress = Progress()
        self.decodes = recipe.decoded_images > 0
        self.last_validation: Validation | None = None
        self.last_decoded: DecodedValidation | None = None
        self.decoded_at_step = 0
        self.interruption = Interruption()
        self.saved_at = time.monotonic()
        self.latest_holds: Progress | None = None
        self.last_sound: Path | None = None

    def run(self, initial_weights: Mapping[str, torch.Tensor] | None = None) -> TrainingResult:
        started = time.perf_counter()
        recipe = self.recipe
        running: Mapping[str, Any] = {}
        if self.found is not None:
            running = self._resume(self.found)
            self.found = None  # its tensors are in the model and the optimizer now
        else:
            seed_all(recipe.seed)  # of dropout
            if recipe.start_from is not None:
                self._start_from(recipe.start_from)
            if initial_weights:
                weights = {**self.model.trained_state_dict(), **initial_weights}
                checkpoints.load_weights(self.model, weights, "what training starts from")
            if self.model.feature_scale is not None and recipe.start_from is None:
                self.model.feature_scale.measure(self._sample_features())
            if recipe.distillation is not None:
                distill_projection(
                    self.model, recipe, self.train_features, self.train_paths, self.say
                )
            # Processors differ in how they round: what starts the same stays the same.
            self.world.copy_from_first(list(self.model.trained_state_dict().values()))
        if recipe.weight_averaging is not None and self.average is None:
            self.average = WeightAverage(self.model, recipe.weight_averaging)
        progress = self.progress
        trainable = sum(p.numel() for p in self.parameters)
        total = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"training {trainable:,} of {total:,} parameters ({trainable / total:.1%}) on {len(self.train_data):,} "
            f"images, {self.train_data.num_captions:,} captions; {self.total_steps:,} steps on {self.where}"
        )
        self.monitor = (
            Monitor(Path(recipe.log_dir), self.say) if self.world.is_first else SilentMonitor()
        )
        self.monitor.start(recipe.to_yaml())
        self._continue_running_means(running)
        if self.world.is_first:
            checkpoints.discard_unfinished(self.checkpoint_dir)
        self.model.train()
        self.saved_at = time.monotonic()
        try:
            with self.interruption.watched():
                if progress.owes_decoding:
                    self._after_step()
                while not self._is_finished():
                    for group in self._groups_of_epoch():
                        if progress.step >= self.total_steps:
                            break
                        self._optimizer_step(group)
                        # Before an interruption, or the resumed run would miss what this step asks for.
                        self._after_step()
                        if signal_number := self.world.largest(self.interruption.received):
                            saved_to = self._save_latest()
                            self.world.wait()
                            raise Interrupted(signal_number, saved_to)
                    with self._again_if_broken_off():
                        stops_early = self._finish_epoch()
                    if stops_early:
                        self.say(
                            f"early stopping: no improvement in {recipe.early_stopping_patience} validations"
                        )
                self._save_latest()  # a run that was killed between its last two files lacks this one
                if self.decodes:
                    with self._again_if_broken_off():
                        self._decode_validation(len(self.val_images))
            self.frozen_parts.check(self.model)
        finally:
            self.monitor.close()
        return TrainingResult(
            self.checkpoint_dir,
            progress.step,
            time.perf_counter() - started,
            progress.best_loss,
            self.last_validation,
            self.last_decoded,
        )

    def _is_finished(self) -> bool:
        """Whether nothing is left to train; an epoch whose steps are all taken is still to be judged and saved."""
        if self.progress.step_in_epoch:
            return False
        stops_early = self.early_stopping.is_exhausted
        return stops_early or self.progress.step >= self.total_steps

    def _groups_of_epoch(self) -> Iterator[Sequence[LoadedBatch | ImageBatch]]:
        """The rest of the current epoch: per optimiser step, its micro-batches, already on their way to the device.

        Of several processes each gets its share of the rows of every micro-batch, and none where it has no row.
        """
        batches = self.plan.batches(self.progress.epoch)
        groups = in_batches(range(len(batches)), self.recipe.gradient_accumulation_steps)
        features = self.train_features.in_epoch(self.progress.epoch)

        def load(group: list[int]) -> Sequence[LoadedBatch | ImageBatch]:
            shares = [rows for index in group if (rows := self.world.share(batches[index]))]
            if self.self_critical is not None:
                images = [[row.image for row in rows] for rows in shares]
                return [load_images(some, features, self.device) for some in images]
            packed = [self.train_data.pack(rows) for rows in shares]
            return [load_batch(batch, features, self.device) for batch in packed]

        yield from prefetch(groups[self.progress.step_in_epoch :], load, self.recipe.num_workers)

    def _optimizer_step(self, loaded: Sequence[LoadedBatch | ImageBatch]) -> None:
        """One update. Nothing in it waits for the device, but for the line of a log step and for sampled captions."""
        recipe, progress = self.recipe, self.progress
        learning_rate = self._learning_rate()
        rates = zip(self.optimizer.param_groups, self.relative_learning_rates, strict=True)
        for parameter_group, relative in rates:
            parameter_group["lr"] = learning_rate * relative

        step_loss, size = self._back_propagate(loaded)
        self.add_up_gradients(step_loss)
        self.scaler.unscale_(self.optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters, recipe.gradient_clip_val)
        skipped = self.guard.step(self.optimizer, gradient_norm)
        loss_scale = self.scaler.scale(
            torch.ones_like(step_loss)
        )  # of this step: `update` may change it
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        progress.step += 1
        progress.step_in_epoch += 1
        if self.average is not None:
            self.average.update(progress.step, skipped)
        self.monitor.step(size)
        self.guard.watch(
            (progress.step, progress.epoch, progress.step_in_epoch - 1),
            step_loss,
            gradient_norm,
            loss_scale,
        )
        if self.device.type == "cpu" and progress.step % RETURN_MEMORY_EVERY == 0:
            runtime.return_freed_memory()
        is_log_step = (
            progress.step % recipe.log_every_n_steps == 0 or progress.step == self.total_steps
        )
        skipped_now = self._read_health(wait=is_log_step)
        if is_log_step:
            self._check_weights()
        # In a log step all processes know of the same steps.
        if self.guard.gives_up and (is_log_step or self.world.size == 1):
            self._give_up()
        if is_log_step and progress.step not in skipped_now:
            self.monitor.training(
                step=progress.step,
                total_steps=self.total_steps,
                epoch=progress.epoch,
                loss=step_loss.item(),
                learning_rate=learning_rate,
                gradient_norm=gradient_norm.item(),
                of_objective=self.self_critical.statistics(self.world.sum)
                if self.self_critical is not None
                else {},
            )

    def _back_propagate(
        self, loaded: Sequence[LoadedBatch | ImageBatch]
    ) -> tuple[torch.Tensor, StepSize]:
        """Add up this process's gradients of a step's micro-batches; its part of the loss, and the size of the step."""
        if (
            self.world.size > 1
        ):  # dropout of its own for every process, which continues on any number of them
            torch.manual_seed(seed_of(self.recipe.seed, self.progress.step, self.world.rank))
        group = [self._with_captions(batch, number) for number, batch in enumerate(loaded)]
        size = StepSize(*map(int, self.world.sum(StepSize.of([batch.packed for batch in group]))))
        step_loss = torch.zeros((), device=self.device)
        for batch in group:
            with self._autocast():
                of_batch = batch_loss(self.model, batch, self.recipe.label_smoothing)
                loss = of_batch.total / size.num_supervised
            if self.self_critical is not None:
                self.self_critical.watch(of_batch)
            self.scaler.scale(loss).backward(self.guard.seed(loss))
            step_loss += loss.detach()
        return step_loss, size

    def _read_health(self, *, wait: bool) -> list[int]:
        """Tell and count the steps that are found to have been skipped; return them."""
        arrived = self.guard.read(wait=wait)
        for watched in arrived:
            if not watched.was_skipped:
                self.monitor.updated(watched.loss)
        skipped = [watched for watched in arrived if watched.was_skipped]
        self.progress.skipped_steps += len(skipped)
        for watched in skipped:
            batches = self.plan.batches(watched.epoch)
            groups = in_batches(range(len(batches)), self.recipe.gradient_accumulation_steps)
            rows = [row for index in groups[watched.step_in_epoch] for row in batches[index]]
            self.monitor.skipped(
                watched.step, watched.cause, [self.train_paths[row.image].name for row in rows]
            )
        return [watched.step for watched in skipped]

    def _check_weights(self) -> None:
        """Stop if what is trained is no longer finite, though every gradient was: the update itself overflowed.

        Waits for the device: for log steps and saves alone.

        Raises:
            TrainingError: with the last checkpoint from before; that one stays.
        """
        trained = self.model.trained_state_dict().values()
        averaged = self.average.weights.values() if self.average is not None else ()
        if all_finite([*trained, *averaged]):
            return
        last, rate = self.last_sound, f"a learning_rate below {self.recipe.learning_rate:g}"
        mend = (
            f"resume {last}, the last checkpoint before that, with {rate}"
            if last
            else f"start with {rate}"
        )
        raise TrainingError(
            f"stopped at step {self.progress.step}: the weights are not finite any more, and were not saved: {mend}"
        )

    def _give_up(self) -> NoReturn:
        self._check_weights()
        saved_to = self._save(checkpoints.STEP.format(self.progress.step))
        self.world.wait()
        raise TrainingError(
            f"stopped at step {self.progress.step}: {self.guard.skipped_in_a_row} steps in a row were skipped, since "
            f"their loss or gradient was not finite. {saved_to} has the weights from before them, and older "
            f"checkpoints in {self.checkpoint_dir} are kept: look at the images named above, or resume with a "
            f"learning_rate below {self.recipe.learning_rate:g}"
        )

    def _with_captions(self, batch: LoadedBatch | ImageBatch, number: int) -> LoadedBatch:
        """A batch of the coming step as it is; or, of images alone, with captions that the model samples now."""
        if isinstance(batch, LoadedBatch):
            return batch
        assert self.self_critical is not None, "images come alone where captions are sampled"
        world = self.world
        return self.self_critical.sampled(
            batch, self.progress.step, number * world.size + world.rank
        )

    def _after_step(self) -> None:
        """What a recipe asks for by steps: captions decoded and scored, a checkpoint of this very step."""
        recipe, step = self.recipe, self.progress.step
        validate_every, save_every = map(parse_interval, (recipe.validate_every, recipe.save_every))
        if self.decodes and validate_every.unit == "step" and step % validate_every.count == 0:
            self.progress.owes_decoding = True
            with self._again_if_broken_off():
                decoded = self._decode_validation(recipe.decoded_images)
            self.progress.owes_decoding = False
            if (
                recipe.monitor != "loss"
                and decoded.score(recipe.monitor) > self.progress.best_score
            ):
                self.progress.best_score = decoded.score(recipe.monitor)
                self._save_best()
        if save_every.unit == "step" and step % save_every.count == 0:
            self._save(checkpoints.STEP.format(step))
            if self.world.is_first:
                checkpoints.keep_newest_steps(self.checkpoint_dir, KEPT_STEP_CHECKPOINTS)
        if (
            save_every.unit == "minute"
            and time.monotonic() - self.saved_at >= 60 * save_every.count
        ):
            self._save_latest()

    def _decode_validation(self, num_images: int) -> DecodedValidation:
        """Caption the first validation images as the recipe's `decode` says, and score the captions; once a step."""
        images, step = self.val_images[:num_images], self.progress.step
        if (
            self.last_decoded is None
            or self.decoded_at_step != step
            or self.last_decoded.num_images != len(images)
        ):
            with self._averaged(), self.interruption.may_break_off():
                self.last_decoded = decode_and_score(
                    self.model,
                    self.format.prompt_ids,
                    images,
                    self.val_features,
                    self.recipe.decode,
                    self._autocast,
                    self.world,
                )
            self.decoded_at_step = step
            self.monitor.decoded(step, self.last_decoded)
            self.monitor.restart_clock()
        return self.last_decoded

    def _finish_epoch(self) -> bool:
        """Validate, sample and save as the recipe asks; True when training should stop early."""
        recipe, progress = self.recipe, self.progress
        self._read_health(wait=True)
        self._check_weights()
        self.monitor.epoch(progress.epoch)
        progress.epoch += 1
        progress.step_in_epoch = 0
        is_last = progress.step >= self.total_steps
        stop = improved = False
        validate_every, save_every = map(parse_interval, (recipe.validate_every, recipe.save_every))
        validated = (
            validate_every.unit == "step" or progress.epoch % validate_every.count == 0 or is_last
        )
        if validated:
            with self._averaged(), self.interruption.may_break_off():
                result = validate(
                    self.model,
                    self.val_data,
                    self.val_features,
                    autocast=self._autocast,
                    world=self.world,
                )
            self.last_validation = result
            self.monitor.validation(
                progress.step, progress.epoch - 1, result, self.val_data, is_last=is_last
            )
            improved = recipe.monitor == "loss" and result.loss < progress.best_loss
            progress.best_loss = min(progress.best_loss, result.loss)
            watched = result.loss
            decoded = self._decode_validation(recipe.decoded_images) if self.decodes else None
            if recipe.monitor != "loss" and decoded is not None:
                score = decoded.score(recipe.monitor)
                improved = score > progress.best_score
                progress.best_score = max(progress.best_score, score)
                watched = -score
            stop = self.early_stopping.should_stop(watched)
            if improved:
                self._save_best()
            self._show_samples()
        if validated or save_every.unit != "epoch" or progress.epoch % save_every.count == 0:
            self._save(checkpoints.LATEST)
        self.monitor.restart_clock()
        return stop

    def _show_samples(self) -> None:
        count = min(self.recipe.num_validation_samples, len(self.val_images))
        if not count or not self.world.is_first:
            return
        self.model.eval()
        greedy = DecodeSettings(num_beams=1, max_new_tokens=self.recipe.decode.max_new_tokens)
        features = self.model.features(torch.as_tensor(self.val_features[np.arange(count)]))
        with self._averaged(), self.interruption.may_break_off(), self._autocast():
            captions = self.model.generate(features, self.format.prompt_ids, greedy)
        self.model.train()
        decode = self.model.language_model.decode
        self.monitor.samples(
            self.progress.step,
            [
                Sample(open_image(image.path), ids, decode(ids), image.captions)
                for image, (ids, _) in zip(self.val_images, captions, strict=False)
            ],
        )

    def _learning_rate(self) -> float:
        recipe = self.recipe
        return learning_rate_at(
            self.progress.step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            learning_rate=recipe.learning_rate,
            min_lr=recipe.min_lr,
            kind=recipe.scheduler_type,
        )

    def _averaged(self) -> AbstractContextManager[None]:
        """What is judged, shown and saved: the averaged weights, where the recipe averages them."""
        return self.average.in_model() if self.average is not None else nullcontext()

    def _autocast(self) -> Any:
        return runtime.autocast(self.device, self.recipe.autocast_dtype)

    # Features

    def _features(self, split: str, images: SplitImages) -> SplitFeatures:
        return split_features(self.model.vision_encoder, self.recipe, split, images, self.world)

    def _sample_features(self) -> torch.Tensor:
        """Features of some training images [S, N, D], for the channel statistics."""
        count = min(STANDARDIZE_ON_IMAGES, len(self.train_data))
        chosen = np.sort(
            np.random.default_rng(self.recipe.seed).permutation(len(self.train_data))[:count]
        )
        parts = [
            self.model.features(torch.as_tensor(self.train_features[part])).float().cpu()
            for part in np.array_split(chosen, -(-count // 32))
        ]
        return torch.cat(parts)

    # Checkpoints

    def _save_best(self) -> None:
        # In this order: what a run is resumed from says that all of it was saved.
        self._save(checkpoints.BEST_WEIGHTS)
        self._save(checkpoints.BEST)

    def _save(self, name: str) -> Path:
        self._check_weights()
        path = self.checkpoint_dir / name
        if not self.world.is_first:
            return path
        self._read_health(wait=True)  # it counts into the progress
        weights = self.model.trained_state_dict()
        if self.average is not None:
            weights |= self.average.weights
        training = None
        if name == checkpoints.BEST_WEIGHTS:
            weights = checkpoints.in_bfloat16(weights)
        else:
            training = {
                **self._position(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self._schedule(),
                "scaler": self.scaler.state_dict(),
                "dataset_fingerprint": self.folder.fingerprint,
                "dataset": dataset_facts(self.folder.manifest),
                "data_order": self._data_order(),
            }
            if self.average is not None:
                training["live_weights"] = self.average.live_weights
        sizes = checkpoints.captioner_sizes(self.model)
        checkpoints.save_checkpoint(path, self.recipe, weights, training, sizes=sizes)
        if training is not None:
            self.saved_at = time.monotonic()
            self.last_sound = path
        if name == checkpoints.LATEST:
            self.latest_holds = replace(self.progress)
        return path

    def _save_latest(self) -> Path:
        """Save where the run stands, unless its latest checkpoint says so already."""
        is_saved = self.latest_holds == self.progress
        return (
            self.checkpoint_dir / checkpoints.LATEST if is_saved else self._save(checkpoints.LATEST)
        )

    def _position(self) -> dict[str, Any]:
        """All that a run goes on from besides weights, optimiser and scaler."""
        running = {
            "monitor": self.monitor.state_dict(),
            "skipped_in_a_row": self.guard.skipped_in_a_row,
        }
        if self.self_critical is not None:
            running["self_critical"] = self.self_critical.state_dict()
        return {
            "progress": vars(self.progress).copy(),
            "early_stopping": self.early_stopping.state_dict(),
            "running": running,
            **random_states(self.device),
        }

    def _return_to(self, position: Mapping[str, Any]) -> None:
        vars(self.progress).update(position["progress"])
        self.early_stopping.load_state_dict(position["early_stopping"])
        restore_random_states(position, self.device)

    def _continue_running_means(self, running: Mapping[str, Any]) -> None:
        """What steps before a run was resumed told, and the lines to come tell of; nothing for a new one."""
        if "monitor" in running:
            self.monitor.load_state_dict(running["monitor"])
        if "self_critical" in running and self.self_critical is not None and self.world.is_first:
            self.self_critical.load_state_dict(running["self_critical"])
        self.guard.skipped_in_a_row = running.get("skipped_in_a_row", 0)

    @contextmanager
    def _again_if_broken_off(self) -> Iterator[None]:
        """What a signal breaks off inside this block is saved as never begun: the resumed run does it again."""
        before = self._position()
        try:
            yield
        except BrokenOff:
            self._return_to(before)
            raise Interrupted(self.interruption.received, self._save_latest()) from None

    def _schedule(self) -> dict[str, Any]:
        """All that decides the learning rates besides the step."""
        names = (
            "scheduler_type",
            "learning_rate",
            "min_lr",
            "warmup_steps",
            "trainable",
        )
        return {
            "total_steps": self.total_steps,
            **{name: getattr(self.recipe, name) for name in names},
        }

    def _data_order(self) -> dict[str, int]:
        """All that decides which captions meet in which step."""
        if self.recipe.objective == "scst":
            names = ("batch_size", "scst_samples", "gradient_accumulation_steps", "seed")
        else:
            # Under a budget, where long captions are cut decides as well.
            by = (
                ("batch_size",)
                if self.recipe.tokens_per_batch is None
                else ("tokens_per_batch", "max_caption_tokens")
            )
            names = (*by, "captions_per_image", "gradient_accumulation_steps", "seed")
        if self.recipe.shuffle_buffer:  # checkpoints from before there was one have none
            names = (*names, "shuffle_buffer")
        return {name: getattr(self.recipe, name) for name in names}

    def _start_from(self, path: str | Path) -> None:
        """Take the weights of another run, and nothing else of it."""
        content = self.world.from_first(lambda: checkpoints.load_checkpoint(path))
        checkpoints.restore(self.model, content, path)
        self.say(f"starts from the weights of {checkpoints.checkpoint_path(path)}")

    def _find(self, resume: str | Path | None, *, force: bool) -> Found | None:
        """The checkpoint to continue, which this training can; None for a new run."""
        resume = self.world.from_first(lambda: resume)
        if resume is None:
            if (self.checkpoint_dir / checkpoints.LATEST).is_file():
                self.say(
                    f"{self.checkpoint_dir} holds an earlier run; its checkpoints will be replaced "
                    "(--resume continues it)"
                )
            if (start := self.recipe.start_from) is not None:
                content = self.world.from_first(lambda: checkpoints.load_checkpoint(start))
                checkpoints.check_architecture(content, self.recipe, start)
            return None
        if str(resume) == AUTO:
            found = self.world.from_first(
                lambda: checkpoints.newest_sound(self.checkpoint_dir, self.say)
            )
            if found is None:
                self.say(
                    f"no checkpoint to resume from in {self.checkpoint_dir}: training starts anew"
                )
                return None
        else:
            found = self.world.from_first(lambda: find_run(resume, self.say))
        path, content = found
        changes, other_data = check_resume(
            content, path, self.recipe, self.folder.manifest, force=force
        )
        return Found(path, content, changes, other_data)

    def _resume_original(self, path: Path, content: dict[str, Any]) -> None:
        """Take over the bridge of a run of the original project, its moments and its place where they fit."""
        training = content[checkpoints.ORIGINAL_TRAINING]
        checkpoints.restore(self.model, content, path)
        seed_all(self.recipe.seed)  # of dropout
        place, progress = original_run.position(training), self.progress
        progress.epoch = min(place.epochs, self.recipe.num_epochs)
        groups = [
            -(-self.plan.num_batches(epoch) // self.recipe.gradient_accumulation_steps)
            for epoch in range(progress.epoch)
        ]
        progress.step = min(sum(groups), self.total_steps)
        moments = (
            "its optimizer"
            if original_run.take_moments(self.optimizer, training)
            else "a new optimizer"
        )
        self.say(
            f"resumed {path} of the original project at epoch {progress.epoch + 1}, step {progress.step} of "
            f"{self.total_steps}, with {moments}; its best loss is not taken, for it counts pads"
        )
        if place.step is not None and (place.step, place.total_steps) != (
            progress.step,
            self.total_steps,
        ):
            self.say(
                f"its schedule stood at step {place.step} of {place.total_steps}: its data or settings are others, "
                "and the learning rate is this recipe's for the same epoch"
            )

    def _resume(self, found: Found) -> Mapping[str, Any]:
        """Take over the state of another run; returns its running means."""
        path, content = found.path, found.content
        if checkpoints.ORIGINAL_TRAINING in content:
            self._resume_original(path, content)
            return {}
        training = content["training"]
        if _names_by_group(training["optimizer"]) not in (
            None,
            _names_by_group(self.optimizer.state_dict()),
        ):
            raise CheckpointError(
                f"{path} has its optimiser's state for other groups of parameters: keep the patterns under trainable "
                "in their order (their learning rates may change)"
            )
        try:
            self._take_state(content, path)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path} has a state that no training saves ({type(error).__name__}): train on from its weights with "
                f"start_from={path}"
            ) from error
        self.last_sound = path
        if path.resolve() == (self.checkpoint_dir / checkpoints.LATEST).resolve():
            self.latest_holds = replace(self.progress)
        self.say(f"resumed {path} at step {self.progress.step} of {self.total_steps}")
        self._tell_changes(content, found.changes, found.is_other_data)
        return training.get("running", {})

    def _take_state(self, content: Mapping[str, Any], path: Path) -> None:
        """Put a checkpoint's weights, moments, place and randomness into this training."""
        training = content["training"]
        checkpoints.restore(self.model, dict(content), path)
        if self.recipe.weight_averaging is not None:
            self.average = WeightAverage(self.model, self.recipe.weight_averaging)
        if live := training.get("live_weights"):
            if not all_finite(live.values()):
                raise ValueError("its live weights are not finite")
            checkpoints.load_weights(self.model, {**self.model.trained_state_dict(), **live}, path)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        self.early_stopping.load_state_dict(training["early_stopping"])
        restore_random_states(training, self.device)
        progress = Progress(**training["progress"])
        places = (progress.step, progress.epoch, progress.step_in_epoch)
        if not all(type(place) is int and place >= 0 for place in places):
            raise ValueError(f"it stands at {places}")
        self.progress = progress

    def _tell_changes(
        self, content: Mapping[str, Any], changes: Sequence[str], is_other_data: bool
    ) -> None:
        """Say what keeps a resumed run from being what the interrupted one would have been."""
        for change in changes:
            self.say(f"changed by --force: {change}")
        training = content["training"]
        if self.progress.step_in_epoch and (
            is_other_data or training["data_order"] != self._data_order()
        ):
            self.say(
                "the rest of this epoch is of another order: some captions come twice in it, others not at all"
            )
        has, needs = content.get("versions", {}), checkpoints.package_versions()
        if others := [
            f"{name} {needs[name]}, was {has[name]}"
            for name in needs
            if has.get(name, needs[name]) != needs[name]
        ]:
            self.say(f"other versions may round otherwise: {', '.join(others)}")
        before, now = training.get("scheduler", {}), self._schedule()
        if changed := [
            f"{key}={now[key]}, not {value}"
            for key, value in before.items()
            if now.get(key, value) != value
        ]:
            self.say(
                f"the learning rate follows another schedule from here on: {', '.join(changed)}"
            )
        if self._is_finished():
            self.say("nothing is left to train")


def seed_of(seed: int, step: int, number: int) -> int:
    """A seed for one of several streams of random numbers in a step."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


def _say_nothing(line: str) -> None:
    """No-op for ranks above 0."""


def _names_by_group(optimizer_state: dict[str, Any]) -> list[list[str]] | None:
    """The parameters of each group, whose state is kept by number; None where an earlier version wrote no names."""
    groups = optimizer_state["param_groups"]
    return [group["param_names"] for group in groups] if "param_names" in groups[0] else None


def caption_format(language_model: LanguageModel, recipe: Recipe) -> CaptionFormat:
    """How this language model's captions become tokens; they are cut where its positions end, too."""
    assert language_model.start_id is not None and language_model.eos_id is not None
    format = CaptionFormat(
        language_model.encode_all,
        start_id=language_model.start_id,
        eos_id=language_model.eos_id,
        prompt=recipe.language_model.prompt,
        max_caption_tokens=recipe.max_caption_tokens,
    )
    if (positions := language_model.max_positions) is None:
        return format
    # The last target is predicted and never read.
    room = positions - len(format.prompt_ids) + 1
    return replace(format, max_caption_tokens=min(format.max_caption_tokens, room))


def find_run(path: str | Path, say: Say) -> tuple[Path, dict[str, Any]]:
    """A checkpoint and its content; of a folder (a run's, or its `checkpoints`) the newest sound one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and (found := checkpoints.newest_sound(folder, say)) is not None:
            return found
    path = checkpoints.checkpoint_path(path)
    return path, checkpoints.load_checkpoint(path)


def resumed_recipe(path: str | Path, say: Say = print) -> Recipe:
    """The recipe of the run that ``path`` continues; of the original project's, its settings over training-default."""
    _, content = find_run(path, _say_nothing)
    if "recipe" not in content and checkpoints.ORIGINAL_TRAINING in content:
        settings = content[checkpoints.ORIGINAL_TRAINING].get("config") or {}
        recipe = published_recipe(settings, str(path))
    else:
        recipe = checkpoints.recipe_of(content, path)
    return recipe.replace(resume_from_checkpoint=str(path))
