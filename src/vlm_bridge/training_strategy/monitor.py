"""What a training tells the world: console lines, TensorBoard, and one JSON line per event for reports."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_bridge.data_pipeline.loader import PackedBatch, TokenizedImages
from vlm_bridge.durable_files import append_line
from vlm_bridge.errors import TrainingError
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.training_strategy.decoded_validation import DecodedValidation
from vlm_bridge.training_strategy.validation import Validation

SHOWN_IMAGES = 8
"""Images of a skipped step that the console names."""

EVENTS = "events.out.tfevents.*"
"""Names of TensorBoard's files."""
BLIND_VALIDATIONS = 3
"""Validations in a row with a visual gain below `BLIND_BELOW` before a warning: the first ones of a training may be."""


@dataclass(frozen=True)
class Sample:
    """A caption generated while training, and what people wrote. ``token_ids`` are without prompt and EOS."""

    picture: Image.Image
    token_ids: Sequence[int]
    caption: str
    references: Sequence[str]


@dataclass(frozen=True)
class SampleStatistics:
    """What a few captions say about all: too long, all the same, or near what people write.

    Attributes:
        mean_length: tokens per caption.
        token_diversity: distinct tokens over all tokens, of all captions together; 0 when there are none.
        bleu4: BLEU-4 of each caption against its references, as a fraction. By pycocoevalcap on tokens of a
            simple rule (`simple_tokenize`), so that no Java runs in training: not comparable with papers.
    """

    mean_length: float
    token_diversity: float
    bleu4: list[float]

    @property
    def mean_bleu4(self) -> float:
        return float(np.mean(self.bleu4))


def sample_statistics(samples: Sequence[Sample]) -> SampleStatistics:
    """Length, diversity and BLEU-4 of generated captions; at least one."""
    from pycocoevalcap.bleu.bleu import Bleu

    token_ids = list(chain.from_iterable(sample.token_ids for sample in samples))
    references = {i: simple_tokenize(sample.references) for i, sample in enumerate(samples)}
    captions = {i: simple_tokenize([sample.caption]) for i, sample in enumerate(samples)}
    _, by_caption = Bleu(4).compute_score(references, captions, verbose=0)
    return SampleStatistics(
        mean_length=len(token_ids) / len(samples),
        token_diversity=len(set(token_ids)) / max(len(token_ids), 1),
        bleu4=[float(score) for score in by_caption[3]],
    )


class StepSize(NamedTuple):
    """What an optimiser step reads; positions are tokens and pads."""

    num_supervised: int
    num_captions: int
    num_tokens: int
    num_positions: int

    @classmethod
    def of(cls, batches: Sequence[PackedBatch]) -> StepSize:
        """Of batches together, or of none."""
        return cls(*(sum(getattr(batch, name) for batch in batches) for name in cls._fields))


class Curves:
    """TensorBoard's events in a folder; its `SummaryWriter` with failures of the disk as one TrainingError.

    The writer's thread fails without a word to who is writing, and prints a traceback.
    """

    def __init__(self, log_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir = log_dir
        self._others_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._failure: OSError | None = None
        self._before = set(log_dir.glob(EVENTS))
        self._threads: set[threading.Thread] = set()
        threads = set(threading.enumerate())
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(log_dir))
            self._threads = set(threading.enumerate()) - threads
        except OSError as error:
            threading.excepthook = self._others_hook
            self._remove_empty()
            raise cannot_log(log_dir, error) from error

    def __getattr__(self, name: str) -> Callable[..., None]:
        """`add_scalar`, `add_text` and `add_image` of the writer."""
        add = getattr(self._writer, name)

        def written(*arguments: Any, **named: Any) -> None:
            try:
                add(*arguments, **named)
            except OSError as error:
                self._failure = error
            self._raise_failure()

        return written

    def close(self) -> None:
        """Write what waits. Raises TrainingError, unless the failure is known already."""
        was_known = self._failure is not None
        try:
            self._writer.close()
        except OSError as error:
            self._failure = error
        finally:
            threading.excepthook = self._others_hook
            self._remove_empty()
        if not was_known:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise cannot_log(self.log_dir, self._failure) from self._failure

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, OSError) and failed.thread in self._threads:
            self._failure = failed.exc_value
        else:
            self._others_hook(failed)

    def _remove_empty(self) -> None:
        for events in set(self.log_dir.glob(EVENTS)) - self._before:
            if not events.stat().st_size:
                events.unlink(missing_ok=True)


def cannot_log(path: Path, error: OSError) -> TrainingError:
    """The error of a log that cannot be written."""
    return TrainingError(
        f"cannot write {path}: {error.strerror or error} (free some space, or choose another folder with log_dir=...)"
    )


class SilentMonitor:
    """That of a process beside the one that writes and speaks: told what a `Monitor` is told, it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


class Monitor:
    """Writes ``log_dir/history.jsonl`` and TensorBoard events; prints through ``say``.

    TensorBoard's tags are those of the dinov2-gemma system's own code, and others beside them.
    """

    def __init__(self, log_dir: Path, say: Callable[[str], None]):
        self.curves = Curves(log_dir)
        self.history = log_dir / "history.jsonl"
        self.say = say
        self._blind_validations = 0
        self._epoch_loss = self._epoch_steps = 0.0
        self.restart_clock()

    def start(self, recipe: str) -> None:
        """Keep the text of the recipe beside the curves."""
        self.curves.add_text("training/config", f"```yaml\n{recipe}```", 0)

    def updated(self, loss: float) -> None:
        """Count the loss of a step that was not skipped into the mean of its epoch."""
        self._epoch_loss += loss
        self._epoch_steps += 1

    def epoch(self, epoch: int) -> None:
        """Write the mean loss of an epoch's steps, and begin another."""
        if self._epoch_steps:
            self.curves.add_scalar("epoch/train_loss", self._epoch_loss / self._epoch_steps, epoch)
        self._epoch_loss = self._epoch_steps = 0.0

    def step(self, size: StepSize) -> None:
        """Count one optimiser step of all processes for the throughput of the next `training` line."""
        self._window_steps += 1
        self._window_captions += size.num_captions
        self._window_tokens += size.num_tokens
        self._window_positions += size.num_positions

    def training(
        self,
        *,
        step: int,
        total_steps: int,
        epoch: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        of_objective: Mapping[str, float],
    ) -> None:
        """A log step. ``of_objective``: what else its objective has to tell, by name."""
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        ms_per_step = 1000 * seconds / max(self._window_steps, 1)
        captions_rate, tokens_rate = self._window_captions / seconds, self._window_tokens / seconds
        padding_share = 1 - self._window_tokens / max(self._window_positions, 1)
        eta = _duration((total_steps - step) * ms_per_step / 1000)
        others = "".join(
            f"{name.replace('_', ' ')} {value:.3f} | " for name, value in of_objective.items()
        )
        self.say(
            f"epoch {epoch + 1} step {step}/{total_steps} | loss {loss:.4f} | {others}lr {learning_rate:.2e} | "
            f"grad {gradient_norm:.2f} | {ms_per_step:.0f} ms/step | {captions_rate:.1f} samples/s | "
            f"{tokens_rate:.0f} tokens/s | {padding_share:.0%} pads | ETA {eta}"
        )
        for name, value in (
            ("loss", loss),
            ("learning_rate", learning_rate),
            ("grad_norm_before_clip", gradient_norm),
            *of_objective.items(),
        ):
            self.curves.add_scalar(f"train/{name}", value, step)
        self._record(
            "train",
            step,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            samples_per_second=captions_rate,
            tokens_per_second=tokens_rate,
            padding_share=padding_share,
            **of_objective,
        )
        self.restart_clock()

    def skipped(self, step: int, cause: str, images: Sequence[str]) -> None:
        """A step that changed nothing, and the ids of its images: all of them in the history, a few on the console."""
        others = len(images) - SHOWN_IMAGES
        shown = ", ".join(images[:SHOWN_IMAGES]) + (f" and {others} more" if others > 0 else "")
        self.say(f"step {step} skipped: {cause} | images {shown}")
        self._record("skipped", step, cause=cause, images=list(images))

    def validation(
        self,
        step: int,
        epoch: int,
        result: Validation,
        captions: TokenizedImages,
        *,
        is_last: bool = False,
    ) -> None:
        """Log a validation. ``captions``: those of people that it read, whose tokens are counted."""
        self.say(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity {result.perplexity:.2f} | "
            f"visual gain {result.visual_gain:+.3f} nats/token"
        )
        self._blind_validations = self._blind_validations + 1 if result.ignores_images else 0
        if self._blind_validations == BLIND_VALIDATIONS:
            self.say(
                f"WARNING: the captioner is ignoring the image: after {BLIND_VALIDATIONS} validations in a row its "
                f"visual gain is {result.visual_gain:+.3f} nats per token, captions come out the same for every "
                "image. Train longer, raise learning_rate, or check that captions and images belong together "
                "(vlm-data inspect-loader)."
            )
        elif (
            is_last and 0 < self._blind_validations < BLIND_VALIDATIONS
        ):  # too few to call it a fault
            self.say(
                f"after these {step} steps the captioner does not look at its images yet (visual gain "
                f"{result.visual_gain:+.3f} nats per token): train longer"
            )
        scalars = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "visual_gain": result.visual_gain,
        }
        counted = {
            "avg_sequence_length": captions.mean_length,
            "token_diversity": captions.token_diversity,
        }
        for name, value in (scalars | counted).items():
            self.curves.add_scalar(f"val/{name}", value, step)
        self._record("validation", step, epoch=epoch, **scalars)

    def decoded(self, step: int, result: DecodedValidation) -> None:
        self.say(
            f"step {step} captions of {result.num_images} images | BLEU-4 {result.bleu4:.4f} | CIDEr {result.cider:.4f}"
        )
        for name, value in (("bleu4", result.bleu4), ("cider", result.cider)):
            self.curves.add_scalar(f"val/{name}", value, step)
        self._record(
            "decoded", step, bleu4=result.bleu4, cider=result.cider, num_images=result.num_images
        )

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show captions beside their pictures and references, and what `sample_statistics` says of them."""
        statistics = sample_statistics(samples)
        for number, (sample, bleu4) in enumerate(zip(samples, statistics.bleu4, strict=True)):
            caption, reference = sample.caption, sample.references[0]
            self.say(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            self.curves.add_image(
                f"val/sample_{number}", np.asarray(sample.picture), step, dataformats="HWC"
            )
            text = f"**{caption}**\n\nreference: {reference}\n\nBLEU-4: {bleu4:.4f}"
            self.curves.add_text(f"val/sample_{number}", text, step)
        for name, value in (
            ("length_avg", statistics.mean_length),
            ("diversity", statistics.token_diversity),
            ("bleu_avg", statistics.mean_bleu4),
        ):
            self.curves.add_scalar(f"val/sample_{name}", value, step)
        self.say(
            f"  samples: mean length {statistics.mean_length:.1f} tokens | token diversity "
            f"{statistics.token_diversity:.2f} | BLEU-4 {statistics.mean_bleu4:.3f}"
        )
        captions = [[sample.caption, sample.references[0]] for sample in samples]
        self._record(
            "samples",
            step,
            captions=captions,
            mean_length=statistics.mean_length,
            token_diversity=statistics.token_diversity,
            sample_bleu4=statistics.mean_bleu4,
        )

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._window_start = time.perf_counter()
        self._window_steps = self._window_captions = self._window_tokens = (
            self._window_positions
        ) = 0

    def state_dict(self) -> dict[str, float]:
        """What the lines to come tell of the steps behind; part of every checkpoint."""
        return {
            "seconds": time.perf_counter() - self._window_start,
            "steps": self._window_steps,
            "captions": self._window_captions,
            "tokens": self._window_tokens,
            "positions": self._window_positions,
            "blind_validations": self._blind_validations,
            "epoch_loss": self._epoch_loss,
            "epoch_steps": self._epoch_steps,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._window_start = time.perf_counter() - state["seconds"]
        self._window_steps = int(state["steps"])
        self._window_captions = int(state["captions"])
        self._window_tokens = int(state["tokens"])
        self._window_positions = int(state["positions"])
        self._blind_validations = int(state["blind_validations"])
        self._epoch_loss = state.get(
            "epoch_loss", 0.0
        )  # checkpoints from before it was kept have none
        self._epoch_steps = state.get("epoch_steps", 0.0)

    def close(self) -> None:
        self.curves.close()

    def _record(self, event: str, step: int, **values: object) -> None:
        line = json.dumps({"event": event, "step": step, **values}) + "\n"
        try:
            append_line(self.history, line.encode())
        except OSError as error:
            raise cannot_log(self.history, error) from error


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
