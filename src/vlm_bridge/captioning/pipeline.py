"""Paths in, captions out: the captioner that users hold in their hands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlm_bridge import runtime
from vlm_bridge.captioning.bundled import bundled_captioner
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.features import OnTheFlyPixels
from vlm_bridge.data_pipeline.images import open_image, upright_rgb
from vlm_bridge.data_pipeline.loader import TokenizedImages, in_batches, prefetch
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.errors import ImageError
from vlm_bridge.model_architecture.captioner import CaptionModel, build_captioner, caption_format
from vlm_bridge.model_architecture.generation import image_keys
from vlm_bridge.model_architecture.weights import require_weights
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.validation import Validation, validate

if TYPE_CHECKING:
    from vlm_bridge.publishing import CardFacts

__all__ = ["Candidate", "CaptionResult", "Captioner", "DecodeSettings"]

VALIDATION_MEMORY = 2**30
DECODE_AHEAD = 2
"""Batches of pictures that are opened and preprocessed while another is captioned. The encoder runs with the language
model: on the same device, both would only wait for each other."""


@dataclass(frozen=True)
class CaptionResult:
    """One picture's caption, or why there is none.

    Attributes:
        score: mean log-probability per token of the caption, in nats (0 is certain).
        error: set, with ``caption`` None, when the picture cannot be read.
        finished: whether it came to its end (EOS) rather than to ``max_new_tokens``; None when there is none.
    """

    image: str
    caption: str | None
    score: float | None
    error: str | None = None
    finished: bool | None = None


@dataclass(frozen=True)
class Candidate:
    """One of several captions of a picture; ``score`` is its mean log-probability per token, in nats."""

    caption: str
    score: float


class Captioner:
    """A trained captioner. ``Captioner.from_pretrained()("photo.jpg")`` captions with the one that is bundled."""

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
        """Load a checkpoint file, a run folder's best checkpoint, an exported folder, or a model on the hub.

        Args:
            path: a path; or, where there is none, the name of an exported captioner on the Hugging Face hub. None is
                the captioner that comes with this package.
            recipe: needed for checkpoints of the original project; else the checkpoint's own.
            revision: branch, tag or commit of a model on the hub.
            compile: compile the step that makes a token (`CaptionModel.use_static_cache`): for NVIDIA GPUs and
                many pictures.

        Raises:
            CheckpointError: missing, damaged, or of another architecture; or no captioner is bundled.
            ModelError: a frozen part it names cannot be loaded.
        """
        where = checkpoints.find_checkpoint(bundled_captioner() if path is None else path, revision)
        content = checkpoints.load_checkpoint(where)
        recipe = checkpoints.recipe_of(content, where, recipe)
        require_weights([*recipe.vision_encoder.names, recipe.language_model.name])
        target = runtime.resolve_device(device)
        if target.type != "cuda" and recipe.language_model.quantization:
            language_model = recipe.language_model.replace(dtype="auto")  # quantized needs a GPU
            recipe = recipe.replace(language_model=language_model)
        model = build_captioner(recipe)
        checkpoints.restore(model, content, where)
        model.to(target)
        if compile:
            model.use_static_cache()
        return cls(model, recipe)

    def caption(
        self,
        images: Sequence[str | PictureFile | Image.Image],
        *,
        decode: DecodeSettings | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] = lambda done: None,
        open_image: Callable[[Any], Image.Image] = open_image,
    ) -> list[CaptionResult]:
        """Caption images, in the order given; an image that cannot be read has an ``error`` instead.

        Args:
            decode: how to generate; None means the recipe's settings.
            batch_size: images that are encoded and decoded together; it does not change the captions.
            progress: called with the number of images done.
            open_image: reads a file: in this process, or in others (`data_pipeline.isolated.ImageReader`).
        """
        chosen = decode or self.recipe.decode
        encoder: Any = self.model.vision_encoder
        return caption_in_batches(
            images,
            lambda pixels: self._caption_batch(pixels, chosen),
            batch_size,
            progress,
            prepare=encoder.preprocess,
            open_image=open_image,
        )

    def candidates(
        self, pictures: Sequence[Image.Image], count: int, *, decode: DecodeSettings | None = None
    ) -> list[list[Candidate]]:
        """The ``count`` best captions that a beam search finds for each picture, best first; or as many draws.

        The first of a search is what `caption` says. Draws are independent: some may be equal.

        Args:
            decode: how to generate; None means the recipe's settings.

        Raises:
            ConfigurationError: a search is asked for more captions than it has beams.
        """
        encoder: Any = self.model.vision_encoder
        pixels = encoder.preprocess([upright_rgb(picture) for picture in pictures])
        captions = self._caption_batch(pixels, decode or self.recipe.decode, count)
        found = [Candidate(caption, score) for caption, score, _ in captions]
        return [found[start : start + count] for start in range(0, len(found), count)]

    def __call__(
        self,
        images: str | PictureFile | Image.Image | Sequence[str | PictureFile | Image.Image],
        *,
        batch_size: int = 32,
        num_return_sequences: int = 1,
        decode: DecodeSettings | None = None,
    ) -> list[Any]:
        """Caption as an image-to-text pipeline of `transformers` does.

        Returns:
            ``[{"generated_text": caption}, ...]`` of a picture; of a list of pictures, a list of these.

        Raises:
            ImageError: a picture cannot be read.
            ConfigurationError: a search is asked for more captions than it has beams.
        """
        single = isinstance(images, str | PictureFile | Image.Image)
        answers: list[Any] = []
        for batch in in_batches([images] if single else list(images), batch_size):
            pictures = [
                image if isinstance(image, Image.Image) else open_image(image) for image in batch
            ]
            for found in self.candidates(pictures, num_return_sequences, decode=decode):
                answers.append([{"generated_text": candidate.caption} for candidate in found])
        return answers[0] if single else answers

    def save_pretrained(self, folder: str | Path, facts: CardFacts | None = None) -> None:
        """Write a folder that `from_pretrained` and the hub read: what was trained, the recipe and a model card.

        Args:
            facts: what the model card says beside the recipe.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        from vlm_bridge import publishing

        content = {
            "weights": self.model.trained_state_dict(),
            "sizes": checkpoints.captioner_sizes(self.model),
        }
        publishing.write_huggingface_folder(
            content, self.recipe, Path(folder), facts or publishing.CardFacts()
        )

    def push_to_hub(
        self, repo: str, *, private: bool = False, facts: CardFacts | None = None
    ) -> str:
        """Upload to a model repository (``owner/model``), made if need be; returns its address.

        Raises:
            UsageError: ``repo`` is no name of a repository.
            CheckpointError: there is no token (HF_TOKEN), or the hub refuses.
        """
        from vlm_bridge import publishing

        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / (Path(repo).name or "captioner")  # the title of its card
            self.save_pretrained(folder, facts)
            return publishing.push_to_hub(folder, repo, private=private)

    def validate(
        self,
        images: Sequence[CaptionedImage],
        *,
        batch_size: int = 16,
        world: World | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Validation:
        """Loss, perplexity and visual gain on captioned images.

        Args:
            world: the processes that share the work, and all get the result.
        """
        world = world or World(self.model.device)
        data = TokenizedImages(images, self.format)
        encoder: Any = self.model.vision_encoder
        pixels = OnTheFlyPixels(
            [image.path for image in images], lambda x: encoder.preprocess(x).numpy()
        )
        features: Any = pixels
        if len(images) * encoder.num_tokens * encoder.embed_dim * 4 <= VALIDATION_MEMORY:
            # Every image is read twice, with its own captions and with another's: encode it once.
            parts = [
                self.model.features(torch.from_numpy(pixels[np.array(indices)]))
                .float()
                .cpu()
                .numpy()
                for indices in world.share(in_batches(range(len(images)), batch_size))
            ]
            features = np.concatenate(world.interleave(parts))
        return validate(
            self.model,
            data,
            features,
            batch_images=batch_size,
            autocast=self._autocast,
            world=world,
            progress=progress,
        )

    def _caption_batch(
        self, pixels: torch.Tensor, decode: DecodeSettings, per_image: int = 1
    ) -> list[tuple[str, float, bool]]:
        features = self.model.features(pixels)
        with self._autocast():
            # Draws follow from pixels: features round differently in batches of another size.
            keys = image_keys(pixels) if decode.do_sample else None
            captions = self.model.generate(
                features, self.format.prompt_ids, decode, per_image, keys
            )
        text_of = self.model.language_model.decode
        # EOS is one of the new tokens, and cut off.
        return [(text_of(ids), score, len(ids) < decode.max_new_tokens) for ids, score in captions]

    def _autocast(self) -> Any:
        return runtime.autocast(self.model.device, self.recipe.autocast_dtype)


def caption_in_batches(
    images: Sequence[str | PictureFile | Image.Image],
    caption_batch: Callable[[Any], list[tuple[str, float, bool]]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    *,
    prepare: Callable[[list[Image.Image]], Any] = lambda pictures: pictures,
    open_image: Callable[[Any], Image.Image] = open_image,
) -> list[CaptionResult]:
    """Caption pictures in the order given; a broken one gets an ``error``.

    Threads open and prepare the next ``DECODE_AHEAD`` batches meanwhile; no more are held, however many there are.

    Args:
        caption_batch: RGB pictures as ``prepare`` leaves them -> (caption, mean log-probability per token, whether
            it is finished) of each.
        progress: called with the number of pictures done.
        prepare: what can be done with the RGB images of a batch beside the captioning of another.
        open_image: reads a file.
    """

    def read(
        batch: list[str | PictureFile | Image.Image],
    ) -> tuple[list[tuple[str, ImageError | None]], Any]:
        opened = [_open(image, open_image) for image in batch]
        readable = [picture for _, picture in opened if isinstance(picture, Image.Image)]
        outcomes = [
            (name, picture if isinstance(picture, ImageError) else None) for name, picture in opened
        ]
        return outcomes, prepare(readable) if readable else None

    results: list[CaptionResult] = []
    for outcomes, prepared in prefetch(in_batches(list(images), batch_size), read, DECODE_AHEAD):
        captions = iter(caption_batch(prepared) if prepared is not None else [])
        for name, error in outcomes:
            if error is not None:
                results.append(CaptionResult(name, None, None, error.reason))
            else:
                caption, score, finished = next(captions)
                results.append(CaptionResult(name, caption, score, finished=finished))
        progress(len(results))
    return results


def _open(
    image: str | PictureFile | Image.Image, open_image: Callable[[Any], Image.Image]
) -> tuple[str, Image.Image | ImageError]:
    if isinstance(image, Image.Image):
        return "<picture>", upright_rgb(image)
    try:
        return str(image), open_image(image)
    except ImageError as error:
        return str(image), error
