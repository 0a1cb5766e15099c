"""Log a training: console lines, TensorBoard, and one JSON line per event for reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_bridge.data_pipeline.loader import TokenizedImages
from vlm_bridge.durable_files import append_line
from vlm_bridge.errors import TrainingError
from vlm_bridge.metrics import simple_tokenize
from vlm_bridge.training_strategy.step import StepSize
from vlm_bridge.training_strategy.validation import DecodedValidation, Validation

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 8
"""Images of a skipped step on the console."""
BLIND_VALIDATIONS = 3
"""Validations in a row with a visual gain below `BLIND_BELOW` before a warning."""


@dataclass(frozen=True)
class Sample:
    """A generated caption with its image and references. ``token_ids`` are without prompt and EOS."""

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


@dataclass
class _Running:
    """Sums since the last log line and since the start of the epoch, kept in checkpoints."""

    seconds: float = 0.0
    steps: float = 0
    captions: float = 0
    tokens: float = 0
    positions: float = 0
    blind_validations: float = 0
    epoch_loss: float = 0.0
    epoch_steps: float = 0


class SilentMonitor:
    """No-op monitor for ranks above 0."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        del state


class Monitor:
    """Log to ``log_dir/history.jsonl``, to TensorBoard and to the console.

    TensorBoard's tags are those of the dinov2-gemma system's own code, with others beside them.

    Raises:
        TrainingError: from any method, where a log cannot be written.
    """

    def __init__(self, log_dir: Path, recipe_yaml: str):
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir = log_dir
        self.history = log_dir / "history.jsonl"
        self.running = _Running()
        self.restart_clock()
        self._board: Any = self._written(lambda: SummaryWriter(str(log_dir)))
        text = f"```yaml\n{recipe_yaml}```"
        self._written(lambda: self._board.add_text("training/config", text, 0))

    def step(self, size: StepSize) -> None:
        """Count an optimizer step of all processes."""
        self.running.steps += 1
        self.running.captions += size.num_captions
        self.running.tokens += size.num_tokens
        self.running.positions += size.num_positions

    def updated(self, loss: float) -> None:
        """Count the loss of a step into the mean of its epoch."""
        self.running.epoch_loss += loss
        self.running.epoch_steps += 1

    def epoch(self, epoch: int) -> None:
        """Log the mean loss of an epoch's steps."""
        if self.running.epoch_steps:
            mean = self.running.epoch_loss / self.running.epoch_steps
            self._scalars({"epoch/train_loss": mean}, epoch)
        self.running.epoch_loss = self.running.epoch_steps = 0

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
        sums = self.running
        seconds = max(time.perf_counter() - self._started, 1e-9)
        ms_per_step = 1000 * seconds / max(sums.steps, 1)
        padding_share = 1 - sums.tokens / max(sums.positions, 1)
        eta = _duration((total_steps - step) * ms_per_step / 1000)
        others = "".join(f"{k.replace('_', ' ')} {v:.3f} | " for k, v in of_objective.items())
        logger.info(
            f"epoch {epoch + 1} step {step}/{total_steps} | loss {loss:.4f} | {others}"
            f"lr {learning_rate:.2e} | grad {gradient_norm:.2f} | {ms_per_step:.0f} ms/step | "
            f"{sums.captions / seconds:.1f} samples/s | {sums.tokens / seconds:.0f} tokens/s | "
            f"{padding_share:.0%} pads | ETA {eta}"
        )
        scalars = {"loss": loss, "learning_rate": learning_rate, **of_objective}
        tags = {f"train/{name}": value for name, value in scalars.items()}
        self._scalars({**tags, "train/grad_norm_before_clip": gradient_norm}, step)
        self._record(
            "train",
            step,
            **scalars,
            gradient_norm=gradient_norm,
            samples_per_second=sums.captions / seconds,
            tokens_per_second=sums.tokens / seconds,
            padding_share=padding_share,
        )
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
        """Log a validation of some human captions."""
        logger.info(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity "
            f"{result.perplexity:.2f} | visual gain {result.visual_gain:+.3f} nats/token"
        )
        blind = self.running.blind_validations + 1 if result.ignores_images else 0
        self.running.blind_validations = blind
        if blind == BLIND_VALIDATIONS:
            logger.warning(
                f"WARNING: the captioner is ignoring the image: after {BLIND_VALIDATIONS} validations "
                f"in a row its visual gain is {result.visual_gain:+.3f} nats per token, captions come "
                "out the same for every image. Train longer, raise learning_rate, or check that "
                "captions and images belong together (vlm-data inspect-loader)."
            )
        elif is_last and 0 < blind < BLIND_VALIDATIONS:
            logger.info(
                f"after these {step} steps the captioner does not look at its images yet (visual gain "
                f"{result.visual_gain:+.3f} nats per token): train longer"
            )
        scalars = {
            "loss": result.loss, "perplexity": result.perplexity, "visual_gain": result.visual_gain,
        }  # fmt: skip
        tags = {f"val/{name}": value for name, value in scalars.items()}
        tags["val/avg_sequence_length"] = captions.mean_length
        tags["val/token_diversity"] = captions.token_diversity
        self._scalars(tags, step)
        self._record("validation", step, epoch=epoch, **scalars)

    def decoded(self, step: int, result: DecodedValidation) -> None:
        logger.info(
            f"step {step} captions of {result.num_images} images | BLEU-4 {result.bleu4:.4f} | "
            f"CIDEr {result.cider:.4f}"
        )
        self._scalars({"val/bleu4": result.bleu4, "val/cider": result.cider}, step)
        values = {"bleu4": result.bleu4, "cider": result.cider, "num_images": result.num_images}
        self._record("decoded", step, **values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log captions beside their images and references, and their `sample_statistics`."""
        statistics = sample_statistics(samples)
        for number, (sample, bleu4) in enumerate(zip(samples, statistics.bleu4, strict=True)):
            caption, reference = sample.caption, sample.references[0]
            logger.info(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            tag, pixels = f"val/sample_{number}", np.asarray(sample.image)
            text = f"**{caption}**\n\nreference: {reference}\n\nBLEU-4: {bleu4:.4f}"
            self._written(lambda: self._board.add_image(tag, pixels, step, dataformats="HWC"))  # noqa: B023
            self._written(lambda: self._board.add_text(tag, text, step))  # noqa: B023
        means = {
            "length_avg": statistics.mean_length,
            "diversity": statistics.token_diversity,
            "bleu_avg": statistics.mean_bleu4,
        }
        self._scalars({f"val/sample_{name}": value for name, value in means.items()}, step)
        logger.info(
            f"  samples: mean length {statistics.mean_length:.1f} tokens | token diversity "
            f"{statistics.token_diversity:.2f} | BLEU-4 {statistics.mean_bleu4:.3f}"
        )
        self._record(
            "samples",
            step,
            captions=[[sample.caption, sample.references[0]] for sample in samples],
            mean_length=statistics.mean_length,
            token_diversity=statistics.token_diversity,
            sample_bleu4=statistics.mean_bleu4,
        )

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._started = time.perf_counter()
        sums = self.running
        sums.steps = sums.captions = sums.tokens = sums.positions = 0

    def state_dict(self) -> dict[str, float]:
        self.running.seconds = time.perf_counter() - self._started
        return vars(self.running).copy()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        names = {f.name for f in fields(_Running)}
        self.running = _Running(**{k: v for k, v in state.items() if k in names})
        self._started = time.perf_counter() - self.running.seconds

    def close(self) -> None:
        self._written(self._board.close)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._written(lambda: self._board.add_scalar(tag, value, step))  # noqa: B023

    def _record(self, event: str, step: int, **values: object) -> None:
        line = json.dumps({"event": event, "step": step, **values}) + "\n"
        self._written(lambda: append_line(self.history, line.encode()))

    def _written(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.log_dir}: {error.strerror or error} (free some space, or choose "
                "another folder with log_dir=...)"
            ) from error


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
