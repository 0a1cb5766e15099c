"""Map each word of a caption to the places in the image that it attends to; draw sheets."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_bridge.captioning.pipeline import Captioner, DecodeSettings, opened
from vlm_bridge.data_pipeline.loader import IGNORE_INDEX
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.errors import ImageError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import ImageInputs
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.model_architecture.language_model import LanguageModel

UNLIMITED = 2**31  # tokens of an explained caption
# Colors of viridis (van der Walt & Smith 2015), safe for color-blind readers.
COLD_HOT_MID = ("#440154", "#fde725", "#21918c")
FAINTEST, STRONGEST = 0.45, 0.75  # opacity of the heat map at its coldest and hottest places
EVEN_SCALE = 3.0  # least top of the color scale, in even spreads: even maps stay pale
TILE = (288, 216)  # width and height of an image on a sheet, in pixels
GAP, FONT_SIZE, LINE_HEIGHT = 16, 13, 17
BROKEN = "#ced4da"
NOTE = "Yellow: where a word looked most, and how many times an even spread that is"


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
        area: left, top, right and bottom, in pixels of the image, of what the grid covers.
    """

    caption: str
    words: list[WordAttention]
    area: tuple[float, float, float, float]


def explain(
    captioner: Captioner,
    image: str | Path | Image.Image,
    decode: DecodeSettings | None = None,
    *,
    caption: str | None = None,
) -> Explanation:
    """Compute where each word looks, by the attention of the position that predicts it.

    Attention is averaged over heads and layers, and normalized over the grid of the image.

    Args:
        caption: explain this text instead of generating one with `decode`.

    Raises:
        ImageError: the image cannot be read.
        ModelError: the language model does not return its attention weights.
    """
    image = opened(image)
    if caption is None:
        caption = captioner.caption([image], decode=decode)[0].caption or ""
    model, language_model = captioner.model, captioner.model.language_model
    grid = model.vision_encoder.grid

    whole = replace(captioner.format, max_caption_tokens=UNLIMITED)
    features_bnd = model.encode_images([image])
    (hint,) = model.hints(features_bnd, decode or captioner.recipe.decode)
    tokens = whole.with_targets(whole.targets([caption])[0], hint)
    ids_bt = torch.tensor([tokens.input_ids], device=model.device)
    attention_tn = image_attention(model, features_bnd, ids_bt, is_named=len(hint) > 0)[0]
    on_grid_tn = attention_tn[:, -grid[0] * grid[1] :].double().cpu()

    skipped = {IGNORE_INDEX, *language_model.tokenizer.all_special_ids, language_model.eos_id}
    positions = [t for t, predicted in enumerate(tokens.labels) if predicted not in skipped]
    words = []
    for word, indices in group_words([tokens.labels[t] for t in positions], language_model.decode):
        mass_n = on_grid_tn[[positions[i] for i in indices]].sum(0).clamp_min(1e-38)
        words.append(WordAttention(word, (mass_n / mass_n.sum()).reshape(grid).numpy()))
    return Explanation(caption, words, model.vision_encoder.seen_area(image.size))


@torch.inference_mode()
def image_attention(
    model: CaptionModel,
    features_bnd: torch.Tensor,
    input_ids_bt: torch.Tensor,
    *,
    is_named: bool = False,
) -> torch.Tensor:
    """Return how each text position attends to the image tokens, float32 [B, T, N], not normalized.

    Row t belongs to the position that reads token t and predicts token t + 1. Heads and layers
    count alike; attention to the text and to the start token is left out.

    Raises:
        ModelError: the language model does not return its attention weights.
    """
    image = model.image_inputs(features_bnd, is_named=is_named)
    language_model = model.language_model
    look = _attention_to_image if image.edit is None else _text_before_edit
    with language_model.use_attention("eager"):
        seen_bt = look(language_model, image, input_ids_bt)
    features_bnd = model.bridge_features(features_bnd)
    bridge = model.bridge_for(is_named=is_named)
    return bridge.image_attention(features_bnd, seen_bt.to(features_bnd.dtype)).float()


def _text_before_edit(
    model: LanguageModel, image: ImageInputs, input_ids_bt: torch.Tensor
) -> torch.Tensor:
    """Return the text [B, T, H] that enters the edit."""
    texts: list[torch.Tensor] = []

    def keep(text_bth: torch.Tensor) -> torch.Tensor:
        texts.append(text_bth)
        return text_bth

    with attach(model, replace(image, edit=keep)) as attached:
        model.hidden_states(**attached.inputs(input_ids_bt))
    return texts[0]


def _attention_to_image(
    model: LanguageModel, image: ImageInputs, input_ids_bt: torch.Tensor
) -> torch.Tensor:
    """Return the mean attention [B, T, P] to soft tokens, prefix keys or encoder states."""
    with attach(model, image) as attached:
        output = model.causal_lm.base_model(
            **attached.inputs(input_ids_bt), output_attentions=True, use_cache=False
        )
    layers, columns = output.attentions or (), slice(None)
    if image.encoder_hidden_states is not None:
        layers = output.cross_attentions
    elif image.soft_tokens is not None:  # the start token stands before them
        columns = slice(1, 1 + image.soft_tokens.shape[1])
    elif image.key_value_prefix is not None:
        layers = layers[image.key_value_prefix.first_layer :]
        columns = slice(image.key_value_prefix.states.shape[4])
    if not layers:
        raise ModelError(
            "the language model returns no attention weights: caption without --explain"
        )
    length = input_ids_bt.shape[1]
    return torch.stack([layer[:, :, -length:, columns].float().mean(1) for layer in layers]).mean(0)


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


def word_overlays(explanation: Explanation, image: Image.Image, side: int) -> list[Image.Image]:
    """Return the image under each word's heat map, in order; `side` pixels on the longer side.

    Parts that the encoder does not see stay gray.
    """
    gray = ImageOps.contain(image.convert("L"), (side, side), Image.Resampling.LANCZOS)
    size = np.array([gray.width, gray.height])
    area = np.array(explanation.area).reshape(2, 2) / image.size * size
    start = area[0].round().clip(0, size - 1).astype(int)
    stop = area[1].round().clip(start + 1, size).astype(int)
    overlays = []
    for word in explanation.words:
        ceiling = max(word.map.max(), EVEN_SCALE / word.map.size)
        heat = Image.fromarray((255 * word.map / ceiling).astype(np.uint8))
        heat = heat.resize(tuple((stop - start).tolist()), Image.Resampling.BICUBIC)
        opacity = heat.point(
            [round(255 * FAINTEST + x * (STRONGEST - FAINTEST)) for x in range(256)]
        )
        overlay = gray.convert("RGB")
        overlay.paste(ImageOps.colorize(heat, *COLD_HOT_MID), tuple(start.tolist()), opacity)
        overlays.append(overlay)
    return overlays


def attention_panels(explanation: Explanation, image: Image.Image) -> Image.Image:
    """Draw the image above its caption, and a panel with the highest attention of each word."""
    overlays = word_overlays(explanation, image, max(TILE))
    panels = [SheetItem(image.convert("RGB"), explanation.caption)]
    for word, overlay in zip(explanation.words, overlays, strict=True):
        panels.append(SheetItem(overlay, word.word, f"{word.peak:.1f}x"))
    return draw_sheet(panels, columns=5, title=NOTE if len(panels) > 2 else "")


@dataclass(frozen=True)
class SheetItem:
    """An image with its caption, and a reference and score to compare the caption with."""

    image: ImageFile | bytes | Image.Image
    caption: str
    reference: str = ""
    score: float | None = None

    def text(self) -> str:
        lines = []
        for text in (self.caption or "(no caption)", self.reference):
            lines += textwrap.wrap(text, 42, max_lines=7, placeholder=" ...")
        return "\n".join(lines if self.score is None else [*lines, f"{self.score:.3f}"])


def draw_sheet(items: Sequence[SheetItem], *, columns: int = 4, title: str = "") -> Image.Image:
    """Draw images in rows of `columns`, each above its caption, reference and score.

    An image that cannot be read becomes a gray tile.
    """
    columns = max(1, min(columns, len(items)))
    texts = [item.text() for item in items]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    width, height, top = TILE[0] + GAP, TILE[1] + lines * LINE_HEIGHT + GAP, 40
    size = (columns * width + GAP, top + -(-len(items) // columns) * height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 10), title, "black", _font(title, 16))
    for index, (item, text) in enumerate(zip(items, texts, strict=True)):
        x, y = GAP + index % columns * width, top + index // columns * height
        tile = thumbnail(item.image, TILE) or Image.new("RGB", TILE, BROKEN)
        sheet.paste(ImageOps.pad(tile, TILE, color="#f1f3f5"), (x, y))
        pen.text((x, y + TILE[1] + 4), text, "black", _font(text, FONT_SIZE), spacing=3)
    return sheet


def thumbnail(image: ImageFile | bytes | Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """Return the image scaled to fit `size` (width, height); None if it cannot be read."""
    try:
        return ImageOps.contain(opened(image), size, Image.Resampling.LANCZOS)
    except ImageError:
        return None


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, which has only ASCII, or a system font for other text."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
