"""Captions by transformers' own `generate`, with scores and reproducible draws for each image."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.attach import Attached, attach
from vlm_bridge.model_architecture.bridges import ImageInputs
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.vision_encoder import EfficientNetLiteEncoder


class Caption(NamedTuple):
    """A caption.

    Attributes:
        ids: token ids without prompt and EOS.
        score: mean log-probability per token in nats, EOS included.
    """

    ids: list[int]
    score: float


def beams(decode: DecodeSettings) -> int:
    """Return the beams of a search; each draw stands alone."""
    return 1 if decode.do_sample else decode.num_beams


def search(
    model: LanguageModel,
    image: ImageInputs,
    prompts: Sequence[Sequence[int]],
    decode: DecodeSettings,
    *,
    keys: Sequence[int] = (),
    per_image: int = 1,
    **options: Any,
) -> list[Caption]:
    """Caption images with a language model's own ``generate``, by the settings of a recipe.

    Args:
        prompts: token ids of each image's prompt, of one length.
        keys: of the images (`image_keys`), where tokens are drawn.
        per_image: captions of each image.
        options: further ones of ``generate``.
    """
    prompt_rt = prompt_bt = torch.tensor(prompts, device=model.device)
    if beams(decode) == 1:  # else transformers itself makes a row for each beam
        prompt_rt = prompt_rt.repeat_interleave(per_image, dim=0)
    num_rows = len(prompt_rt)
    log_probs = TokenLogProbs(model.eos_id, beams(decode))
    processors = [log_probs, *_penalties(decode, prompt_rt, model.eos_id)]
    if beams(decode) > 1:  # transformers warns about options that a way of decoding does not read
        options |= {"length_penalty": decode.length_penalty, "num_return_sequences": per_image}
    if decode.do_sample:
        draw = Draw(decode, keys, per_image, prompt_rt.device)
        if decode.temperature != 1:
            processors.append(TemperatureLogitsWarper(decode.temperature))
        if decode.top_p < 1:  # it sorts the vocabulary
            processors.append(TopPLogitsWarper(decode.top_p))
        processors.append(draw)
    with attach(model, image) as attached, rounded_weights(model.causal_lm):
        rows_of_image = beams(decode) * num_rows // len(prompt_bt)
        options |= _image_cache(model, attached, prompt_bt, rows_of_image)
        inputs = attached.inputs(prompt_rt)
        length = inputs.get("inputs_embeds", prompt_rt).shape[1]
        # Beside soft tokens too, `generate` gets the prompt's ids: penalties count them.
        inputs |= {"input_ids": prompt_rt, "attention_mask": prompt_rt.new_ones(num_rows, length)}
        output = model.causal_lm.generate(
            **(inputs | options),
            num_beams=beams(decode),
            max_new_tokens=decode.max_new_tokens,
            logits_processor=LogitsProcessorList(processors),
            return_dict_in_generate=True,
        )
    ids_st = output.sequences[:, prompt_rt.shape[1] :]
    rows_st = getattr(output, "beam_indices", None)
    if rows_st is None:
        rows_st = torch.arange(len(ids_st), device=ids_st.device)[:, None].expand_as(ids_st)
    return _captions(ids_st, log_probs.of(ids_st, rows_st.long().clamp_min(0)), model.eos_id)


class ImageCache(DynamicCache):
    """Keys and values of images, the same for all beams of one: a new order changes nothing."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        pass


def _image_cache(
    model: LanguageModel, attached: Attached, prompt_bt: torch.Tensor, per_image: int
) -> dict[str, Any]:
    """Return a cache with the image's keys and values, if the model cross-attends.

    They are computed once an image and repeated for ``per_image`` rows. transformers' own cache
    keeps them for some families only.
    """
    if model.shape.cross_attention_width is None:
        return {}
    config, of_images = model.text_config, ImageCache(config=model.text_config)
    takes = inspect.signature(model.causal_lm.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # since 5.24, and before
    if per_image > 1:
        cache = EncoderDecoderCache(DynamicCache(config=config), of_images)
        model.causal_lm(**attached.inputs(prompt_bt), use_cache=True, **{name: cache})
        of_images.batch_repeat_interleave(per_image)
    return {name: EncoderDecoderCache(DynamicCache(config=config), of_images)}


@contextmanager
def rounded_weights(module: nn.Module) -> Iterator[None]:
    """Hold linear layers in autocast's precision within a block: it would round them at each token.

    Trained weights are stored in float32, and come back at the end.
    """
    device = next(module.parameters()).device.type
    linears = [
        (layer, layer.weight)
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32
    ]
    if not torch.is_autocast_enabled(device):
        linears = []
    try:
        for layer, weight in linears:
            rounded = weight.detach().to(torch.get_autocast_dtype(device))
            layer.weight = nn.Parameter(rounded, requires_grad=False)
        yield
    finally:
        for layer, weight in linears:
            layer.weight = weight


def _captions(ids_st: torch.Tensor, log_probs_st: torch.Tensor, eos_id: int) -> list[Caption]:
    """Cut captions at their EOS, whose log-probability counts."""
    is_eos = ids_st == eos_id
    is_kept = is_eos.cumsum(1) - is_eos.long() == 0
    scores = log_probs_st.masked_fill(~is_kept, 0).sum(1) / is_kept.sum(1)
    ends = (is_kept & ~is_eos).sum(1)
    return [
        Caption(ids[:end], score)
        for ids, end, score in zip(ids_st.tolist(), ends.tolist(), scores.tolist(), strict=True)
    ]


def _penalties(
    decode: DecodeSettings, prompt_rt: torch.Tensor, eos_id: int
) -> list[LogitsProcessor]:
    """Return the penalties of a search, in transformers' order."""
    found: list[LogitsProcessor] = []
    if decode.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(decode.repetition_penalty))
    if decode.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(decode.no_repeat_ngram_size))
    if decode.min_new_tokens:
        limits = (prompt_rt.shape[1], decode.min_new_tokens, eos_id, str(prompt_rt.device))
        found.append(MinNewTokensLengthLogitsProcessor(*limits))
    return found


def image_keys(tensor_b: torch.Tensor) -> list[int]:
    """Return a number for each image, from its content alone: pixels or features [B, ...]."""
    arrays = tensor_b.detach().float().cpu().contiguous().numpy()
    return [
        int.from_bytes(hashlib.blake2b(array.tobytes(), digest_size=8).digest(), "little")
        for array in arrays
    ]


class Draw(LogitsProcessor):
    """Draws a token for every row and leaves no other.

    Random numbers of a row follow from (seed, image key, alternative): a draw does not depend on
    the batch. Rows of an image are side by side.
    """

    def __init__(
        self, decode: DecodeSettings, keys: Sequence[int], per_image: int, device: torch.device
    ):
        rows = [(decode.seed, key, other) for key in keys for other in range(per_image)]
        count = decode.max_new_tokens
        numbers = [np.random.default_rng(row).random(count, np.float32) for row in rows]
        self.uniform_rt = torch.from_numpy(np.stack(numbers)).to(device)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the token at which the cumulative probability passes the row's random number.

        NaN scores leave the last token; `torch.multinomial` would abort on a GPU.
        """
        cumulative_rv = scores.float().softmax(-1).cumsum(-1)
        uniform_r1 = self.uniform_rt[:, self.step, None]
        self.step += 1
        ids_r1 = torch.searchsorted(cumulative_rv, uniform_r1 * cumulative_rv[:, -1:], right=True)
        ids_r1.clamp_max_(scores.shape[1] - 1)  # a product may be rounded up to the sum itself
        return torch.full_like(scores, -torch.inf).scatter(1, ids_r1, 0.0)


class TokenLogProbs(LogitsProcessor):
    """Keeps the log-probability of every token that a search chooses, as the model gives it.

    It must be the first processor. The scores of a step are kept until the next step shows which
    tokens were chosen: those of all steps would fill the memory. A search chooses among ``group``
    rows of an image.
    """

    def __init__(self, eos_id: int, group: int):
        self.eos_id = eos_id
        self.group = group
        self.ids_trk: list[torch.Tensor] = []
        self.values_trk: list[torch.Tensor] = []
        self.last_rv: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.last_rv is not None:
            # A token of a step ends a caption, or some beam of the image continues with it.
            chosen_rk = input_ids[:, -1].view(-1, self.group).repeat_interleave(self.group, dim=0)
            ids_rk = nn.functional.pad(chosen_rk, (0, 1), value=self.eos_id)
            self.ids_trk.append(ids_rk)
            self.values_trk.append(self.last_rv.gather(1, ids_rk))
        # Those of a beam search are log-probabilities already.
        self.last_rv = scores if self.group > 1 else scores.float().log_softmax(-1)
        return scores

    def of(self, ids_st: torch.Tensor, rows_st: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [S, T] of the tokens of S captions; undefined after EOS.

        Args:
            rows_st: the row that each token was chosen from (transformers' ``beam_indices``).
        """
        assert self.last_rv is not None
        columns = []
        for step, (ids_s, rows_s) in enumerate(zip(ids_st.T, rows_st.T, strict=True)):
            if step == len(self.ids_trk):
                columns.append(self.last_rv[rows_s, ids_s])
                continue
            is_it_sk = self.ids_trk[step][rows_s] == ids_s[:, None]
            values_sk = self.values_trk[step][rows_s]
            columns.append(values_sk.masked_fill(~is_it_sk, -torch.inf).amax(1))
        return torch.stack(columns, dim=1)


class ObjectNamer:
    """Names the objects in an image by the encoder's ImageNet classifiers.

    Classes that share a name are one object, such as the breeds of cats. Of several encoders, the
    mean of their probabilities counts.

    Raises:
        ConfigurationError: no part of the encoder has a classifier.
    """

    def __init__(self, vision_encoder: nn.Module):
        self._classifiers = _classifiers_of(vision_encoder)
        objects, self.names = imagenet_objects(), object_names()
        self._members = torch.zeros(self._classifiers[0][1].out_features, len(self.names))
        for index, name in objects.items():
            self._members[index, self.names.index(name)] = 1

    @torch.no_grad()
    def probabilities(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return the probability [B, names] of each object of features [B, N, D]."""
        found = [
            classify(features_bnd[..., channels].float().mean(1).cpu()).softmax(-1)
            for channels, classify in self._classifiers
        ]
        return torch.stack(found).mean(0) @ self._members

    def __call__(
        self, features_bnd: torch.Tensor, thresholds: Sequence[float], known: Collection[str] = ()
    ) -> list[list[str]]:
        """Return the likeliest object of each image; none below its threshold, none ``known``."""
        values, indices = self.probabilities(features_bnd).max(-1)
        names = [self.names[index] for index in indices.tolist()]
        return [
            [name] if value >= threshold and name not in known else []
            for value, threshold, name in zip(values.tolist(), thresholds, names, strict=True)
        ]


@cache
def imagenet_objects() -> dict[int, str]:
    """Return what captions call ImageNet's classes, by number; some have no name."""
    table = resources.files("vlm_bridge.model_architecture") / "imagenet_objects.txt"
    names = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            classes, name = line.split(" ", 1)
            first, _, last = classes.partition("-")
            names.update(dict.fromkeys(range(int(first), int(last or first) + 1), name))
    return names


def object_names() -> list[str]:
    """Return the names of `imagenet_objects`, each once, sorted."""
    return sorted(set(imagenet_objects().values()))


def _classifiers_of(encoder: Any) -> list[tuple[slice, nn.Linear]]:
    """Return the channels of the features that each classifier reads, and the classifier."""
    found, end = [], 0
    for part in getattr(encoder, "encoders", [encoder]):
        end += part.embed_dim
        is_lite = isinstance(part, EfficientNetLiteEncoder)
        if is_lite and (classifier := part.classifier()) is not None:
            found.append((slice(end - classifier.in_features, end), classifier))
    if found:
        return found
    raise ConfigurationError(
        "decode.object_threshold needs a vision encoder that classifies: an EfficientNet-Lite "
        "whose last layer is among vision_encoder.layers; set it to 0"
    )
