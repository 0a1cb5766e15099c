"""Caption images with a trained captioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image

from vlm_bridge.captioning.publish import CardFacts, push_to_hub, write_huggingface_folder
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.images import open_image, upright_rgb
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches, prefetch, whole_rows
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.device import autocast, resolve_device
from vlm_bridge.errors import ImageError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner, caption_format
from vlm_bridge.model_architecture.familiarity import confidence
from vlm_bridge.model_architecture.generation import image_keys
from vlm_bridge.model_architecture.wheels import require_weights
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.validation import StreamedValidation

DECODE_AHEAD = 2  # batches that are opened and preprocessed while another is captioned
FIRST_BATCHES = (1, 3, 8, 16)  # images, of a stream

# A path, a file's content, an image of Pillow, or an array [height, width, 3] of uint8.
ImageSource = str | ImageFile | bytes | Image.Image | np.ndarray
WithFeatures = Callable[[Sequence[str], torch.Tensor], None]


def opened(image: ImageSource) -> Image.Image:
    """Return an image as upright RGB. Raises ImageError."""
    if isinstance(image, np.ndarray):
        is_gray, channels = image.ndim == 2, image.shape[2:]
        if image.dtype != np.uint8 or not (is_gray or channels in ((3,), (4,))) or not image.size:
            found = f"{image.dtype} {list(image.shape)}"
            raise ImageError(
                _name(image), f"an array must be uint8 [height, width, 3], not {found}"
            )
        image = Image.fromarray(image)
    return upright_rgb(image) if isinstance(image, Image.Image) else open_image(image)


def _name(image: ImageSource) -> str:
    return str(image) if isinstance(image, str | ImageFile) else "<image>"


class Candidate(NamedTuple):
    """A caption of an image.

    Attributes:
        score: mean log-probability per token, in nats.
        finished: it ended with EOS before `max_new_tokens`.
        confidence: probability that its subject is right; None where none was calibrated.
        unsure: the confidence is below the recipe's `confidence.unsure_below`.
    """

    caption: str
    score: float
    finished: bool
    confidence: float | None = None
    unsure: bool | None = None

    def sureness(self) -> dict[str, Any]:
        """Return `confidence` and `unsure` for JSON; nothing where none was calibrated."""
        if self.confidence is None:
            return {}
        return {"confidence": round(self.confidence, 3), "unsure": self.unsure}


@dataclass(frozen=True)
class CaptionResult:
    """An image's caption as in `Candidate`, or the error of one that cannot be read.

    `str(result)` is the caption.
    """

    image: str
    caption: str | None = None
    score: float | None = None
    finished: bool | None = None
    confidence: float | None = None
    unsure: bool | None = None
    error: str | None = None
    sureness = Candidate.sureness

    def __str__(self) -> str:
        return self.caption or (str(ImageError(self.image, self.error)) if self.error else "")


class Captioner:
    """A trained captioner; `Captioner.from_pretrained()` is the bundled one.

    Args:
        source: where its weights are from.
    """

    def __init__(self, model: CaptionModel, recipe: Recipe, source: object = None):
        self.model = model.eval()
        self.recipe = recipe
        self.source = source
        self.format = caption_format(model.language_model, recipe)

    def __repr__(self) -> str:
        recipe, parameters = self.recipe, self.model.parameters()
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        source = "" if self.source is None else f", from {self.source}"
        return (
            f"Captioner({recipe.vision_encoder.name} -> {recipe.bridge.kind} -> "
            f"{recipe.language_model.name}, {trained:,} trained parameters, on "
            f"{self.model.device}{source})"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str = "auto",
        *,
        recipe: Recipe | None = None,
        revision: str | None = None,
        compile: bool = False,
    ) -> Captioner:
        """Load a checkpoint, a run folder's best one, an exported folder, or a model on the hub.

        Args:
            path: a path, the name of an exported captioner on the hub, or `bundled`, the default.
            recipe: for checkpoints of the original project; else the checkpoint's own.
            revision: branch, tag or commit of a model on the hub.
            compile: compile the decoding step, for NVIDIA GPUs and many images.

        Raises:
            CheckpointError: missing, damaged, or of another architecture; or none is bundled.
            ModelError: a frozen part cannot be loaded.
        """
        where = checkpoints.find_checkpoint(path or checkpoints.BUNDLED, revision)
        content = checkpoints.load_checkpoint(where)
        recipe = checkpoints.recipe_of(content, where, recipe)
        checkpoints.check_sizes(content, recipe, where)
        require_weights([*recipe.vision_encoder.names, recipe.language_model.name])
        target, language_model = resolve_device(device), recipe.language_model
        if target.type != "cuda" and language_model.quantization:  # it needs a GPU
            recipe = recipe.replace(language_model=language_model.replace(dtype="auto"))
        model = build_captioner(recipe)
        checkpoints.restore(model, content, where)
        model.to(target)
        if compile:
            model.use_static_cache()
        return cls(model, recipe, path or checkpoints.BUNDLED)

    @overload
    def caption(self, images: ImageSource, **options: Any) -> CaptionResult: ...
    @overload
    def caption(self, images: Iterable[ImageSource], **options: Any) -> list[CaptionResult]: ...
    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        decode: DecodeSettings | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] = lambda done: None,
        with_features: WithFeatures | None = None,
        **settings: Any,
    ) -> CaptionResult | list[CaptionResult]:
        """Caption an image or several: a path, bytes, an image of Pillow or an array each.

        Args:
            decode: how to generate; None means the recipe's settings.
            batch_size: images encoded and decoded together; captions do not depend on it.
            progress: called with the number of images done.
            with_features: called with the names and features [B, N, D] of a batch's readable
                images, before they are captioned.
            settings: changes of `decode`, such as ``num_beams=5, max_new_tokens=30``.

        Returns:
            The result of one image; of several, a list in the order given, in which an unreadable
            image has an `error` instead of a caption.

        Raises:
            ImageError: the one image cannot be read.
            ConfigurationError: an unknown or impossible setting.
        """
        is_one = isinstance(images, ImageSource)
        batches = batches_of([images] if is_one else images, [batch_size])
        found = self._results(batches, opened, decode, settings, with_features)
        results = counted(found, progress)
        if not is_one:
            return results
        if results[0].error is not None:
            raise ImageError(results[0].image, results[0].error)
        return results[0]

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        decode: DecodeSettings | None = None,
        batch_size: int = 32,
        open_image: Callable[[Any], Image.Image] = opened,
        **settings: Any,
    ) -> Iterator[CaptionResult]:
        """Yield the results of `caption` one by one, each when it is ready.

        Batches grow from one image up to ``batch_size``, for a first caption without delay.

        Args:
            images: read as they are needed, a few batches ahead.
            open_image: opens an image, such as `ImageReader.open_image` in a process.
        """
        if isinstance(images, ImageSource):
            images = [images]
        sizes = [size for size in FIRST_BATCHES if size < batch_size]
        return self._results(batches_of(images, [*sizes, batch_size]), open_image, decode, settings)

    def _results(
        self,
        batches: Iterable[list[ImageSource]],
        open_image: Callable[[Any], Image.Image],
        decode: DecodeSettings | None,
        settings: dict[str, Any],
        with_features: WithFeatures | None = None,
    ) -> Iterator[CaptionResult]:
        decode = (decode or self.recipe.decode).replace(**settings)
        caption_batch = partial(self._caption_batch, decode=decode, with_features=with_features)
        prepare = self.model.vision_encoder.preprocess
        return caption_in_batches(batches, caption_batch, prepare=prepare, open_image=open_image)

    def candidates(
        self, images: Sequence[ImageSource], count: int, *, decode: DecodeSettings | None = None
    ) -> list[list[Candidate]]:
        """Return `count` captions per image: the best beams, best first, or independent draws.

        Raises:
            ConfigurationError: `count` is above the number of beams.
            ImageError: an image cannot be read.
        """
        pixels = self.model.vision_encoder.preprocess([opened(image) for image in images])
        captions = self._caption_batch(pixels, decode=decode or self.recipe.decode, per_image=count)
        return in_batches(captions, count)

    def save_pretrained(self, folder: str | Path, facts: CardFacts | None = None) -> None:
        """Write a folder for `from_pretrained` and the hub: trained weights, recipe, model card."""
        content = {"weights": self.model.trained_state_dict()}
        write_huggingface_folder(content, self.recipe, Path(folder), facts or CardFacts())

    def push_to_hub(
        self, repo: str, *, private: bool = False, facts: CardFacts | None = None
    ) -> str:
        """Upload to a model repository; see `publish.push_to_hub`."""
        with TemporaryDirectory() as temporary:
            facts = facts or CardFacts()
            title = facts.title or Path(repo).name
            self.save_pretrained(temporary, replace(facts, title=title, repo=repo))
            return push_to_hub(Path(temporary), repo, private=private)

    def validation(self, images: Sequence[CaptionedImage]) -> StreamedValidation:
        """Return what measures loss and visual gain of images while they are captioned."""
        data, paths = TokenizedImages(images, self.format), [str(image.path) for image in images]
        rows = dict(zip(paths, whole_rows(data.captions_per_image), strict=True))
        return StreamedValidation(self.model, data, rows, self._autocast)

    def _caption_batch(
        self,
        pixels: torch.Tensor,
        names: Sequence[str] = (),
        *,
        decode: DecodeSettings,
        per_image: int = 1,
        with_features: WithFeatures | None = None,
    ) -> list[Candidate]:
        """Caption pixels [B, 3, h, w], `per_image` times each."""
        features = self.model.features(pixels)
        if with_features:
            with_features(names, features)
        # Draws follow from pixels: features round differently in batches of another size.
        keys = image_keys(pixels) if decode.do_sample else None
        prompt = self.format.prompt_ids
        with self._autocast():
            captions = self.model.generate(features, prompt, decode, per_image, keys)
        text_of, most = self.model.language_model.decode, decode.max_new_tokens
        sure = self._confidence(features, [score for _, score in captions], per_image)
        # EOS counts as a new token and is cut off.
        return [
            Candidate(text_of(ids), score, len(ids) < most, value, unsure)
            for (ids, score), (value, unsure) in zip(captions, sure, strict=True)
        ]

    def _confidence(
        self, features_bnd: torch.Tensor, scores: Sequence[float], per_image: int
    ) -> list[tuple[float | None, bool | None]]:
        """Return each caption's confidence, and if it is unsure; nothing without a recipe's."""
        options, familiarity = self.recipe.confidence, self.model.familiarity
        if options is None or familiarity is None:
            return [(None, None)] * len(scores)
        similarities = familiarity(self.model.bridge_features(features_bnd)).tolist()
        found = [
            confidence(options, score, similarities[index // per_image])
            for index, score in enumerate(scores)
        ]
        return [(value, value < options.unsure_below) for value in found]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.model.device, self.recipe.autocast_dtype)


def batches_of(images: Iterable[ImageSource], sizes: Sequence[int]) -> Iterator[list[ImageSource]]:
    """Yield images in batches of the given sizes, and from then on of the last one."""
    left = iter(images)
    yield from filter(None, (list(islice(left, size)) for size in sizes))
    yield from iter(lambda: list(islice(left, sizes[-1])), [])


def counted(
    results: Iterable[CaptionResult], progress: Callable[[int], None]
) -> list[CaptionResult]:
    """Collect results, and call ``progress`` with their number after each."""
    collected: list[CaptionResult] = []
    for result in results:
        collected.append(result)
        progress(len(collected))
    return collected


def caption_in_batches(
    batches: Iterable[list[ImageSource]],
    caption_batch: Callable[[Any, list[str]], Sequence[tuple[Any, ...]]],
    *,
    prepare: Callable[[list[Image.Image]], Any] = lambda images: images,
    open_image: Callable[[Any], Image.Image] = opened,
) -> Iterator[CaptionResult]:
    """Yield results in the order of the images, while threads prepare the next batches.

    Args:
        caption_batch: prepared images and their names -> the values of a `Candidate`, or the
            first three.
        prepare: turns the RGB images of a batch into the input of `caption_batch`.
    """

    def read(batch: list[ImageSource]) -> tuple[list[CaptionResult], Any]:
        results, readable = [], []
        for image in batch:
            error = None
            try:
                readable.append(open_image(image))
            except ImageError as damage:
                error = damage.reason
            results.append(CaptionResult(_name(image), error=error))
        return results, prepare(readable) if readable else None

    for results, prepared in prefetch(batches, read, DECODE_AHEAD):
        names = [result.image for result in results if result.error is None]
        captions = iter(caption_batch(prepared, names) if names else [])
        for result in results:
            yield result if result.error else CaptionResult(result.image, *next(captions))
