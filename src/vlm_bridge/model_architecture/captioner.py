"""The captioner: frozen vision encoder -> bridge -> language model.

Training and captioning meet in `attach`: the frozen language model sees the image, and its own forward pass and its
own `generate` do the rest. Tensor names carry their shape: b images, r rows of text, n image tokens, t text, h width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlm_bridge.configuration import (
    BridgeOptions,
    DecodeSettings,
    Recipe,
    VisionEncoderConfig,
)
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.hub import hub_problem, reach_hub
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.bridges import (
    BRIDGES,
    Bridge,
    CrossAttentionBridge,
    DeepPrefixBridge,
    ImageInputs,
)
from vlm_bridge.model_architecture.decoder_loading import build_language_model
from vlm_bridge.model_architecture.generation import (
    Caption,
    draws_beams,
    image_keys,
    search,
    searched_together,
)
from vlm_bridge.model_architecture.known_architectures import known_architecture
from vlm_bridge.model_architecture.language_model import LanguageModel, packed_positions
from vlm_bridge.model_architecture.loss import CaptionLoss, caption_cross_entropy
from vlm_bridge.model_architecture.object_names import ObjectBonus, ObjectNamer
from vlm_bridge.model_architecture.packaged_weights import EFFICIENTNET_LITE_SIZES
from vlm_bridge.model_architecture.text_shape import TextShape
from vlm_bridge.model_architecture.trainable import choose_trainable
from vlm_bridge.model_architecture.vision_encoder import (
    ENCODE_TOGETHER_ON_CPU,
    build_vision_encoder,
)

MAX_RETURN_SEQUENCES = 1_000


class FeatureScale(nn.Module):
    """Standardises every feature channel by statistics measured once on training images; identity until then."""

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
    """Composes the three parts. What is trained has parameters that require gradients; usually the bridge alone."""

    def __init__(
        self,
        vision_encoder: nn.Module,
        language_model: LanguageModel,
        bridge: nn.Module,
        *,
        standardize: bool,
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.language_model = language_model
        self.bridge = bridge
        if isinstance(bridge, DeepPrefixBridge):
            language_model.accept_prefix()
        self.edits_embeddings = isinstance(bridge, CrossAttentionBridge) and bridge.first_layer == 0
        if self.edits_embeddings:
            language_model.check_embedding_scale()
        language_model.open_layer(bridge.first_layer)  # type: ignore[arg-type]
        self.feature_scale = FeatureScale(vision_encoder.embed_dim) if standardize else None  # type: ignore[arg-type]
        self._cache_options: dict[str, Any] = {}
        self._object_namer: ObjectNamer | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def edits_scaled_embeddings(self) -> bool:
        """Whether its bridge changes token embeddings that the language model then scales."""
        return self.edits_embeddings and float(self.language_model.embedding_scale) != 1

    def train(self, mode: bool = True) -> CaptionModel:
        """Switch what is trained between training and evaluation; frozen parts stay in evaluation (no dropout).

        Of a language model trained in part, those modules switch that are trained whole.
        """
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
        """Features [B, N, D] of RGB pictures."""
        encoder: Any = self.vision_encoder
        return self.features(encoder.preprocess(images))

    @torch.no_grad()
    def features(self, pixels_or_features: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D]; pixels [B, 3, h, w] go through the vision encoder first, in its own precision."""
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
        """Return what the language model reads of images; captions and beams of an image share it."""
        bridge: Bridge = self.bridge  # type: ignore[assignment]
        return bridge.encode(self.bridge_features(features_bnd))

    def bridge_features(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] as the bridge reads them: on its device, standardised, in its precision."""
        features_bnd = features_bnd.to(self.device)
        if self.feature_scale is not None:
            features_bnd = self.feature_scale(features_bnd)
        return features_bnd.to(next(self.bridge.parameters()).dtype)

    # Text side: training.

    def text_states(
        self,
        input_ids: torch.Tensor,
        image: ImageInputs,
        segments: torch.Tensor | None = None,
        text_at_bridge: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the language model's last states [R, T, H] of ``input_ids`` [R, T].

        Args:
            image: of R images, or of fewer that divide R: then as many rows beside each other read each.
            segments: [R, T] caption numbers of packed rows (0 = pad); None for rows of one caption without pads.
            text_at_bridge: the result of the method of this name; the layers below then do not run.

        Raises:
            ModelError: the language model does not read what the bridge makes.
        """
        layer: int = self.bridge.first_layer  # type: ignore[assignment]
        num_soft = self._num_soft_positions
        mask, positions = self._mask_and_positions(segments, num_soft)
        with attach(self.language_model, image, layer, text_at_bridge) as attached:
            states = self.language_model.hidden_states(
                attention_mask=mask,
                position_ids=positions,
                from_layer=0 if text_at_bridge is None else layer,
                **attached.inputs(input_ids),
            )
            attached.check_it_was_read()
        return states[:, num_soft:]

    def text_at_bridge(
        self, input_ids: torch.Tensor, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Text [R, T, H] as it meets the image: token vectors, or the states that enter the bridge's first layer.

        A caption's depend on nothing but the caption, whichever row and batch it stands in.
        """
        layer: int = self.bridge.first_layer  # type: ignore[assignment]
        if layer == 0:
            return self.language_model.token_vectors(input_ids)
        return self.language_model.states_entering(
            layer, input_ids, *self._mask_and_positions(segments, 0)
        )

    @property
    def _num_soft_positions(self) -> int:
        """How many positions stand before the text: soft tokens, and the start token before them."""
        num_soft: int = self.bridge.num_soft_tokens  # type: ignore[assignment]
        return num_soft + (num_soft > 0)

    def _mask_and_positions(
        self, segments: torch.Tensor | None, num_soft_tokens: int
    ) -> tuple[Any, Any]:
        """Attention mask and position ids of packed rows; none for rows of one caption without pads."""
        if segments is None:
            return None, None
        mask = self.language_model.packed_mask(segments, num_soft_tokens)
        return mask, packed_positions(segments, num_soft_tokens)

    def forward(
        self, input_ids: torch.Tensor, image: ImageInputs, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [R, T, vocabulary]; arguments as those of `text_states`."""
        return self.language_model.head(self.text_states(input_ids, image, segments))

    def caption_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        segments: torch.Tensor,
        image: ImageInputs,
        supervised: torch.Tensor | None = None,
        text_at_bridge: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> CaptionLoss:
        """Cross-entropy of packed rows; ``labels[:, t]`` is the token that position t must predict.

        Args:
            supervised: see `caption_cross_entropy`.
            text_at_bridge: see `text_states`.
            weights: see `caption_cross_entropy`.
            label_smoothing: see `caption_cross_entropy`.
        """
        states = self.text_states(input_ids, image, segments, text_at_bridge)
        language_model = self.language_model
        return caption_cross_entropy(
            states,
            labels,
            language_model.head,
            head_is_trained=any(p.requires_grad for p in language_model.head_module.parameters()),
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
        """Caption each row of features: once, or the best ``num_return_sequences`` beams, or as many draws.

        Args:
            keys: a number for each image, from which its draws follow together with ``decode.seed``; None takes
                the content of its features.

        Returns:
            The captions of an image beside each other, the best beam first.

        Raises:
            ConfigurationError: captions may become longer than the language model can count, or a search is asked
                for more captions than it has beams.
        """
        self._check_lengths(prompt_ids, decode, num_return_sequences)
        if decode.do_sample and keys is None:
            keys = image_keys(features_bnd)
        asked = len(features_bnd) * num_return_sequences
        if not draws_beams(decode):  # they are drawn for one image at a time, whatever the batch
            num_images = -(-FEWEST_ROWS // max(decode.num_beams, num_return_sequences))
            features_bnd = filled_up(features_bnd, num_images)
            keys = keys and [*keys, *[keys[-1]] * num_images][: len(features_bnd)]
        captions: list[Caption] = []
        for part, own_keys in searched_together(len(features_bnd), decode, keys):
            captions += self._search(
                features_bnd[part], prompt_ids, decode, num_return_sequences, own_keys
            )
        return captions[:asked]

    def _search(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        decode: DecodeSettings,
        per_image: int,
        keys: Sequence[int] | None,
    ) -> list[Caption]:
        model = self.language_model
        rows_per_image = (
            1 if decode.num_beams > 1 else per_image
        )  # transformers makes a row for each beam
        prompt_rt = torch.tensor([list(prompt_ids)], device=self.device)
        prompt_rt = prompt_rt.repeat(len(features_bnd) * rows_per_image, 1)
        bonus = []
        if decode.object_bonus:
            names = self.object_namer()(features_bnd, decode.known_objects)
            bonus = [ObjectBonus(names, decode.object_bonus, len(prompt_ids))]
        with attach(model, self.image_inputs(features_bnd), self.bridge.first_layer) as attached:  # type: ignore[arg-type]
            inputs = attached.inputs(prompt_rt)
            read_rt = inputs.get("inputs_embeds", prompt_rt)
            # Beside soft tokens too, `generate` is given the prompt's ids: penalties count them.
            inputs |= {
                "input_ids": prompt_rt,
                "bos_token_id": model.start_id,
                "pad_token_id": model.eos_id,
            }
            inputs["attention_mask"] = torch.ones(
                read_rt.shape[:2], dtype=torch.long, device=self.device
            )
            generate = partial(
                model.causal_lm.generate, **inputs, **model.new_cache(), **self._cache_options
            )
            captions = search(
                generate,
                prompt_rt,
                decode,
                model.eos_id,
                keys=keys,
                per_image=per_image,
                more=bonus,
            )
            attached.check_it_was_read()
        return captions

    def _check_lengths(
        self, prompt_ids: Sequence[int], decode: DecodeSettings, per_image: int
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
        before = len(prompt_ids) + self._num_soft_positions
        limit = self.language_model.max_positions
        if limit is not None and before + decode.max_new_tokens > limit:
            raise ConfigurationError(
                f"decode.max_new_tokens={decode.max_new_tokens} behind {before} positions of prompt and image is more "
                f"than the language model has, {limit}: ask for fewer"
            )

    def use_static_cache(self) -> None:
        """Generate with a KV cache of fixed size, for which transformers compiles the step that makes a token.

        For GPUs, where most of a plain step is the launching of kernels. The first batch waits for the compiler.

        Raises:
            ModelError: the device is no NVIDIA GPU, or the language model is a decoder that cross-attends.
        """
        if self.device.type != "cuda":
            raise ModelError(
                f"transformers compiles generation for NVIDIA GPUs, not for {self.device.type}"
            )
        if self.language_model.shape.cross_attention_width is not None:
            raise ModelError(
                f"{type(self.language_model.causal_lm).__name__} cross-attends, and its cache cannot be of fixed size: "
                "caption without --compile"
            )
        self.language_model.is_compiled = True
        self._cache_options = {"cache_implementation": "static"}

    def object_namer(self) -> ObjectNamer:
        """What ``decode.object_bonus`` needs; ConfigurationError where the encoder has no classifier."""
        if self._object_namer is None:
            self._object_namer = ObjectNamer(self.vision_encoder, self.language_model)
        return self._object_namer

    # What was trained.

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """The bridge's weights, the feature statistics and what else is trained: all that a checkpoint holds."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in trained or name.startswith(("bridge.", "feature_scale."))
        }


FEWEST_IMAGES, FEWEST_ROWS = 2, 3
"""On a CPU, torch 2.13 runs other kernels for fewer images or rows of text. They round differently, and the caption of
an image would depend on its batch."""


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
    """The recipe's bridge between two widths, on the CPU or on the meta device."""
    try:
        with torch.device("meta" if meta else "cpu"):
            return BRIDGES[config.kind](config, vision_dim, text, num_image_tokens)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def reach_encoders(config: VisionEncoderConfig, *, meta: bool = False) -> None:
    """Refuse encoders that only the hub has, while it cannot be reached, at once.

    Args:
        meta: no weights will be read, which known architectures need nothing of the hub for.

    Raises:
        ModelError: the first such encoder.
    """
    for name in config.names:
        if name in EFFICIENTNET_LITE_SIZES or (meta and known_architecture(name)):
            continue
        try:
            reach_hub(name, config.revision)
        except ConnectionError as error:
            raise ModelError(
                f"cannot load the vision encoder {name!r}: {hub_problem(error, name)}"
            ) from error


def build_captioner(recipe: Recipe, *, meta: bool = False) -> CaptionModel:
    """Compose the captioner of a recipe; the bridge is freshly initialised from ``recipe.seed``.

    Args:
        meta: build everything on the meta device, without reading weights (for `info`).
    """
    reach_encoders(recipe.vision_encoder, meta=meta)
    vision_encoder: Any = build_vision_encoder(recipe.vision_encoder, meta=meta)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # of cross-attention that no checkpoint held
        language_model = build_language_model(recipe.language_model, meta=meta)
        torch.manual_seed(recipe.seed)
        bridge = build_bridge(
            recipe.bridge,
            vision_encoder.embed_dim,
            language_model.shape,
            vision_encoder.num_tokens,
            meta=meta,
        )
    if not meta and hasattr(bridge, "set_output_scale"):
        bridge.set_output_scale(language_model.embedding_std())  # type: ignore[operator]
    model = CaptionModel(
        vision_encoder, language_model, bridge, standardize=recipe.bridge.standardize_features
    )
    choose_trainable(model, recipe.trainable)
    if recipe.decode.object_bonus and not meta:
        model.object_namer().check(
            recipe.decode.known_objects
        )  # refused now rather than after an epoch
    return model.eval()
