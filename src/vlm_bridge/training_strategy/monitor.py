"""Log a training: console lines, TensorBoard, and one JSON line per event for reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.errors import TrainingError
from vlm_bridge.files import append_line
from vlm_bridge.training_strategy.step import StepSize
from vlm_bridge.training_strategy.validation import (
    DecodedValidation,
    Sample,
    SampleStatistics,
    Validation,
)

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 8  # of a skipped step, on the console
BLIND_VALIDATIONS = 3  # in a row with a visual gain below BLIND_BELOW before a warning
KEPT = ("epoch_loss", "epoch_steps", "blind_validations")


class Monitor:
    """Log to the console and, below ``log_dir``, to ``history.jsonl`` and TensorBoard.

    TensorBoard's tags are those of the dinov2-gemma system's own code, with others beside them.
    Any method raises TrainingError where a log cannot be written.

    Args:
        log_dir: None, in all processes but the first, logs to the console only.
    """

    def __init__(self, log_dir: Path | None):
        self.log_dir = log_dir
        self.epoch_loss, self.epoch_steps, self.blind_validations = 0.0, 0, 0
        self._board: Any = None
        self.restart_clock()

    def start(self, recipe_yaml: str) -> None:
        """Open TensorBoard's file and log the recipe."""
        if self.log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._writing():
                self._board = SummaryWriter(str(self.log_dir))
                self._board.add_text("training/config", f"```yaml\n{recipe_yaml}```", 0)

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._started, self._sizes = time.perf_counter(), []

    def step(self, size: StepSize) -> None:
        """Count an optimizer step of all processes."""
        self._sizes.append(size)

    def updated(self, loss: float) -> None:
        """Count the loss of a step into the mean of its epoch."""
        self.epoch_loss += loss
        self.epoch_steps += 1

    def epoch(self, epoch: int) -> None:
        """Log the mean loss of an epoch's steps."""
        if self.epoch_steps:
            self._scalars(epoch, "epoch/", train_loss=self.epoch_loss / self.epoch_steps)
        self.epoch_loss, self.epoch_steps = 0.0, 0

    def training(
        self, step: int, total_steps: int, epoch: int, gradient_norm: float, **means: float
    ) -> None:
        """Log a step. ``means``: loss, learning rate and what the objective adds."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        _, captions, tokens, positions = map(sum, zip(*self._sizes, strict=True))
        per_step, pads = seconds / len(self._sizes), 1 - tokens / positions
        others = {k: v for k, v in means.items() if k not in ("loss", "learning_rate")}
        logger.info(
            f"epoch {epoch + 1} step {step}/{total_steps} | loss {means['loss']:.4f} | "
            + "".join(f"{name.replace('_', ' ')} {mean:.3f} | " for name, mean in others.items())
            + f"lr {means['learning_rate']:.2e} | grad {gradient_norm:.2f} | "
            f"{1000 * per_step:.0f} ms/step | {captions / seconds:.1f} samples/s | "
            f"{tokens / seconds:.0f} tokens/s | {pads:.0%} pads | "
            f"ETA {timedelta(seconds=round((total_steps - step) * per_step))}"
        )
        self._scalars(step, "train/", **means, grad_norm_before_clip=gradient_norm)
        self._record(
            "train", step, **means, gradient_norm=gradient_norm, padding_share=pads,
            samples_per_second=captions / seconds, tokens_per_second=tokens / seconds,
        )  # fmt: skip
        self.restart_clock()

    def skipped(self, step: int, cause: str, images: Sequence[str]) -> None:
        """Log a step that changed nothing, with the names of its images."""
        others = len(images) - SHOWN_IMAGES
        shown = ", ".join(images[:SHOWN_IMAGES]) + (f" and {others} more" if others > 0 else "")
        logger.warning(f"step {step} skipped: {cause} | images {shown}")
        self._record("skipped", step, cause=cause, images=list(images))

    def validation(
        self, step: int, epoch: int, result: Validation, captions: TokenizedImages
    ) -> None:
        """Log a validation on human ``captions``, and warn where images are ignored."""
        gain = f"{result.visual_gain:+.3f} nats"
        logger.info(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity "
            f"{result.perplexity:.2f} | visual gain {gain}/token"
        )
        self.blind_validations = self.blind_validations + 1 if result.ignores_images else 0
        if self.blind_validations == BLIND_VALIDATIONS:
            logger.warning(
                f"WARNING: the captioner is ignoring the image: in {BLIND_VALIDATIONS} validations "
                f"in a row its visual gain is {gain} per token. Train longer, raise learning_rate, "
                "or check that captions and images belong together (vlm-data inspect-loader)."
            )
        scalars = {name: getattr(result, name) for name in ("loss", "perplexity", "visual_gain")}
        length, diversity = captions.mean_length, captions.token_diversity
        self._scalars(
            step, "val/", **scalars, avg_sequence_length=length, token_diversity=diversity
        )
        self._record("validation", step, epoch=epoch, **scalars)

    def decoded(self, step: int, result: DecodedValidation) -> None:
        """Log scores of decoded captions."""
        logger.info(
            f"step {step} captions of {result.num_images} images | BLEU-4 {result.bleu4:.4f} | "
            f"CIDEr {result.cider:.4f}"
        )
        self._scalars(step, "val/", bleu4=result.bleu4, cider=result.cider)
        self._record("decoded", step, **vars(result))

    def samples(self, step: int, samples: Sequence[Sample], statistics: SampleStatistics) -> None:
        """Log captions beside their images and references."""
        for number, (sample, bleu4) in enumerate(zip(samples, statistics.bleu4, strict=True)):
            caption, reference = sample.caption, sample.references[0]
            logger.info(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            if self._board is not None:
                tag, pixels = f"val/sample_{number}", np.asarray(sample.image)
                text = f"**{caption}**\n\nreference: {reference}\n\nBLEU-4: {bleu4:.4f}"
                with self._writing():
                    self._board.add_image(tag, pixels, step, dataformats="HWC")
                    self._board.add_text(tag, text, step)
        length, diversity, _ = statistics
        bleu = statistics.mean_bleu4
        logger.info(
            f"  samples: mean length {length:.1f} tokens | token diversity {diversity:.2f} | "
            f"BLEU-4 {bleu:.3f}"
        )
        self._scalars(step, "val/sample_", length_avg=length, diversity=diversity, bleu_avg=bleu)
        captions = [[sample.caption, sample.references[0]] for sample in samples]
        self._record(
            "samples", step, captions=captions, mean_length=length, token_diversity=diversity,
            sample_bleu4=bleu,
        )  # fmt: skip

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        for name in state.keys() & set(KEPT):
            setattr(self, name, state[name])

    def close(self) -> None:
        if self._board is not None:
            with self._writing():
                self._board.close()

    def _scalars(self, step: int, prefix: str, **values: float) -> None:
        if self._board is not None:
            with self._writing():
                for name, value in values.items():
                    self._board.add_scalar(prefix + name, value, step)

    def _record(self, event: str, step: int, **values: object) -> None:
        if self.log_dir is not None:
            line = json.dumps({"event": event, "step": step, **values}) + "\n"
            with self._writing():
                append_line(self.log_dir / "history.jsonl", line.encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.log_dir}: {error.strerror or error} (free some space, or "
                "choose another folder with log_dir=...)"
            ) from error
