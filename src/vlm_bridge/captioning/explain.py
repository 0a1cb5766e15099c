"""Map each word of a caption to the places in the image that it attends to."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_bridge.captioning.pipeline import Captioner, DecodeSettings
from vlm_bridge.data_pipeline.images import open_image, upright_rgb
from vlm_bridge.data_pipeline.loader import IGNORE_INDEX
from vlm_bridge.model_architecture.captioner import image_attention

__all__ = ["Explanation", "WordAttention", "explain"]

UNLIMITED = 2**31  # tokens of an explained caption


@dataclass(frozen=True, eq=False)
class WordAttention:
    """A word and its attention over the encoder's grid: `map` [rows, columns] sums to 1."""

    word: str
    map: np.ndarray

    @property
    def peak(self) -> float:
        """The highest attention of the map, as a multiple of an even spread."""
        return float(self.map.max() * self.map.size)


@dataclass(frozen=True, eq=False)
class Explanation:
    """A caption and the attention of its words, in order; punctuation has none.

    Attributes:
        area: left, top, right and bottom, in pixels of the picture, of what the grid covers.
    """

    caption: str
    words: list[WordAttention]
    area: tuple[float, float, float, float]


def explain(
    captioner: Captioner,
    picture: str | Path | Image.Image,
    decode: DecodeSettings | None = None,
    *,
    caption: str | None = None,
) -> Explanation:
    """Compute where each word looks, by the attention of the position that predicts it.

    Attention is averaged over heads and layers, and normalized over the grid of the image: text,
    start, class and register tokens are left out.

    Args:
        decode: how to generate the caption; None means the recipe's settings.
        caption: explain this text instead of generating one.

    Raises:
        ImageError: the image cannot be read.
        ModelError: the language model does not return its attention weights.
    """
    image = upright_rgb(picture) if isinstance(picture, Image.Image) else open_image(picture)
    if caption is None:
        caption = captioner.caption([image], decode=decode)[0].caption or ""
    model, language_model = captioner.model, captioner.model.language_model
    encoder: Any = model.vision_encoder

    tokens = replace(captioner.format, max_caption_tokens=UNLIMITED).tokenize(caption)
    ids_bt = torch.tensor([tokens.input_ids], device=model.device)
    attention_tn = image_attention(model, model.encode_images([image]), ids_bt)[0]
    on_grid_tn = attention_tn[:, -encoder.grid[0] * encoder.grid[1] :].cpu()

    skipped = {IGNORE_INDEX, *language_model.tokenizer.all_special_ids, language_model.eos_id}
    positions = [t for t, predicted in enumerate(tokens.labels) if predicted not in skipped]
    words = group_words([tokens.labels[t] for t in positions], language_model.decode)
    maps = [
        WordAttention(word, _as_map(on_grid_tn[[positions[i] for i in indices]], encoder.grid))
        for word, indices in words
    ]
    return Explanation(caption, maps, encoder.seen_area(image.size))


def group_words(
    ids: Sequence[int], decode: Callable[[list[int]], str]
) -> list[tuple[str, list[int]]]:
    """Return words without outer punctuation, each with the indices of its tokens.

    Decoding growing prefixes places the tokens of any kind of tokenizer.
    """
    text = decode(list(ids))
    marks = "".join(char for char in text if unicodedata.category(char).startswith("P"))
    last_characters = [len(decode(list(ids[: i + 1]))) - 1 for i in range(len(ids))]
    for i in reversed(range(len(ids) - 1)):
        if not decode([ids[i]]):  # a blank of its own begins the word behind it
            last_characters[i] = last_characters[i + 1]
    words = []
    for run in re.finditer(r"\S+", text):
        word = run[0].strip(marks)
        start = run.start() + run[0].find(word)
        indices = [i for i, last in enumerate(last_characters) if start <= last < start + len(word)]
        if indices:
            words.append((word, indices))
    return words


def _as_map(attention_tn: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return the map [rows, columns] of a word from the rows of its tokens."""
    mass_n = attention_tn.double().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    return (mass_n / mass_n.sum()).reshape(grid).numpy()
