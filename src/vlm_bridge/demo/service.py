"""One captioner for many clients: uploads checked, settings bounded, one picture at a time on the model."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_bridge.captioning.explain import WordAttention, explain, word_overlays
from vlm_bridge.captioning.pipeline import Candidate, Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.isolated import ImageReader
from vlm_bridge.errors import ConfigurationError, DataError, ImageError

MEGABYTE = 2**20
"""As Gradio counts, so that its messages and ours name one limit."""
MAX_UPLOAD_MB = 20
MAX_UPLOAD = MAX_UPLOAD_MB * MEGABYTE
"""Bytes of a picture that a client may send. `images.MAX_PIXELS` bounds what they may decode to."""
MOST_BEAMS, MOST_ALTERNATIVES, LONGEST = 8, 5, 80
"""What one client may ask for, so that the others do not wait long."""
OVERLAY_SIDE = 160
DECODE_TOGETHER = 2


class UploadError(DataError):
    """An upload cannot be captioned; ``status`` is the HTTP code of the answer."""

    def __init__(self, message: str, status: int):
        self.status = status
        super().__init__(message)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a client gets for a picture.

    Attributes:
        alternatives: distinct captions, likeliest first; ``caption`` is one of them.
        overlays: the picture under the attention of each word of the caption, with the word; none unless asked for.
        seconds: of computing, waiting for other clients left out.
    """

    caption: str
    alternatives: list[Candidate]
    overlays: list[tuple[WordAttention, Image.Image]]
    picture: Image.Image
    seconds: float

    def to_json(self) -> dict[str, Any]:
        alternatives = [dataclasses.asdict(candidate) for candidate in self.alternatives]
        return {
            "caption": self.caption,
            "alternatives": alternatives,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Request:
    """What a client may choose: ``temperature`` 0 searches with beams, above it draws samples."""

    num_beams: int
    temperature: float
    length_penalty: float
    max_new_tokens: int
    num_alternatives: int

    def __post_init__(self) -> None:
        bounds = {
            "num_beams": (1, MOST_BEAMS),
            "temperature": (0, 2),
            "length_penalty": (-2, 4),
            "max_new_tokens": (1, LONGEST),
            "num_alternatives": (1, MOST_ALTERNATIVES),
        }
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:  # NaN is refused as well
                raise ConfigurationError(f"{name}={getattr(self, name)}: give {least} to {most}")

    @classmethod
    def of(cls, decode: DecodeSettings) -> Request:
        """A recipe's settings, as far as clients may choose them."""
        return cls(
            num_beams=min(decode.num_beams, MOST_BEAMS),
            temperature=decode.temperature if decode.do_sample else 0.0,
            length_penalty=decode.length_penalty,
            max_new_tokens=min(decode.max_new_tokens, LONGEST),
            num_alternatives=min(decode.num_beams, 3),
        )

    def updated(self, given: Mapping[str, str]) -> Request:
        """With what the fields of a form say.

        Raises:
            ConfigurationError: an unknown field, no number, or one out of bounds.
        """
        kinds = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {}
        for name, text in given.items():
            if name not in kinds:
                raise ConfigurationError(f"no setting {name!r}: there are {', '.join(kinds)}")
            try:
                changes[name] = kinds[name](text)
            except ValueError:
                raise ConfigurationError(f"{name}={text!r} is no {kinds[name].__name__}") from None
        return dataclasses.replace(self, **changes)


class CaptionService:
    """Answers requests one after the other, whichever threads they come from; decodes few images at a time, so that
    memory holds no more however many clients wait, and one that takes long does not keep the others waiting.

    Args:
        checkpoint: what the page calls the captioner's checkpoint.
        reader: decodes uploads in processes of its own; None decodes them in this one.
    """

    def __init__(self, captioner: Captioner, checkpoint: str, reader: ImageReader | None = None):
        self.captioner = captioner
        self.checkpoint = checkpoint
        self.open_image = reader.open_image if reader is not None else open_image
        self.default_request = Request.of(captioner.recipe.decode)
        self._turn = threading.Lock()
        self._decoding = threading.Semaphore(DECODE_TOGETHER)

    def answer(
        self, file: Path | bytes, name: str, request: Request, *, overlays: bool = False
    ) -> Answer:
        """Caption an uploaded picture, or say why not.

        Args:
            name: what the client calls the file, for messages.

        Raises:
            UploadError: the upload is too large or not a picture.
            ConfigurationError: the captioner cannot decode so.
            ModelError: ``overlays`` are asked of a language model that does not return its attention.
        """
        with self._decoding:
            began = time.perf_counter()
            picture = open_upload(file, name, self.open_image)
            seconds = time.perf_counter() - began
        with self._turn:
            started = time.perf_counter() - seconds
            decode, count = self._decode_settings(request)
            (candidates,) = self.captioner.candidates([picture], count, decode=decode)
            if decode.do_sample:
                candidates.sort(key=lambda candidate: -candidate.score)
            distinct = list({candidate.caption: candidate for candidate in candidates}.values())
            shown = []
            if overlays:
                explanation = explain(self.captioner, picture, caption=distinct[0].caption)
                images = word_overlays(explanation, picture, OVERLAY_SIDE)
                shown = list(zip(explanation.words, images, strict=True))
            return Answer(
                distinct[0].caption, distinct, shown, picture, time.perf_counter() - started
            )

    def summary(self) -> str:
        """What answers, on one line."""
        facts = self.facts()
        return f"{facts['Vision encoder']} → {facts['Bridge']} → {facts['Language model']}, on {facts['Device']}"

    def facts(self) -> dict[str, str]:
        """What answers: the parts, the checkpoint, the device and how captions are generated."""
        recipe, model = self.captioner.recipe, self.captioner.model
        trained = sum(parameter.numel() for parameter in model.bridge.parameters())
        decode = recipe.decode
        how = (
            f"samples at temperature {decode.temperature}"
            if decode.do_sample
            else f"{decode.num_beams} beams"
        )
        return {
            "Vision encoder": " + ".join(Path(name).name for name in recipe.vision_encoder.names),
            "Bridge": f"{recipe.bridge.kind} bridge of {trained / 1e6:.1f} M parameters",
            "Language model": Path(recipe.language_model.name).name,
            "Checkpoint": self.checkpoint,
            "Device": str(model.device),
            "Decoding of the recipe": f"{how}, at most {decode.max_new_tokens} tokens",
        }

    def _decode_settings(self, request: Request) -> tuple[DecodeSettings, int]:
        """The recipe's settings with those of a request, and how many captions that can give."""
        sampled = request.temperature > 0
        decode = self.captioner.recipe.decode.replace(
            num_beams=1 if sampled else request.num_beams,
            do_sample=sampled,
            temperature=request.temperature if sampled else 1.0,
            length_penalty=request.length_penalty,
            max_new_tokens=request.max_new_tokens,
        )
        count = request.num_alternatives
        return decode, count if sampled else min(count, decode.num_beams)


def open_upload(
    file: Path | bytes, name: str, open_image: Callable[[Any], Image.Image] = open_image
) -> Image.Image:
    """Open an uploaded file as an upright RGB image.

    Args:
        name: what the client calls the file, for messages.
        open_image: decodes it: in this process, or in others (`ImageReader`).

    Raises:
        UploadError: larger than `MAX_UPLOAD`, no image, damaged, or beyond a limit of `data_pipeline.images`.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if size > MAX_UPLOAD:
        raise UploadError(
            f"{name} has {math.ceil(size / MEGABYTE)} MB: send at most {MAX_UPLOAD_MB} MB", 413
        )
    try:
        return open_image(file if isinstance(file, bytes) else str(file))
    except ImageError as error:
        remedy = "send a JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC, AVIF or JPEG 2000"
        raise UploadError(f"{name}: {error.reason}; {remedy}", 415) from error
