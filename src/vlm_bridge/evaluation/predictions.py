"""Captions of an evaluation with their scores, and ``predictions.jsonl``, a JSON line per image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.images import MAX_FILE_BYTES
from vlm_bridge.data_pipeline.samples import ImageFile, TarImage
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
        record |= {
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


def _file(record: Mapping[str, Any]) -> ImageFile:
    name = record["image"]
    if "tar" not in record:
        return Path(name)
    file, offset, size = (record["tar"][key] for key in ("file", "offset", "size"))
    if type(offset) is not int or type(size) is not int:
        raise TypeError("the place in a tar is no number")
    if offset < 0 or not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError("no place in a tar")
    return TarImage(Path(file), offset, size, name.removeprefix(f"{file}/"))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions. Raises OSError."""
    lines = [json.dumps(prediction.to_record(), ensure_ascii=False) for prediction in predictions]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions; empty where there is no file.

    Raises:
        DataError: a line is damaged.
    """
    if not path.is_file():
        return []
    predictions = []
    # Captions may hold other ends of lines.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            predictions += [Prediction.from_record(json.loads(line))] if line else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number} is not a prediction: evaluate again ({error!r})"
            ) from error
    return predictions
