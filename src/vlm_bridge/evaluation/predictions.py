"""What a captioner said about each image of an evaluation, on disk (``predictions.jsonl``) and in pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_bridge.data_pipeline.caption_folder import CaptionedImage, write_atomically
from vlm_bridge.data_pipeline.images import MAX_FILE_BYTES
from vlm_bridge.data_pipeline.tar_picture import PictureFile, TarPicture
from vlm_bridge.errors import DataError
from vlm_bridge.evaluation.contact_sheet import SheetItem

PREDICTIONS_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """What the captioner said about one image. After ``error`` the caption is empty and counts as such.

    ``log_probability`` is the caption's mean per token, in nats; ``finished`` is whether it came to its end rather
    than to the longest that was allowed (None: not recorded).
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
        """What `to_record` made; scores without a CIDEr, or an image without references, is a ValueError."""
        image = CaptionedImage(_picture(record), tuple(record["references"]), record["original_id"])
        if not image.captions or "CIDEr" not in record["scores"]:
            raise ValueError("no references, or no CIDEr")
        rest = (
            record["log_probability"],
            record.get("error"),
            record["scores"],
            record.get("finished"),
        )
        return cls(image, record["caption"], *rest)


def _place(picture: PictureFile) -> dict[str, Any]:
    """What a record says of a picture in a tar, beside its name."""
    if isinstance(picture, Path):
        return {}
    return {"tar": {"file": str(picture.file), "offset": picture.offset, "size": picture.size}}


def _picture(record: Mapping[str, Any]) -> PictureFile:
    """The picture of a record; ValueError, KeyError or TypeError where it names none."""
    if "tar" not in record:
        return Path(record["image"])
    file, offset, size = (record["tar"][key] for key in ("file", "offset", "size"))
    if not (
        isinstance(offset, int)
        and isinstance(size, int)
        and offset >= 0
        and 0 <= size <= MAX_FILE_BYTES
    ):
        raise ValueError("no place in a tar")
    return TarPicture(Path(file), offset, size, str(record["image"]).removeprefix(f"{file}/"))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """A JSON line per image.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [json.dumps(prediction.to_record(), ensure_ascii=False) for prediction in predictions]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote; nothing where there is no file.

    Raises:
        DataError: the file cannot be read; says in which line.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # captions may hold other ends of lines
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
    """The images with the highest CIDEr, best first."""
    return sorted(predictions, key=lambda prediction: prediction.cider)[::-1][:count]


def worst(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The images with the lowest CIDEr, worst first."""
    return sorted(predictions, key=lambda prediction: prediction.cider)[:count]


def drawn(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Images drawn with a fixed seed: the honest picture between best and worst."""
    return random.Random(0).sample(list(predictions), min(count, len(predictions)))


def longest(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The longest captions, in words: where repetition and captions without an end show."""
    return sorted(predictions, key=lambda prediction: -len(prediction.caption.split()))[:count]
