"""Captions of an evaluation with their scores, and ``predictions.jsonl``, a JSON line per image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.images import MAX_FILE_BYTES
from vlm_bridge.data_pipeline.samples import CaptionedImage, TarImage
from vlm_bridge.errors import DataError
from vlm_bridge.files import write_atomically

PREDICTIONS_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Caption of an image with its scores.

    Attributes:
        caption: empty after an error, and scored as such.
        log_probability: mean per token, in nats.
        finished: the caption ended before the longest length allowed; None where that is unknown.
    """

    image: CaptionedImage
    caption: str
    log_probability: float | None
    error: str | None
    scores: Mapping[str, float]
    finished: bool | None = None

    @property
    def cider(self) -> float:
        return self.scores["CIDEr"]

    def to_record(self) -> dict[str, Any]:
        path = self.image.path
        record: dict[str, Any] = {"image": str(path)}
        if isinstance(path, TarImage):
            record["tar"] = {"file": str(path.file), "offset": path.offset, "size": path.size}
        return record | {
            "original_id": self.image.original_id,
            "caption": self.caption,
            "log_probability": self.log_probability,
            "references": list(self.image.captions),
            "finished": self.finished,
            "scores": dict(self.scores),
            **({"error": self.error} if self.error else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prediction:
        """Read `to_record`; ValueError, KeyError or TypeError where it is damaged."""
        path = Path(record["image"])
        if place := record.get("tar"):
            offset, size = place["offset"], place["size"]
            if not (type(offset) is type(size) is int and offset >= 0 <= size <= MAX_FILE_BYTES):
                raise ValueError("no place in a tar")
            member = record["image"].removeprefix(f"{place['file']}/")
            path = TarImage(Path(place["file"]), offset, size, member)
        image = CaptionedImage(path, tuple(record["references"]), record["original_id"])
        scores = record["scores"]
        if not image.captions or "CIDEr" not in scores:
            raise ValueError("no references, or no CIDEr")
        log_probability, error = record["log_probability"], record.get("error")
        return cls(image, record["caption"], log_probability, error, scores, record.get("finished"))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions. Raises OSError."""
    lines = [json.dumps(prediction.to_record(), ensure_ascii=False) for prediction in predictions]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions; empty where there is no file.

    Raises:
        DataError: a line is damaged.
    """
    predictions = []
    # Captions may hold other ends of lines.
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            predictions += [Prediction.from_record(json.loads(line))] if line else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number} is not a prediction: evaluate again ({error!r})"
            ) from error
    return predictions
