"""Log a training: console lines, TensorBoard, and one JSON line per event for reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.errors import TrainingError
from vlm_bridge.files import append_line
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.training_strategy.step import StepSize
from vlm_bridge.training_strategy.validation import DecodedValidation, Validation

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 8  # of a skipped step, on the console
BLIND_VALIDATIONS = 3  # in a row with a visual gain below BLIND_BELOW before a warning


@dataclass(frozen=True)
class Sample:
    """A generated caption with its image and references; tokens are without prompt and EOS."""

    image: Image.Image
    token_ids: Sequence[int]
    caption: str
    references: Sequence[str]


@dataclass(frozen=True)
class SampleStatistics:
    """Statistics of a few generated captions.

    Attributes:
        mean_length: tokens per caption.
        token_diversity: distinct tokens over all tokens; 0 without tokens.
        bleu4: BLEU-4 of each caption as a fraction, with simple tokens: not comparable with papers.
    """

    mean_length: float
    token_diversity: float
    bleu4: list[float]

    @property
    def mean_bleu4(self) -> float:
        return float(np.mean(self.bleu4))


def sample_statistics(samples: Sequence[Sample]) -> SampleStatistics:
    """Compute length, diversity and BLEU-4 of at least one caption."""
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


class Monitor:
    """Log to the console and, in the first process, to ``log_dir/history.jsonl`` and TensorBoard.

    TensorBoard's tags are those of the dinov2-gemma system's own code, with others beside them.

    Args:
        log_dir: None logs to the console only.

    Raises:
        TrainingError: from any method, where a log cannot be written.
    """

    def __init__(self, log_dir: Path | None):
        self.log_dir = log_dir
        # Since the last log line, and since the start of the epoch.
        self.steps = self.captions = self.tokens = self.positions = 0
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

    def step(self, size: StepSize) -> None:
        """Count an optimizer step of all processes."""
        self.steps += 1
        self.captions += size.num_captions
        self.tokens += size.num_tokens
        self.positions += size.num_positions

    def updated(self, loss: float) -> None:
        """Count the loss of a step into the mean of its epoch."""
        self.epoch_loss += loss
        self.epoch_steps += 1

    def epoch(self, epoch: int) -> None:
        """Log the mean loss of an epoch's steps."""
        if self.epoch_steps:
            self._scalars({"epoch/train_loss": self.epoch_loss / self.epoch_steps}, epoch)
        self.epoch_loss, self.epoch_steps = 0.0, 0

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
        """Log a step. ``of_objective``: further means by name."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        ms_per_step = 1000 * seconds / max(self.steps, 1)
        rates = {
            "samples_per_second": self.captions / seconds,
            "tokens_per_second": self.tokens / seconds,
            "padding_share": 1 - self.tokens / max(self.positions, 1),
        }
        eta = _duration((total_steps - step) * ms_per_step / 1000)
        others = "".join(f"{k.replace('_', ' ')} {v:.3f} | " for k, v in of_objective.items())
        logger.info(
            f"epoch {epoch + 1} step {step}/{total_steps} | loss {loss:.4f} | {others}"
            f"lr {learning_rate:.2e} | grad {gradient_norm:.2f} | {ms_per_step:.0f} ms/step | "
            f"{rates['samples_per_second']:.1f} samples/s | "
            f"{rates['tokens_per_second']:.0f} tokens/s | {rates['padding_share']:.0%} pads | "
            f"ETA {eta}"
        )
        scalars = {"loss": loss, "learning_rate": learning_rate, **of_objective}
        tags = {f"train/{name}": value for name, value in scalars.items()}
        self._scalars({**tags, "train/grad_norm_before_clip": gradient_norm}, step)
        self._record("train", step, **scalars, gradient_norm=gradient_norm, **rates)
        self.restart_clock()

    def skipped(self, step: int, cause: str, images: Sequence[str]) -> None:
        """Log a step that changed nothing, with the ids of its images."""
        others = len(images) - SHOWN_IMAGES
        shown = ", ".join(images[:SHOWN_IMAGES]) + (f" and {others} more" if others > 0 else "")
        logger.warning(f"step {step} skipped: {cause} | images {shown}")
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
        """Log a validation on human ``captions``, and warn where images are ignored."""
        gain = f"{result.visual_gain:+.3f} nats"
        logger.info(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity "
            f"{result.perplexity:.2f} | visual gain {gain}/token"
        )
        self.blind_validations = self.blind_validations + 1 if result.ignores_images else 0
        if self.blind_validations == BLIND_VALIDATIONS:
            logger.warning(
                f"WARNING: the captioner is ignoring the image: after {BLIND_VALIDATIONS} "
                f"validations in a row its visual gain is {gain} per token, captions come out the "
                "same for every image. Train longer, raise learning_rate, or check that captions "
                "and images belong together (vlm-data inspect-loader)."
            )
        elif is_last and 0 < self.blind_validations < BLIND_VALIDATIONS:
            logger.info(
                f"after these {step} steps the captioner does not look at its images yet "
                f"(visual gain {gain} per token): train longer"
            )
        names = ("loss", "perplexity", "visual_gain")
        scalars = {name: getattr(result, name) for name in names}
        counted = {
            "avg_sequence_length": captions.mean_length,
            "token_diversity": captions.token_diversity,
        }
        self._scalars({f"val/{name}": value for name, value in (scalars | counted).items()}, step)
        self._record("validation", step, epoch=epoch, **scalars)

    def decoded(self, step: int, result: DecodedValidation) -> None:
        """Log scores of decoded captions."""
        logger.info(
            f"step {step} captions of {result.num_images} images | BLEU-4 {result.bleu4:.4f} | "
            f"CIDEr {result.cider:.4f}"
        )
        self._scalars({"val/bleu4": result.bleu4, "val/cider": result.cider}, step)
        self._record("decoded", step, **vars(result))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log captions beside their images and references, and their `sample_statistics`."""
        statistics = sample_statistics(samples)
        for number, (sample, bleu4) in enumerate(zip(samples, statistics.bleu4, strict=True)):
            caption, reference = sample.caption, sample.references[0]
            logger.info(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            if self._board is not None:
                tag, pixels = f"val/sample_{number}", np.asarray(sample.image)
                text = f"**{caption}**\n\nreference: {reference}\n\nBLEU-4: {bleu4:.4f}"
                with self._writing():
                    self._board.add_image(tag, pixels, step, dataformats="HWC")
                    self._board.add_text(tag, text, step)
        length, diversity = statistics.mean_length, statistics.token_diversity
        bleu = statistics.mean_bleu4
        means = {"length_avg": length, "diversity": diversity, "bleu_avg": bleu}
        self._scalars({f"val/sample_{name}": value for name, value in means.items()}, step)
        logger.info(
            f"  samples: mean length {length:.1f} tokens | token diversity {diversity:.2f} | "
            f"BLEU-4 {bleu:.3f}"
        )
        captions = [[sample.caption, sample.references[0]] for sample in samples]
        numbers = {"mean_length": length, "token_diversity": diversity, "sample_bleu4": bleu}
        self._record("samples", step, captions=captions, **numbers)

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._started = time.perf_counter()
        self.steps = self.captions = self.tokens = self.positions = 0

    def state_dict(self) -> dict[str, float]:
        names = (
            "steps", "captions", "tokens", "positions", "epoch_loss", "epoch_steps",
            "blind_validations",
        )  # fmt: skip
        seconds = time.perf_counter() - self._started
        return {"seconds": seconds, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        for name in self.state_dict().keys() & state.keys() - {"seconds"}:
            setattr(self, name, state[name])
        self._started = time.perf_counter() - state["seconds"]

    def close(self) -> None:
        if self._board is not None:
            with self._writing():
                self._board.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            with self._writing():
                for tag, value in values.items():
                    self._board.add_scalar(tag, value, step)

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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
