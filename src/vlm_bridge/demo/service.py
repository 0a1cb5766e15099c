"""One captioner for many clients: uploads are checked, settings bounded, images captioned in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_bridge.captioning.explain import WordAttention, explain, word_overlays
from vlm_bridge.captioning.pipeline import Candidate, Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.errors import ConfigurationError, DataError, ImageError

MEGABYTE = 2**20
MAX_UPLOAD_MB = 20
MOST_BEAMS, MOST_ALTERNATIVES, LONGEST = 8, 5, 80
DECODE_TOGETHER = 2
OVERLAY_SIDE = 160


class UploadError(DataError):
    """An upload cannot be captioned; `status` is the HTTP code of the answer."""

    def __init__(self, message: str, status: int):
        self.status = status
        super().__init__(message)


class Request(BaseModel):
    """Settings of a client: `temperature` 0 searches with beams, above it draws samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_beams: int = Field(ge=1, le=MOST_BEAMS)
    temperature: float = Field(ge=0, le=2)
    length_penalty: float = Field(ge=-2, le=4)
    max_new_tokens: int = Field(ge=1, le=LONGEST)
    num_alternatives: int = Field(ge=1, le=MOST_ALTERNATIVES)

    @classmethod
    def of(cls, decode: DecodeSettings) -> Request:
        """Return a recipe's settings, within the bounds of clients."""
        return cls(
            num_beams=min(decode.num_beams, MOST_BEAMS),
            temperature=min(decode.temperature, 2) if decode.do_sample else 0,
            length_penalty=min(max(decode.length_penalty, -2), 4),
            max_new_tokens=min(decode.max_new_tokens, LONGEST),
            num_alternatives=min(decode.num_beams, 3),
        )

    def updated(self, fields: Mapping[str, Any]) -> Request:
        """Return the request with fields of a form.

        Raises:
            ConfigurationError: an unknown field, no number, or one out of bounds.
        """
        try:
            return Request(**{**self.model_dump(), **fields})
        except ValidationError as error:
            problem = error.errors()[0]
            raise ConfigurationError(f"{problem['loc'][0]}: {problem['msg']}") from None

    def decode_settings(self, recipe: DecodeSettings) -> DecodeSettings:
        """Return a recipe's settings with those of the request."""
        sampled = self.temperature > 0
        return recipe.replace(
            num_beams=1 if sampled else self.num_beams,
            do_sample=sampled,
            temperature=self.temperature if sampled else 1.0,
            length_penalty=self.length_penalty,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """The captions of an image.

    Attributes:
        alternatives: distinct captions, likeliest first.
        overlays: the attention of each word with the image under it; none unless asked for.
        seconds: of computing, without waiting for other clients.
    """

    alternatives: list[Candidate]
    overlays: list[tuple[WordAttention, Image.Image]]
    image: Image.Image
    seconds: float

    @property
    def caption(self) -> str:
        return self.alternatives[0].caption


class CaptionService:
    """Answer requests of any number of threads; few images at a time are in memory.

    Args:
        checkpoint: name of the captioner's checkpoint on the page.
        open_image: decodes uploads, such as `ImageReader.open_image` in another process.
    """

    def __init__(
        self,
        captioner: Captioner,
        checkpoint: str,
        open_image: Callable[[Any], Image.Image] = open_image,
    ):
        self.captioner = captioner
        self.checkpoint = checkpoint
        self.open_image = open_image
        self.default_request = Request.of(captioner.recipe.decode)
        self._places = threading.Semaphore(DECODE_TOGETHER)
        self._turn = threading.Lock()

    def answer(
        self, file: Path | bytes, name: str, request: Request, *, overlays: bool = False
    ) -> Answer:
        """Caption an uploaded image.

        Args:
            name: of the file, for messages.

        Raises:
            UploadError: the upload is too large or not an image.
            ModelError: the language model does not return the attention that `overlays` need.
        """
        with self._places:
            image = self._open(file, name)
            with self._turn:
                started = time.perf_counter()
                decode = request.decode_settings(self.captioner.recipe.decode)
                count = request.num_alternatives
                if not decode.do_sample:
                    count = min(count, decode.num_beams)
                (found,) = self.captioner.candidates([image], count, decode=decode)
                if decode.do_sample:
                    found.sort(key=lambda candidate: -candidate.score)
                distinct = list({candidate.caption: candidate for candidate in found}.values())
                words: list[tuple[WordAttention, Image.Image]] = []
                if overlays:
                    explained = explain(self.captioner, image, caption=distinct[0].caption)
                    shown = word_overlays(explained, image, OVERLAY_SIDE)
                    words = list(zip(explained.words, shown, strict=True))
                return Answer(distinct, words, image, time.perf_counter() - started)

    def _open(self, file: Path | bytes, name: str) -> Image.Image:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        if size > MAX_UPLOAD_MB * MEGABYTE:
            raise UploadError(f"{name} is too large: send at most {MAX_UPLOAD_MB} MB", 413)
        try:
            return self.open_image(file if isinstance(file, bytes) else str(file))
        except ImageError as error:
            formats = "JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC, AVIF or JPEG 2000"
            raise UploadError(f"{name}: {error.reason}; send a {formats}", 415) from error

    def summary(self) -> str:
        """Return one line about the captioner's parts, checkpoint and device."""
        recipe, model = self.captioner.recipe, self.captioner.model
        encoder = " + ".join(Path(name).name for name in recipe.vision_encoder.names)
        trained = sum(parameter.numel() for parameter in model.bridge.parameters()) / 1e6
        language_model = Path(recipe.language_model.name).name
        return (
            f"{encoder} → {recipe.bridge.kind} bridge of {trained:.1f} M parameters → "
            f"{language_model}, on {model.device} ({self.checkpoint})"
        )
