"""Captions by transformers' own `generate`, with scores and reproducible draws for each image."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Sequence
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
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import ImageInputs
from vlm_bridge.model_architecture.language_model import LanguageModel
from vlm_bridge.model_architecture.vision_encoder import EfficientNetLiteEncoder

SURE = 0.5  # probability from which on an object is named
# Alternative names of an object as tokens: `` cat`` or `` cats``; empty to name nothing.
Names = Sequence[tuple[int, ...]]


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
    prompt_ids: Sequence[int],
    decode: DecodeSettings,
    *,
    keys: Sequence[int] = (),
    per_image: int = 1,
    more: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> list[Caption]:
    """Caption images with a language model's own ``generate``, by the settings of a recipe.

    Args:
        keys: of the images (`image_keys`), where tokens are drawn.
        per_image: captions of each image.
        more: further processors, applied after the penalties.
        options: further ones of ``generate``.
    """
    # transformers itself makes a row for each beam.
    num_rows = image.num_images * (1 if beams(decode) > 1 else per_image)
    prompt_rt = torch.tensor([list(prompt_ids)], device=model.device).repeat(num_rows, 1)
    log_probs = TokenLogProbs(model.eos_id, beams(decode))
    processors = [log_probs, *_penalties(decode, prompt_rt, model.eos_id), *more]
    if beams(decode) > 1:  # transformers warns about options that a way of decoding does not read
        options |= {"length_penalty": decode.length_penalty, "num_return_sequences": per_image}
    if decode.do_sample:
        draw = Draw(decode, keys, per_image, prompt_rt.device)
        processors += [TemperatureLogitsWarper(decode.temperature), TopPLogitsWarper(decode.top_p)]
        processors.append(draw)
    with attach(model, image) as attached:
        inputs = attached.inputs(prompt_rt)
        length = inputs.get("inputs_embeds", prompt_rt).shape[1]
        # Beside soft tokens too, `generate` gets the prompt's ids: penalties count them.
        inputs |= {"input_ids": prompt_rt, "attention_mask": prompt_rt.new_ones(num_rows, length)}
        output = model.causal_lm.generate(
            **(inputs | _cross_attention_cache(model) | options),
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


def _cross_attention_cache(model: LanguageModel) -> dict[str, Any]:
    """Return a cache that also keeps the keys and values of an image, if the model cross-attends.

    transformers makes one for some families only.
    """
    if model.shape.cross_attention_width is None:
        return {}
    config = model.text_config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    takes = inspect.signature(model.causal_lm.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}  # since 5.24, and before


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
        self.last_rv = scores.float().log_softmax(-1)
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
    """Finds the object in an image by the encoder's ImageNet classifier, and its name as tokens.

    For objects that the training captions never named (Anderson et al. 2017; here the constraint is
    soft). Classes that share a name are one object, such as the breeds of cats.

    Raises:
        ConfigurationError: no part of the encoder has a classifier.
    """

    def __init__(self, vision_encoder: nn.Module, language_model: LanguageModel):
        self._channels, self._classifier = _classifier_of(vision_encoder)
        objects = imagenet_objects()
        forms = sorted(set(objects.values()))
        self._objects = [singular for singular, _ in forms]
        self._members = torch.zeros(self._classifier.out_features, len(forms))
        for index, names in objects.items():
            self._members[index, forms.index(names)] = 1
        encoded = language_model.encode_all([f" {form}" for names in forms for form in names])
        tokens = list(map(tuple, encoded))
        self._names: list[Names] = list(zip(tokens[::2], tokens[1::2], strict=True))

    @torch.no_grad()
    def __call__(self, features_bnd: torch.Tensor, known: Collection[str] = ()) -> list[Names]:
        """Name the object in each image of features [B, N, D], if it is sure and not ``known``."""
        pooled_bd = features_bnd[..., self._channels].float().mean(1).cpu()
        probabilities_bo = self._classifier(pooled_bd).softmax(-1) @ self._members
        likeliest, objects = probabilities_bo.max(-1)
        return [
            self._names[index] if probability >= SURE and self._objects[index] not in known else []
            for probability, index in zip(likeliest.tolist(), objects.tolist(), strict=True)
        ]


class ObjectBonus(LogitsProcessor):
    """Adds a bonus to the score of a caption that begins to name the object of its image.

    A name is rewarded once, by ``bonus`` nats, and its further tokens are enforced. The first token
    of a caption gets no bonus, since a name follows an article. Captions of an image are side by
    side.
    """

    def __init__(self, names: Sequence[Names], bonus: float, prompt_length: int):
        self.names = names
        self.bonus = bonus
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.prompt_length or not any(self.names):
            return scores
        scores = scores.clone()
        per_image = len(input_ids) // len(self.names)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            names, caption = self.names[row // per_image], tuple(ids)
            starts = range(len(ids))
            if any(caption[at : at + len(name)] == name for name in names for at in starts):
                continue
            begun = ((name, n) for name in names for n in range(1, len(name)))
            follows = sorted({name[n] for name, n in begun if caption[-n:] == name[:n]})
            if not follows:
                scores[row, sorted({name[0] for name in names})] += self.bonus
            elif not torch.isneginf(allowed := scores[row, follows].clone()).all():
                # A forbidden repetition stays forbidden.
                scores[row] = -torch.inf
                scores[row, follows] = allowed
        return scores


@cache
def imagenet_objects() -> dict[int, tuple[str, str]]:
    """Return names and plurals of ImageNet's classes in captions, by number; some have none."""
    table = resources.files("vlm_bridge.model_architecture") / "imagenet_objects.txt"
    names = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            classes, forms = line.split(" ", 1)
            first, _, last = classes.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names.update(dict.fromkeys(numbers, tuple(forms.split(", "))))
    return names


def _classifier_of(encoder: Any) -> tuple[slice, nn.Linear]:
    """Return the channels of the features that the first classifier reads, and the classifier."""
    end = 0
    for part in getattr(encoder, "encoders", [encoder]):
        end += part.embed_dim
        is_lite = isinstance(part, EfficientNetLiteEncoder)
        if is_lite and (classifier := part.classifier()) is not None:
            return slice(end - classifier.in_features, end), classifier
    raise ConfigurationError(
        "decode.object_bonus needs a vision encoder that classifies: an EfficientNet-Lite whose "
        "last layer is among vision_encoder.layers; set it to 0"
    )
