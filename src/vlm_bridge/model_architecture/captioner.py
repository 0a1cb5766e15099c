"""The captioner: frozen vision encoder -> bridge -> language model.

Tensor names carry their shape: b images, r rows of text, n image tokens, t text, h width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlm_bridge.configuration import BridgeOptions, DecodeSettings, Recipe
from vlm_bridge.data_pipeline.loader import CaptionFormat
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import BRIDGES, ImageInputs, TextShape
from vlm_bridge.model_architecture.generation import Caption, draws_beams, image_keys, search
from vlm_bridge.model_architecture.language_model import (
    LanguageModel,
    cross_attention_cache,
    packed_positions,
)
from vlm_bridge.model_architecture.loss import CaptionLoss, caption_cross_entropy
from vlm_bridge.model_architecture.object_names import ObjectBonus, ObjectNamer
from vlm_bridge.model_architecture.trainable import choose_trainable
from vlm_bridge.model_architecture.vision_encoder import (
    ENCODE_TOGETHER_ON_CPU,
    build_vision_encoder,
)
from vlm_bridge.model_architecture.weights import build_language_model

# On a CPU, torch 2.13 runs other kernels for fewer images or rows of text. They round differently,
# and the caption of an image would depend on its batch.
FEWEST_IMAGES, FEWEST_ROWS = 2, 3
MAX_RETURN_SEQUENCES = 1_000


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
        self, vision_encoder: Any, language_model: LanguageModel, bridge: Any, *, standardize: bool
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.language_model = language_model
        self.bridge = bridge
        self.edits_text = isinstance(bridge, BRIDGES["cross_attention"])
        if isinstance(bridge, BRIDGES["deep_prefix"]):
            language_model.accept_prefix()
        if self.edits_text:
            language_model.open_layer(bridge.first_layer)
        if self.edits_text and bridge.first_layer == 0:
            language_model.check_embedding_scale()
        self.feature_scale = FeatureScale(vision_encoder.embed_dim) if standardize else None
        self._cache_options: dict[str, Any] = {}
        self._object_namer: ObjectNamer | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def edits_scaled_embeddings(self) -> bool:
        """Whether its bridge changes token embeddings that the language model then scales."""
        edits_embeddings = self.edits_text and self.bridge.first_layer == 0
        return edits_embeddings and float(self.language_model.embedding_scale) != 1

    def train(self, mode: bool = True) -> CaptionModel:
        """Switch the bridge, and modules that are trained whole; frozen parts get no dropout."""
        super().train(False)
        self.training = mode
        self.bridge.train(mode)
        if mode and self.language_model.is_trained:
            for module in self.language_model.modules():
                parameters = list(module.parameters())
                if parameters and all(parameter.requires_grad for parameter in parameters):
                    module.train()
        return self

    # Image side: once per image.

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
        with torch.autocast(values.device.type, enabled=False):
            parts = [
                self.vision_encoder(filled_up(some, FEWEST_IMAGES))[: len(some)]
                for some in values.split(max(together, 1))
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def image_inputs(self, features_bnd: torch.Tensor) -> ImageInputs:
        """Return what the language model reads of images; captions of an image share it."""
        return self.bridge.encode(self.bridge_features(features_bnd))

    def bridge_features(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Return features [B, N, D] as the bridge reads them: standardized, in its precision."""
        features_bnd = features_bnd.to(self.device)
        if self.feature_scale is not None:
            features_bnd = self.feature_scale(features_bnd)
        return features_bnd.to(next(self.bridge.parameters()).dtype)

    # Text side: training.

    def text_states(
        self, input_ids: torch.Tensor, image: ImageInputs, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the language model's last states [R, T, H] of ``input_ids`` [R, T].

        Args:
            image: of R images, or of fewer that divide R: as many rows side by side read each.
            segments: [R, T] caption numbers of packed rows (0 = pad); None for rows of one caption
                without pads.

        Raises:
            ModelError: the language model does not read what the bridge makes.
        """
        num_soft = self._num_soft_positions
        packed: dict[str, Any] = {}
        if segments is not None:
            packed["attention_mask"] = self.language_model.packed_mask(segments, num_soft)
            packed["position_ids"] = packed_positions(segments, num_soft)
        with attach(self.language_model, image) as attached:
            states = self.language_model.hidden_states(**packed, **attached.inputs(input_ids))
            attached.check_it_was_read()
        return states[:, num_soft:]

    @property
    def _num_soft_positions(self) -> int:
        """Positions before the text: soft tokens, and the start token before them."""
        num_soft = self.bridge.num_soft_tokens
        return num_soft + (num_soft > 0)

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
        supervised: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> CaptionLoss:
        """Return the loss of packed rows; ``labels[:, t]`` is the token to predict at position t.

        The last three arguments are those of `caption_cross_entropy`.
        """
        head = self.language_model.head_module
        return caption_cross_entropy(
            self.text_states(input_ids, image, segments),
            labels,
            self.language_model.head,
            head_is_trained=any(p.requires_grad for p in head.parameters()),
            supervised_v=supervised,
            weights_v=weights,
            label_smoothing=label_smoothing,
        )

    # Captioning.

    @torch.inference_mode()
    def generate(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        decode: DecodeSettings,
        num_return_sequences: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Caption]:
        """Caption each row of features: the best beams, or as many draws; an image's side by side.

        Args:
            keys: a number for each image, from which its draws follow together with
                ``decode.seed``; None takes the content of its features.

        Raises:
            ConfigurationError: captions may become longer than the language model can count, or
                more captions are asked for than there are beams.
        """
        num_before = len(prompt_ids) + self._num_soft_positions
        limit = self.language_model.max_positions
        _check_lengths(decode, num_return_sequences, num_before, limit)
        if decode.do_sample and keys is None:
            keys = image_keys(features_bnd)
        num_captions = len(features_bnd) * num_return_sequences
        together = 1  # beams are drawn for one image at a time, whatever the batch
        if not draws_beams(decode):
            num_images = -(-FEWEST_ROWS // max(decode.num_beams, num_return_sequences))
            features_bnd = filled_up(features_bnd, num_images)
            together = max(len(features_bnd), 1)
            keys = keys and [*keys, *[keys[-1]] * num_images][:together]
        captions: list[Caption] = []
        for start in range(0, len(features_bnd), together):
            part = slice(start, start + together)
            captions += self._search(
                features_bnd[part], prompt_ids, decode, num_return_sequences, keys and keys[part]
            )
        return captions[:num_captions]

    def _search(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        decode: DecodeSettings,
        per_image: int,
        keys: Sequence[int] | None,
    ) -> list[Caption]:
        model = self.language_model
        # transformers itself makes a row for each beam.
        num_rows = len(features_bnd) * (1 if decode.num_beams > 1 else per_image)
        prompt_rt = torch.tensor([list(prompt_ids)], device=self.device).repeat(num_rows, 1)
        bonus = []
        if decode.object_bonus:
            names = self.object_namer()(features_bnd, decode.known_objects)
            bonus = [ObjectBonus(names, decode.object_bonus, len(prompt_ids))]
        with attach(model, self.image_inputs(features_bnd)) as attached:
            inputs = attached.inputs(prompt_rt)
            length = inputs.get("inputs_embeds", prompt_rt).shape[1]
            # Beside soft tokens too, `generate` gets the prompt's ids: penalties count them.
            inputs |= {
                "input_ids": prompt_rt,
                "bos_token_id": model.start_id,
                "pad_token_id": model.eos_id,
                "attention_mask": prompt_rt.new_ones(num_rows, length),
            }
            options = {**inputs, **cross_attention_cache(model), **self._cache_options}
            captions = search(
                partial(model.causal_lm.generate, **options),
                prompt_rt,
                decode,
                model.eos_id,
                keys=keys,
                per_image=per_image,
                more=bonus,
            )
            attached.check_it_was_read()
        return captions

    def use_static_cache(self) -> None:
        """Generate with a KV cache of fixed size, whose step transformers compiles (NVIDIA GPUs).

        Raises:
            ModelError: the device is no NVIDIA GPU, or the language model cross-attends.
        """
        if self.device.type != "cuda":
            raise ModelError(
                f"transformers compiles generation for NVIDIA GPUs, not for {self.device.type}"
            )
        if self.language_model.shape.cross_attention_width is not None:
            raise ModelError(
                f"{type(self.language_model.causal_lm).__name__} cross-attends, and its cache "
                "cannot be of fixed size: caption without --compile"
            )
        self.language_model.is_compiled = True
        self._cache_options = {"cache_implementation": "static"}

    def object_namer(self) -> ObjectNamer:
        """Return the names for ``decode.object_bonus``; ConfigurationError without a classifier."""
        if self._object_namer is None:
            self._object_namer = ObjectNamer(self.vision_encoder, self.language_model)
        return self._object_namer

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds: trained weights, the bridge, feature statistics."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in trained or name.startswith(("bridge.", "feature_scale."))
        }


@torch.inference_mode()
def image_attention(
    model: CaptionModel, features_bnd: torch.Tensor, input_ids_bt: torch.Tensor
) -> torch.Tensor:
    """Return how each text position attends to the image tokens, float32 [B, T, N], not normalized.

    Row t belongs to the position that reads token t and predicts token t + 1. Heads and layers
    count alike; attention to the text and to the start token is left out.

    Args:
        features_bnd: as the vision encoder gives them.
        input_ids_bt: rows of one caption without pads.

    Raises:
        ModelError: the language model does not return its attention weights.
    """
    language_model, image = model.language_model, model.image_inputs(features_bnd)
    texts: list[torch.Tensor] = []
    if (edit := image.edit) is not None:

        def keep_text(text_bth: torch.Tensor) -> torch.Tensor:
            texts.append(text_bth)
            return edit(text_bth)

        image = replace(image, edit=keep_text)
    with language_model.use_attention("eager"), attach(language_model, image) as attached:
        output = language_model.causal_lm.base_model(
            **attached.inputs(input_ids_bt), output_attentions=True, use_cache=False
        )
    features_bnd = model.bridge_features(features_bnd)
    seen_bt = texts[0] if texts else _attention_to(image, output, input_ids_bt.shape[1])
    return model.bridge.image_attention(features_bnd, seen_bt.to(features_bnd.dtype)).float()


def _attention_to(image: ImageInputs, output: Any, length: int) -> torch.Tensor:
    """Return the mean attention [B, T, P] of the last T positions to soft tokens or the like."""
    if image.encoder_hidden_states is not None:
        layers, columns = output.cross_attentions, slice(None)
    elif image.soft_tokens is not None:
        # The start token stands before the soft tokens.
        layers, columns = output.attentions, slice(1, 1 + image.soft_tokens.shape[1])
    else:
        prefix = image.key_value_prefix
        assert prefix is not None
        layers = (output.attentions or ())[prefix.first_layer :]
        columns = slice(prefix.states.shape[4])
    if not layers:
        raise ModelError(
            "the language model does not return its attention weights: its captions cannot be "
            "explained"
        )
    return torch.stack([layer[:, :, -length:, columns].float().mean(1) for layer in layers]).mean(0)


def _check_lengths(
    decode: DecodeSettings, per_image: int, num_before: int, limit: int | None
) -> None:
    if per_image > MAX_RETURN_SEQUENCES:
        raise ConfigurationError(
            f"num_return_sequences must be at most {MAX_RETURN_SEQUENCES}, not {per_image}"
        )
    is_search = not decode.do_sample or decode.num_beams > 1
    if is_search and per_image > decode.num_beams:
        raise ConfigurationError(
            f"num_return_sequences={per_image} is more than decode.num_beams={decode.num_beams}: "
            "search with more beams, or sample"
        )
    if limit is not None and num_before + decode.max_new_tokens > limit:
        raise ConfigurationError(
            f"decode.max_new_tokens={decode.max_new_tokens} after {num_before} positions of prompt "
            f"and image is more than the language model has, {limit}: ask for fewer"
        )


def filled_up(tensor_b: torch.Tensor, count: int) -> torch.Tensor:
    """Fill a batch [B, ...] on a CPU up to ``count`` by repeating its last item."""
    last = len(tensor_b) - 1
    if last < 0 or last + 1 >= count or tensor_b.device.type != "cpu":
        return tensor_b
    return tensor_b[torch.arange(count).clamp_max(last)]


def build_bridge(
    config: BridgeOptions,
    vision_dim: int,
    text: TextShape,
    num_image_tokens: int,
    *,
    meta: bool = False,
) -> nn.Module:
    """Build the recipe's bridge between two widths, on the CPU or on the meta device."""
    try:
        with torch.device("meta" if meta else "cpu"):
            return BRIDGES[config.kind](config, vision_dim, text, num_image_tokens)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


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
        bridge: Any = build_bridge(
            recipe.bridge, encoder.embed_dim, language_model.shape, encoder.num_tokens, meta=meta
        )
    if not meta and isinstance(bridge, BRIDGES["prefix"]):
        bridge.set_output_scale(language_model.embedding_std())
    standardize = recipe.bridge.standardize_features
    model = CaptionModel(encoder, language_model, bridge, standardize=standardize)
    choose_trainable(model, recipe.trainable)
    if recipe.decode.object_bonus and not meta:
        # A mistake in it is an error now rather than after an epoch.
        model.object_namer().check(recipe.decode.known_objects)
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
    room = positions - len(format.prompt_ids) + 1
    return replace(format, max_caption_tokens=min(format.max_caption_tokens, room))
