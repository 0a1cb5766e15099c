"""What a training tells the world: console lines, TensorBoard, and one JSON line per event for reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_bridge.training_strategy.validation import Validation


class Monitor:
    """Writes ``log_dir/history.jsonl`` and TensorBoard events; prints through ``say``."""

    def __init__(self, log_dir: Path, say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        log_dir.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(log_dir))
        self.history = (log_dir / "history.jsonl").open("a", encoding="utf-8")
        self.say = say
        self._window_start = time.perf_counter()
        self._window_captions = 0
        self._window_steps = 0

    def step(self, num_captions: int) -> None:
        """Count one optimiser step for the throughput of the next `training` line."""
        self._window_captions += num_captions
        self._window_steps += 1

    def training(
        self,
        *,
        step: int,
        total_steps: int,
        epoch: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
    ) -> None:
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        ms_per_step = 1000 * seconds / max(self._window_steps, 1)
        rate = self._window_captions / seconds
        eta = _duration((total_steps - step) * ms_per_step / 1000)
        self.say(
            f"epoch {epoch + 1} step {step}/{total_steps} | loss {loss:.4f} | lr {learning_rate:.2e} | "
            f"grad {gradient_norm:.2f} | {ms_per_step:.0f} ms/step | {rate:.1f} samples/s | ETA {eta}"
        )
        for name, value in (
            ("loss", loss),
            ("learning_rate", learning_rate),
            ("gradient_norm", gradient_norm),
        ):
            self.writer.add_scalar(f"train/{name}", value, step)
        self._record(
            "train",
            step,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            samples_per_second=rate,
        )
        self.restart_clock()

    def validation(self, step: int, epoch: int, result: Validation) -> None:
        self.say(
            f"epoch {epoch + 1} validation | loss {result.loss:.4f} | perplexity {result.perplexity:.2f} | "
            f"visual gain {result.visual_gain:+.3f} nats/token"
        )
        if result.ignores_images:
            self.say(
                f"WARNING: the captioner is ignoring the image: its visual gain is {result.visual_gain:+.3f} nats per "
                "token, captions come out the same for every picture. Train longer, raise learning_rate, or check "
                "that captions and pictures belong together (vlm-data inspect-loader)."
            )
        scalars = {"loss": result.loss, "perplexity": result.perplexity, "visual_gain": result.visual_gain}
        for name, value in scalars.items():
            self.writer.add_scalar(f"validation/{name}", value, step)
        self._record("validation", step, epoch=epoch, **scalars)

    def samples(self, step: int, pictures: Sequence[tuple[Image.Image, str, str]]) -> None:
        """Show (picture, generated caption, reference) triples."""
        for number, (picture, caption, reference) in enumerate(pictures):
            self.say(f"  sample {number + 1}: {caption!r}  (reference: {reference!r})")
            self.writer.add_image(f"samples/{number}", np.asarray(picture), step, dataformats="HWC")
            self.writer.add_text(f"samples/{number}", f"**{caption}**\n\nreference: {reference}", step)
        self._record("samples", step, captions=[[caption, reference] for _, caption, reference in pictures])

    def restart_clock(self) -> None:
        """Leave validation, saving and sampling out of the next throughput."""
        self._window_start = time.perf_counter()
        self._window_captions = self._window_steps = 0

    def close(self) -> None:
        self.writer.close()
        self.history.close()

    def _record(self, event: str, step: int, **values: object) -> None:
        self.history.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self.history.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
