"""Captions of an evaluation with their scores, and ``predictions.jsonl``, a JSON line per image."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, write_atomically
from vlm_bridge.data_pipeline.images import MAX_FILE_BYTES
from vlm_bridge.data_pipeline.samples import ImageFile, TarImage
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import SheetItem

PREDICTIONS_NAME = "predictions.jsonl"
T = TypeVar("T")


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

    def sheet_item(self) -> SheetItem:
        return SheetItem(self.image.path, self.caption, self.image.captions[0], self.cider)

    def to_record(self) -> dict[str, Any]:
        record = {
            "image": str(self.image.path),
            **_place(self.image.path),
            "original_id": self.image.original_id,
            "caption": self.caption,
            "log_probability": self.log_probability,
            "references": list(self.image.captions),
            "finished": self.finished,
            "scores": dict(self.scores),
        }
        return record | ({"error": self.error} if self.error else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prediction:
        """Read `to_record`; ValueError, KeyError or TypeError where it is damaged."""
        image = CaptionedImage(_file(record), tuple(record["references"]), record["original_id"])
        scores = record["scores"]
        if not image.captions or "CIDEr" not in scores:
            raise ValueError("no references, or no CIDEr")
        score, error = record["log_probability"], record.get("error")
        return cls(image, record["caption"], score, error, scores, record.get("finished"))


def _place(image: ImageFile) -> dict[str, Any]:
    """Return the place of an image in a tar file."""
    if isinstance(image, Path):
        return {}
    return {"tar": {"file": str(image.file), "offset": image.offset, "size": image.size}}


def _file(record: Mapping[str, Any]) -> ImageFile:
    if "tar" not in record:
        return Path(record["image"])
    file, offset, size = (record["tar"][key] for key in ("file", "offset", "size"))
    if type(offset) is not int or type(size) is not int or offset < 0:
        raise ValueError("no place in a tar")
    if not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError("no place in a tar")
    return TarImage(Path(file), offset, size, str(record["image"]).removeprefix(f"{file}/"))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [json.dumps(prediction.to_record(), ensure_ascii=False) for prediction in predictions]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions; empty where there is no file.

    Raises:
        DataError: the file cannot be read, or a line is damaged.
    """
    if not path.is_file():
        return []
    try:
        # Captions may hold other ends of lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the predictions in {path}: {error}") from error
    predictions = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            predictions.append(Prediction.from_record(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is not a prediction: evaluate again ({error!r})"
            ) from error
    return predictions


def best(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the predictions with the highest CIDEr, best first."""
    return sorted(predictions, key=lambda prediction: prediction.cider)[::-1][:count]


def worst(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the predictions with the lowest CIDEr, worst first."""
    return sorted(predictions, key=lambda prediction: prediction.cider)[:count]


def drawn(items: Sequence[T], count: int) -> list[T]:
    """Draw items with a fixed seed."""
    return random.Random(0).sample(list(items), min(count, len(items)))


def longest(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the longest captions, in words, where repetition shows."""
    return sorted(predictions, key=lambda prediction: -len(prediction.caption.split()))[:count]
