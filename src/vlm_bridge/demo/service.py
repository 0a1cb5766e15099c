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
from vlm_bridge.training_strategy.checkpoint import BUNDLED

MEGABYTE = 2**20
MAX_UPLOAD_MB = 20
MOST_BEAMS, MOST_ALTERNATIVES, LONGEST = 8, 5, 80
OVERLAY_SIDE = 160
BUNDLED_LICENSE = (
    "The captioner learned from Flickr8k, mostly people and dogs outdoors: "
    "for non-commercial research use."
)
OTHER_LICENSE = (
    "Use captions as the licenses of the captioner's training data and frozen parts allow."
)


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
    """Answer requests of any number of threads, one image at a time.

    Args:
        checkpoint: name of the captioner's checkpoint on the page.
        open_image: decodes uploads, such as `ImageReader.open_image` in another process.
    """

    def __init__(
        self,
        captioner: Captioner,
        checkpoint: str = BUNDLED,
        open_image: Callable[[bytes], Image.Image] = open_image,
    ):
        self.captioner = captioner
        self.open_image = open_image
        recipe, device = captioner.recipe, captioner.model.device
        self.default_request = Request.of(recipe.decode)
        parts = [*recipe.vision_encoder.names, recipe.bridge.kind, recipe.language_model.name]
        names = " → ".join(Path(name).name for name in parts)
        self.summary = f"{names}, on {device} ({checkpoint})"
        self.license = BUNDLED_LICENSE if checkpoint == BUNDLED else OTHER_LICENSE
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
        with self._turn:
            started = time.perf_counter()
            try:
                image = self.open_image(content)
            except ImageError as error:
                raise DataError(f"{name}: {error.reason}; send a JPEG, PNG or WebP") from error
            captions = self._captions(image, request)
            words: list[tuple[WordAttention, Image.Image]] = []
            if overlays:
                explained = explain(self.captioner, image, caption=captions[0].caption)
                shown = word_overlays(explained, image, OVERLAY_SIDE)
                words = list(zip(explained.words, shown, strict=True))
            return Answer(captions, words, image, time.perf_counter() - started)

    def _captions(self, image: Image.Image, request: Request) -> list[Candidate]:
        """Return distinct captions, likeliest first."""
        settings = request.model_dump()
        count = settings.pop("num_alternatives")
        if request.temperature > 0:
            settings |= {"num_beams": 1, "do_sample": True}
        else:
            settings |= {"temperature": 1.0, "do_sample": False}
            count = min(count, request.num_beams)
        decode = self.captioner.recipe.decode.replace(**settings)
        (found,) = self.captioner.candidates([image], count, decode=decode)
        if decode.do_sample:
            found.sort(key=lambda candidate: -candidate.score)
        return list({candidate.caption: candidate for candidate in found}.values())
