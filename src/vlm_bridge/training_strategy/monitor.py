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

from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.errors import TrainingError
from vlm_bridge.files import append_line
from vlm_bridge.training_strategy.step import StepResult
from vlm_bridge.training_strategy.validation import Sample, Validation, scores_of

logger = logging.getLogger(__name__)

BLIND_BELOW = 0.05  # nats per token of visual gain


class Monitor:
    """Log to the console and, below ``log_dir``, to ``history.jsonl`` and TensorBoard.

    TensorBoard's tags are those of the dinov2-gemma system's own code, with others beside them.
    Any method raises TrainingError where a log cannot be written.

    Args:
        log_dir: None, in all processes but the first, logs to the console only.
    """

    def __init__(self, log_dir: Path | None, recipe_yaml: str, total_steps: int):
        self.log_dir, self.total_steps = log_dir, total_steps
        self._board: Any = None
        self.restart_clock()
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._writing():
                self._board = SummaryWriter(str(log_dir))
                self._board.add_text("training/config", f"```yaml\n{recipe_yaml}```", 0)

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._started, self._counts = time.perf_counter(), []

    def step(self, result: StepResult) -> None:
        """Count a step, and log it if it changed nothing."""
        self._counts.append(result.counts)
        if result.was_skipped:
            cause = f"loss {result.loss:g}, gradient norm {result.gradient_norm:g}"
            logger.warning(f"step {result.step} skipped: {cause}")
            self._record("skipped", result.step, cause=cause)

    def training(self, epoch: int, result: StepResult, statistics: Mapping[str, float]) -> None:
        """Log a step, the throughput since the last one, and ``statistics`` of the objective."""
        step, _, rate, loss, norm = result
        seconds = max(time.perf_counter() - self._started, 1e-9)
        _, captions, tokens, positions = map(sum, zip(*self._counts, strict=True))
        per_step, pads = seconds / len(self._counts), 1 - tokens / positions
        seconds_left = per_step * (self.total_steps - step)
        logger.info(
            f"epoch {epoch + 1} step {step}/{self.total_steps} | loss {loss:.4f} | "
            + "".join(f"{name} {mean:.3f} | " for name, mean in statistics.items())
            + f"lr {rate:.2e} | grad {norm:.2f} | {1000 * per_step:.0f} ms/step | "
            f"{captions / seconds:.1f} samples/s | {tokens / seconds:.0f} tokens/s | "
            f"{pads:.0%} pads | ETA {timedelta(seconds=round(seconds_left))}"
        )
        means = {"loss": loss, "learning_rate": rate, **statistics}
        self._scalars(step, "train/", **means, grad_norm_before_clip=norm)
        self._record(
            "train", step, **means, gradient_norm=norm, padding_share=pads,
            samples_per_second=captions / seconds, tokens_per_second=tokens / seconds,
        )  # fmt: skip
        self.restart_clock()

    def epoch(self, epoch: int, train_loss: float) -> None:
        """Log the mean loss of an epoch's steps."""
        self._scalars(epoch, "epoch/", train_loss=train_loss)

    def validation(
        self, step: int, epoch: int, result: Validation, captions: TokenizedImages
    ) -> None:
        """Log a validation on human ``captions``, and warn where images are ignored."""
        logger.info(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity "
            f"{result.perplexity:.2f} | visual gain {result.visual_gain:+.3f} nats/token"
        )
        if result.visual_gain < BLIND_BELOW:
            logger.warning(
                "the captioner ignores the image so far: if this stays, train longer, or check "
                "that captions and images belong together (vlm-data inspect-loader)"
            )
        values = {name: getattr(result, name) for name in ("loss", "perplexity", "visual_gain")}
        length, diversity = captions.mean_length, captions.token_diversity
        self._scalars(step, "val/", **values, avg_sequence_length=length, token_diversity=diversity)
        self._record("validation", step, epoch=epoch, **values)

    def decoded(self, step: int, num_images: int, scores: Mapping[str, float]) -> None:
        """Log scores of decoded captions."""
        bleu, cider = scores["bleu4"], scores["cider"]
        captions = f"step {step} captions of {num_images} images"
        logger.info(f"{captions} | BLEU-4 {bleu:.4f} | CIDEr {cider:.4f}")
        self._scalars(step, "val/", **scores)
        self._record("decoded", step, **scores, num_images=num_images)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log captions beside their images and references."""
        for number, (image, _, caption) in enumerate(samples):
            reference = image.captions[0]
            logger.info(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            if self._board is not None:
                tag, pixels = f"val/sample_{number}", np.asarray(open_image(image.path))
                with self._writing():
                    self._board.add_image(tag, pixels, step, dataformats="HWC")
                    self._board.add_text(tag, f"**{caption}**\n\nreference: {reference}", step)
        tokens = [token for sample in samples for token in sample.token_ids]
        length, diversity = len(tokens) / len(samples), len(set(tokens)) / max(len(tokens), 1)
        bleu = scores_of(samples)["bleu4"]
        self._scalars(step, "val/sample_", length_avg=length, diversity=diversity, bleu_avg=bleu)
        captions = [[sample.caption, sample.image.captions[0]] for sample in samples]
        self._record(
            "samples", step, captions=captions, mean_length=length, token_diversity=diversity,
            sample_bleu4=bleu,
        )  # fmt: skip

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
