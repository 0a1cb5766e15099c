"""The captioner: frozen vision encoder -> bridge -> language model.

Tensor names carry their shape: b images, r rows of text, n image tokens, t text, h width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from vlm_bridge.configuration import ConfidenceOptions, DecodeSettings, Recipe
from vlm_bridge.data_pipeline.loader import CaptionFormat, hint_tokens, in_batches, with_hint
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import (
    Bridge,
    ImageInputs,
    build_bridge,
)
from vlm_bridge.model_architecture.familiarity import Familiarity
from vlm_bridge.model_architecture.generation import (
    Caption,
    ObjectNamer,
    beams,
    image_keys,
    search,
)
from vlm_bridge.model_architecture.language_model import LanguageModel, packed_positions
from vlm_bridge.model_architecture.loss import CaptionLoss
from vlm_bridge.model_architecture.vision_encoder import (
    ENCODE_TOGETHER_ON_CPU,
    build_vision_encoder,
)
from vlm_bridge.model_architecture.weights import build_language_model

# On a CPU, torch 2.13 runs other kernels for fewer images or rows of text. They round differently,
# and the caption of an image would depend on its batch.
FEWEST_IMAGES, FEWEST_ROWS = 2, 3
TOKENS_PER_WORD = 8  # of a prompt's words, at most
# In a checkpoint, trained or not.
KEPT = ("bridge.", "feature_scale.", "familiarity.", "prompt_delta.")


class FeatureScale(nn.Module):
    """Standardize every feature channel by statistics of training images; identity until then."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, features_bnd: torch.Tensor) -> torch.Tensor:
        return (features_bnd.to(self.mean.dtype) - self.mean) / self.std

    @torch.no_grad()
    def measure(self, features_bnd: torch.Tensor) -> None:
        """Take mean and standard deviation per channel from sample features [B, N, D]."""
        flat = features_bnd.flatten(0, 1).float()
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp_min(1e-6))


class CaptionModel(nn.Module):
    """Composes the three parts; parameters that require gradients are trained."""

    def __init__(
        self,
        vision_encoder: Any,
        language_model: LanguageModel,
        bridge: Bridge,
        *,
        standardize: bool,
        confidence: ConfidenceOptions | None = None,
        prompt_delta: Bridge | None = None,
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.language_model = language_model
        self.bridge = bridge
        # What is added to the bridge's weights where the prompt names an object.
        self.prompt_delta = prompt_delta
        if bridge.output == "key_value_prefix":
            language_model.accept_prefix()
        if bridge.output == "edit":
            language_model.open_layer(bridge.first_layer)
        self.feature_scale = FeatureScale(vision_encoder.embed_dim) if standardize else None
        self.familiarity = None
        if confidence is not None:
            self.familiarity = Familiarity(confidence, vision_encoder.embed_dim)
        # Positions before the text: soft tokens, and the start token before them.
        self.num_soft_positions = bridge.num_soft_tokens + (bridge.num_soft_tokens > 0)
        self._cache_options: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> CaptionModel:
        """Switch the bridge, modules that are trained whole, and the dropout of adapters."""
        super().train(False)
        self.training = mode
        self.bridge.train(mode)
        for module in self.language_model.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and all(p.requires_grad for p in parameters):
                module.train()
            if (dropout := getattr(module, "lora_dropout", None)) is not None:
                dropout.train()
        return self

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return features [B, N, D] of RGB images."""
        return self.features(self.vision_encoder.preprocess(images))

    @torch.no_grad()
    def features(self, pixels_or_features: torch.Tensor) -> torch.Tensor:
        """Return features [B, N, D]; pixels [B, 3, h, w] go through the vision encoder first."""
        values = pixels_or_features.to(self.device)
        if values.ndim == 3:
            return values
        together = ENCODE_TOGETHER_ON_CPU if values.device.type == "cpu" else len(values)
        encode, parts = self.vision_encoder, values.split(max(together, 1))
        with torch.autocast(values.device.type, enabled=False):
            return torch.cat([encode(_filled_up(b, FEWEST_IMAGES))[: len(b)] for b in parts])

    def image_inputs(self, features_bnd: torch.Tensor, *, is_named: bool = False) -> ImageInputs:
        """Return what the language model reads of images; captions of an image share it.

        Args:
            is_named: whether the prompts name objects.

        Raises:
            ModelError: `encode` and `output` of the bridge disagree.
        """
        bridge = self.bridge_for(is_named=is_named)
        image = bridge.encode(self.bridge_features(features_bnd))
        soft = 0 if image.soft_tokens is None else image.soft_tokens.shape[1]
        if getattr(image, bridge.output) is None or soft != bridge.num_soft_tokens:
            raise ModelError(
                f"{type(bridge).__name__} has output={bridge.output!r} and num_soft_tokens="
                f"{bridge.num_soft_tokens}, but its encode returned {soft} soft tokens: make them "
                "agree"
            )
        return image

    def bridge_for(self, *, is_named: bool) -> Bridge:
        """Return the bridge, or for prompts that name objects, a copy with `prompt_delta`."""
        if not is_named or self.prompt_delta is None:
            return self.bridge
        return _moved(self.bridge, self.prompt_delta)

    def bridge_features(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return features [B, N, D] as the bridge reads them: standardized, in its precision."""
        features_bnd = features_bnd.to(self.device)
        if self.feature_scale is not None:
            features_bnd = self.feature_scale(features_bnd)
        return features_bnd.to(next(self.bridge.parameters()).dtype)

    def text_states(
        self,
        input_ids: torch.Tensor,
        image: ImageInputs,
        segments: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the language model's last states [R, T, H] of ``input_ids`` [R, T].

        Args:
            image: of R images, or of fewer that divide R: as many rows side by side read each.
            segments: [R, T] caption numbers of packed rows (0 = pad); None for rows of one caption
                without pads.
            places: [B, L], of B images that share rows (`PackedBatch`).

        Raises:
            ModelError: the language model does not read what the bridge makes.
        """
        num_soft, packed = self.num_soft_positions, {}
        if segments is not None:
            packed["attention_mask"] = self.language_model.packed_mask(segments, num_soft)
            packed["position_ids"] = packed_positions(segments, num_soft)
        with attach(self.language_model, image, places) as attached:
            states = self.language_model.hidden_states(**packed, **attached.inputs(input_ids))
        return states[:, num_soft:]

    def forward(
        self, input_ids: torch.Tensor, image: ImageInputs, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [R, T, vocabulary]; arguments as for `text_states`."""
        return self.language_model.head(self.text_states(input_ids, image, segments))

    def caption_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        segments: torch.Tensor,
        image: ImageInputs,
        places: torch.Tensor | None = None,
        **options: Any,
    ) -> CaptionLoss:
        """Return the loss of packed rows; ``labels[:, t]`` is the token to predict at position t.

        ``options`` are further arguments of `caption_cross_entropy`; others as for `text_states`.
        """
        states = self.text_states(input_ids, image, segments, places)
        return self.language_model.cross_entropy(states, labels, **options)

    @torch.inference_mode()
    def generate(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        decode: DecodeSettings,
        num_return_sequences: int = 1,
        keys: Sequence[int] | None = None,
        hints: Sequence[Sequence[int]] | None = None,
    ) -> list[Caption]:
        """Caption each row of features: the best beams, or as many draws; an image's side by side.

        Args:
            hints: tokens for each image's prompt (`hint_tokens`); None names the objects of
                ``decode.object_threshold``.
            keys: a number for each image, from which its draws follow together with
                ``decode.seed``; None takes the content of its features.

        Raises:
            ConfigurationError: too few positions in the language model, or too few beams.
        """
        if hints is None:
            hints = self.hints(features_bnd, decode)
        longest = len(prompt_ids) + max(map(len, hints), default=0)
        limit = self.language_model.max_positions
        _check_request(decode, num_return_sequences, longest + self.num_soft_positions, limit)
        if decode.do_sample and keys is None:
            keys = image_keys(features_bnd)
        captions: list[list[Caption]] = [[]] * len(features_bnd)
        for length in sorted({len(hint) for hint in hints}):  # rows of one length need no padding
            some = [index for index, hint in enumerate(hints) if len(hint) == length]
            found = self._generate(
                features_bnd[some],
                [with_hint(prompt_ids, hints[index]) for index in some],
                decode,
                num_return_sequences,
                [keys[index] for index in some] if keys is not None else [],
                is_named=length > 0,
            )
            for index, of_image in zip(some, found, strict=True):
                captions[index] = of_image
        return list(chain.from_iterable(captions))

    def _generate(
        self,
        features_bnd: torch.Tensor,
        prompts: list[list[int]],
        decode: DecodeSettings,
        per_image: int,
        keys: list[int],
        is_named: bool,
    ) -> list[list[Caption]]:
        """Return the captions of each image; its prompts have one length."""
        num_images = len(features_bnd)
        features_bnd = _filled_up(features_bnd, -(-FEWEST_ROWS // max(beams(decode), per_image)))
        more = len(features_bnd) - num_images
        found = search(
            self.language_model,
            self.image_inputs(features_bnd, is_named=is_named),
            prompts + prompts[-1:] * more,
            decode,
            keys=keys + keys[-1:] * more,
            per_image=per_image,
            **self._cache_options,
        )
        return in_batches(found, per_image)[:num_images]

    def hints(self, features_bnd: torch.Tensor, decode: DecodeSettings) -> list[list[int]]:
        """Return tokens that name the objects of each image in its prompt; often none."""
        if not decode.object_threshold:
            return [[]] * len(features_bnd)
        thresholds = torch.full((len(features_bnd),), decode.object_threshold)
        if self.familiarity is not None:
            is_unlike = self.familiarity.is_unlike(self.bridge_features(features_bnd)).cpu()
            thresholds[is_unlike] = min(decode.object_threshold, decode.unlike_object_threshold)
        names = self.object_namer(features_bnd, thresholds.tolist(), decode.known_objects)
        return hint_tokens(names, self.language_model.encode_all)

    def use_static_cache(self) -> None:
        """Generate with a KV cache of fixed size, whose step transformers compiles.

        Raises:
            ModelError: the device is no NVIDIA GPU, or the language model cross-attends.
        """
        cross_attends = self.language_model.shape.cross_attention_width is not None
        if self.device.type != "cuda" or cross_attends:
            raise ModelError(
                "generation is compiled on NVIDIA GPUs, and for language models that do not "
                "cross-attend: caption without --compile"
            )
        self.language_model.is_compiled = True
        self._cache_options = {"cache_implementation": "static"}

    @cached_property
    def object_namer(self) -> ObjectNamer:
        """Names for ``decode.object_threshold``; ConfigurationError without a classifier."""
        return ObjectNamer(self.vision_encoder)

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds: trained weights, the bridge, facts of the features."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in trained or name.startswith(KEPT)
        }


def _moved(bridge: Bridge, delta: Bridge) -> Bridge:
    """Return a copy of a bridge with the weights of another one added."""
    bridge = copy.deepcopy(bridge)
    for parameter, difference in zip(bridge.parameters(), delta.parameters(), strict=True):
        parameter.data.add_(difference)
    return bridge


def _check_request(
    decode: DecodeSettings, per_image: int, num_before: int, limit: int | None
) -> None:
    """Raise ConfigurationError for more captions than beams, or more positions than ``limit``."""
    if not decode.do_sample and per_image > decode.num_beams:
        raise ConfigurationError(
            f"num_return_sequences={per_image} is more than decode.num_beams="
            f"{decode.num_beams}: search with more beams, or sample"
        )
    if limit is not None and num_before + decode.max_new_tokens > limit:
        raise ConfigurationError(
            f"decode.max_new_tokens={decode.max_new_tokens} after {num_before} positions of "
            f"prompt and image is more than the language model has, {limit}: ask for fewer"
        )


def _filled_up(tensor_b: torch.Tensor, count: int) -> torch.Tensor:
    """Fill a batch [B, ...] on a CPU up to ``count`` by repeating its last item."""
    if len(tensor_b) >= count or tensor_b.device.type != "cpu":
        return tensor_b
    return tensor_b[torch.arange(count).clamp_max(len(tensor_b) - 1)]


def build_captioner(recipe: Recipe, *, meta: bool = False) -> CaptionModel:
    """Compose the captioner of a recipe; the bridge is initialized from ``recipe.seed``.

    Args:
        meta: build everything on the meta device, without reading weights (for `info`).
    """
    encoder: Any = build_vision_encoder(recipe.vision_encoder, meta=meta)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # of cross-attention that no checkpoint held
        language_model = build_language_model(recipe.language_model, meta=meta)
        torch.manual_seed(recipe.seed)
        bridge = build_bridge(
            recipe.bridge, encoder.embed_dim, language_model.shape, encoder.num_tokens, meta=meta
        )
    if not meta:
        bridge.set_output_scale(language_model.embedding_std())
    standardize = recipe.bridge.standardize_features
    prompt_delta = None
    if recipe.prompt_delta:
        prompt_delta = copy.deepcopy(bridge)
        for parameter in prompt_delta.parameters():
            torch.nn.init.zeros_(parameter)
    model = CaptionModel(
        encoder, language_model, bridge,
        standardize=standardize, confidence=recipe.confidence, prompt_delta=prompt_delta,
    )  # fmt: skip
    choose_trainable(model, recipe.trained)
    if recipe.decode.object_threshold and not meta:
        _ = model.object_namer  # an encoder without a classifier is an error now, not in an epoch
    return model.eval()


def caption_format(language_model: LanguageModel, recipe: Recipe) -> CaptionFormat:
    """Build the format of a language model's captions, cut where its positions end."""
    assert language_model.start_id is not None and language_model.eos_id is not None
    format = CaptionFormat(
        language_model.encode_all,
        start_id=language_model.start_id,
        eos_id=language_model.eos_id,
        prompt=recipe.language_model.prompt,
        max_caption_tokens=recipe.max_caption_tokens,
    )
    if (positions := language_model.max_positions) is None:
        return format
    # The last target is predicted and never read.
    room = positions - len(format.prompt_ids) + 1 - TOKENS_PER_WORD * recipe.prompt_words
    return replace(format, max_caption_tokens=min(format.max_caption_tokens, room))


class TrainedParameter(NamedTuple):
    """A parameter, its (first) name, and the pattern that decides its learning rate."""

    name: str
    parameter: nn.Parameter
    pattern: str


def trained_parameters(model: Any, patterns: Mapping[str, float | None]) -> list[TrainedParameter]:
    """Return the parameters that a shell pattern matches, in the model's order.

    The first pattern that matches decides. A parameter with several names (a head tied to the
    embeddings) is matched by any of them.

    Raises:
        ConfigurationError: a pattern matches nothing, or reaches into the vision encoder.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for parameter, aliases in names.items():
        matching = (p for p in patterns if any(fnmatchcase(alias, p) for alias in aliases))
        if (pattern := next(matching, None)) is not None:
            found.append(TrainedParameter(aliases[0], parameter, pattern))
            if aliases[0].startswith("vision_encoder."):
                raise ConfigurationError(
                    f"trainable: {pattern!r} reaches into the vision encoder, which stays frozen"
                )
    used = {trained.pattern for trained in found}
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ConfigurationError(
            f"trainable: no parameter is left for the pattern {unused[0]!r} (names begin with "
            "bridge. or language_model.causal_lm.)"
        )
    return found


def choose_trainable(model: CaptionModel, patterns: Mapping[str, float | None]) -> None:
    """Let gradients reach the parameters that patterns match and no others.

    Raises:
        ConfigurationError: as `trained_parameters`; or weights are stored in too few bits to be
            trained, or random ones (the bridge, layers that no checkpoint held) would stay random.
    """
    model.requires_grad_(False)
    for name, parameter, _ in trained_parameters(model, patterns):
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"trainable: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}, "
                "in which small updates are lost: use language_model.dtype=float32 (amp_dtype "
                "still computes in 16 bits)"
            )
        parameter.requires_grad_(True)
    fresh = {f"language_model.causal_lm.{name}" for name in model.language_model.fresh_parameters}
    fresh |= {name for name, _ in model.named_parameters() if name.startswith("bridge.")}
    parameters = model.named_parameters(remove_duplicate=False)
    if untrained := sorted(n for n, p in parameters if n in fresh and not p.requires_grad):
        raise ConfigurationError(
            f"trainable: {len(untrained)} parameters start at random and would stay so (first: "
            f"{untrained[0]}): name them too, for example bridge.* or "
            "language_model.*crossattention*"
        )
