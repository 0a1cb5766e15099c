"""One captioner for many clients: bounded settings, checked uploads, one image at a time."""

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
        """Return the request with fields of a form. Raises ConfigurationError."""
        try:
            return Request(**{**self.model_dump(), **fields})
        except ValidationError as error:
            problem = error.errors()[0]
            raise ConfigurationError(f"{problem['loc'][0]}: {problem['msg']}") from None


@dataclass(frozen=True, eq=False)
class Answer:
    """The captions of an image.

    Attributes:
        captions: distinct ones, likeliest first.
        overlays: the attention of each word with the image under it; none unless asked for.
        seconds: of computing, without waiting for other clients.
    """

    captions: list[Candidate]
    overlays: list[tuple[WordAttention, Image.Image]]
    image: Image.Image
    seconds: float


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
        self.open_image = open_image
        recipe, device = captioner.recipe, captioner.model.device
        self.default_request = Request.of(recipe.decode)
        parts = [*recipe.vision_encoder.names, recipe.bridge.kind, recipe.language_model.name]
        names = " → ".join(Path(name).name for name in parts)
        self.summary = f"{names}, on {device} ({checkpoint})"
        self._places = threading.Semaphore(DECODE_TOGETHER)
        self._turn = threading.Lock()

    def answer(
        self, content: bytes, name: str, request: Request, *, overlays: bool = False
    ) -> Answer:
        """Caption the content of an uploaded file.

        Raises:
            DataError: the upload is too large or not an image.
            ModelError: the language model does not return the attention that `overlays` need.
        """
        if len(content) > MAX_UPLOAD_MB * MEGABYTE:
            raise DataError(f"{name} is too large: send at most {MAX_UPLOAD_MB} MB")
        with self._places:
            try:
                image = self.open_image(content)
            except ImageError as error:
                raise DataError(f"{name}: {error.reason}; send a JPEG, PNG or WebP") from error
            with self._turn:
                return self._caption(image, request, overlays)

    def _caption(self, image: Image.Image, request: Request, overlays: bool) -> Answer:
        started = time.perf_counter()
        sampled = request.temperature > 0
        decode = self.captioner.recipe.decode.replace(
            num_beams=1 if sampled else request.num_beams,
            do_sample=sampled,
            temperature=request.temperature if sampled else 1.0,
            length_penalty=request.length_penalty,
            max_new_tokens=request.max_new_tokens,
        )
        count = request.num_alternatives
        count = count if sampled else min(count, decode.num_beams)
        (found,) = self.captioner.candidates([image], count, decode=decode)
        if sampled:
            found.sort(key=lambda candidate: -candidate.score)
        captions = list({candidate.caption: candidate for candidate in found}.values())
        words: list[tuple[WordAttention, Image.Image]] = []
        if overlays:
            explained = explain(self.captioner, image, caption=captions[0].caption)
            shown = word_overlays(explained, image, OVERLAY_SIDE)
            words = list(zip(explained.words, shown, strict=True))
        return Answer(captions, words, image, time.perf_counter() - started)
