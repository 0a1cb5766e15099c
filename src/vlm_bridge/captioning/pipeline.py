"""Caption images with a trained captioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vlm_bridge.captioning.publish import CardFacts, push_to_hub, write_huggingface_folder
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.features import OnTheFlyPixels
from vlm_bridge.data_pipeline.images import open_image, upright_rgb
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches, prefetch
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.device import autocast, resolve_device
from vlm_bridge.errors import ImageError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner, caption_format
from vlm_bridge.model_architecture.generation import image_keys
from vlm_bridge.model_architecture.weights import require_weights
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.validation import Validation, validate

VALIDATION_MEMORY = 2**30
DECODE_AHEAD = 2  # batches that are opened and preprocessed while another is captioned

ImageSource = str | ImageFile | bytes | Image.Image


def opened(image: ImageSource) -> Image.Image:
    """Return an image, or one in a file, as upright RGB. Raises ImageError."""
    return upright_rgb(image) if isinstance(image, Image.Image) else open_image(image)


class Candidate(NamedTuple):
    """A caption of an image."""

    caption: str
    score: float  # mean log-probability per token, in nats
    finished: bool  # it ended with EOS before `max_new_tokens`


@dataclass(frozen=True)
class CaptionResult:
    """An image's caption as in `Candidate`, or the error of one that cannot be read."""

    image: str
    caption: str | None = None
    score: float | None = None
    finished: bool | None = None
    error: str | None = None


class Captioner:
    """A trained captioner: `Captioner.from_pretrained()("photo.jpg")` uses the bundled one."""

    def __init__(self, model: CaptionModel, recipe: Recipe):
        self.model = model.eval()
        self.recipe = recipe
        self.format = caption_format(model.language_model, recipe)

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
        return cls(model, recipe)

    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        decode: DecodeSettings | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] = lambda done: None,
        open_image: Callable[[Any], Image.Image] = opened,
    ) -> list[CaptionResult]:
        """Caption images, in the order given; an unreadable one gets an `error` instead.

        Args:
            decode: how to generate; None means the recipe's settings.
            batch_size: images encoded and decoded together; captions do not depend on it.
            progress: called with the number of images done.
            open_image: opens an item of `images`, such as `ImageReader.open_image` in a process.
        """
        caption_batch = partial(self._caption_batch, decode=decode or self.recipe.decode)
        prepare = self.model.vision_encoder.preprocess
        return caption_in_batches(
            images, caption_batch, batch_size, progress, prepare=prepare, open_image=open_image
        )

    def candidates(
        self, images: Sequence[ImageSource], count: int, *, decode: DecodeSettings | None = None
    ) -> list[list[Candidate]]:
        """Return `count` captions per image: the best beams, best first, or independent draws.

        Raises:
            ConfigurationError: `count` is above the number of beams.
            ImageError: an image cannot be read.
        """
        pixels = self.model.vision_encoder.preprocess([opened(image) for image in images])
        return in_batches(self._caption_batch(pixels, decode or self.recipe.decode, count), count)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 32,
        num_return_sequences: int = 1,
        decode: DecodeSettings | None = None,
    ) -> list[Any]:
        """Caption as an image-to-text pipeline of `transformers` does.

        Returns:
            `[{"generated_text": caption}, ...]` for one image; for a list, a list of these.

        Raises:
            ImageError: an image cannot be read.
            ConfigurationError: more captions than beams are asked for.
        """
        if isinstance(images, ImageSource):
            images = [images]
            return self(images, num_return_sequences=num_return_sequences, decode=decode)[0]
        batches = in_batches(images, batch_size)
        found = (self.candidates(batch, num_return_sequences, decode=decode) for batch in batches)
        return [
            [{"generated_text": candidate.caption} for candidate in of_image]
            for of_image in chain.from_iterable(found)
        ]

    def save_pretrained(self, folder: str | Path, facts: CardFacts | None = None) -> None:
        """Write a folder for `from_pretrained` and the hub: trained weights, recipe, model card."""
        content = {"weights": self.model.trained_state_dict()}
        write_huggingface_folder(content, self.recipe, Path(folder), facts or CardFacts())

    def push_to_hub(
        self, repo: str, *, private: bool = False, facts: CardFacts | None = None
    ) -> str:
        """Upload to a model repository; see `publish.push_to_hub`."""
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / (Path(repo).name or "captioner")  # the title of its card
            self.save_pretrained(folder, facts)
            return push_to_hub(folder, repo, private=private)

    def validate(
        self, images: Sequence[CaptionedImage], *, batch_size: int = 16, world: World | None = None
    ) -> Validation:
        """Measure loss, perplexity and visual gain; each process of `world` gets the result."""
        world = world or World(self.model.device)
        encoder = self.model.vision_encoder
        paths = [image.path for image in images]
        features: Any = OnTheFlyPixels(paths, lambda x: encoder.preprocess(x).numpy())
        if len(images) * encoder.num_tokens * encoder.embed_dim * 4 <= VALIDATION_MEMORY:
            # Every image is read with its own captions and with another's: encode it once.
            batches = world.share(in_batches(range(len(images)), batch_size))
            pixels = (torch.from_numpy(features[np.array(indices)]) for indices in batches)
            parts = [self.model.features(some).float().cpu().numpy() for some in pixels]
            features = np.concatenate(world.interleave(parts))
        data, autocast = TokenizedImages(images, self.format), self._autocast
        return validate(
            self.model, data, features, batch_images=batch_size, autocast=autocast, world=world
        )

    def _caption_batch(
        self, pixels: torch.Tensor, decode: DecodeSettings, per_image: int = 1
    ) -> list[Candidate]:
        """Caption pixels [B, 3, h, w], `per_image` times each."""
        features = self.model.features(pixels)
        # Draws follow from pixels: features round differently in batches of another size.
        keys = image_keys(pixels) if decode.do_sample else None
        prompt = self.format.prompt_ids
        with self._autocast():
            captions = self.model.generate(features, prompt, decode, per_image, keys)
        text_of, most = self.model.language_model.decode, decode.max_new_tokens
        # EOS counts as a new token and is cut off.
        return [Candidate(text_of(ids), score, len(ids) < most) for ids, score in captions]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.model.device, self.recipe.autocast_dtype)


def caption_in_batches(
    images: Sequence[ImageSource],
    caption_batch: Callable[[Any], Sequence[tuple[str, float | None, bool]]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    *,
    prepare: Callable[[list[Image.Image]], Any] = lambda images: images,
    open_image: Callable[[Any], Image.Image] = opened,
) -> list[CaptionResult]:
    """Caption images in the order given, while threads open and prepare the next batches.

    Args:
        caption_batch: prepared images -> (caption, mean log-probability per token, finished).
        prepare: turns the RGB images of a batch into the input of `caption_batch`.
    """

    def read(batch: list[ImageSource]) -> tuple[list[CaptionResult], Any]:
        results, readable = [], []
        for image in batch:
            name, error = "<image>" if isinstance(image, Image.Image) else str(image), None
            try:
                readable.append(open_image(image))
            except ImageError as damage:
                error = damage.reason
            results.append(CaptionResult(name, error=error))
        return results, prepare(readable) if readable else None

    captioned: list[CaptionResult] = []
    for results, prepared in prefetch(in_batches(images, batch_size), read, DECODE_AHEAD):
        captions = iter(caption_batch(prepared) if prepared is not None else [])
        captioned += [
            result if result.error else CaptionResult(result.image, *next(captions))
            for result in results
        ]
        progress(len(captioned))
    return captioned
