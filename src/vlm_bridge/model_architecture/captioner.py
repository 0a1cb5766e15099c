"""The captioner: frozen vision encoder -> bridge -> language model, in one forward path.

Training and captioning run the same `forward`; `generate` (greedy, beams, sampling, KV cache, streaming) is
transformers' own. Tensor names carry their shape: b rows, n image tokens, p soft tokens, t text, h text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_bridge.configuration import BridgeConfig, DecodeSettings, Recipe
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import BRIDGES, Bridge, DeepPrefixBridge
from vlm_bridge.model_architecture.decoder_loading import build_language_model
from vlm_bridge.model_architecture.language_model import LanguageModel, packed_positions
from vlm_bridge.model_architecture.loss import caption_cross_entropy
from vlm_bridge.model_architecture.text_shape import TextShape
from vlm_bridge.model_architecture.trainable import choose_trainable
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder


class CaptionerConfig(PreTrainedConfig):
    """Configuration of a captioner: that of its language model, as far as transformers' generation asks."""

    model_type = "vlm-bridge-captioner"

    def __init__(self, text_config: Any = None, **kwargs: Any):
        self._text_config = text_config
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        return self._text_config if self._text_config is not None else self


@dataclass
class CaptionLoss:
    """Loss of a batch. ``total`` is differentiable; ``token_losses`` [V] holds every supervised token's, in nats."""

    total: torch.Tensor
    token_losses: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_losses.numel()


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


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """Composes the three parts. What is trained has parameters that require gradients; usually the bridge alone."""

    config_class = CaptionerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        vision_encoder: nn.Module,
        language_model: LanguageModel,
        bridge: nn.Module,
        *,
        standardize: bool,
    ):
        super().__init__(CaptionerConfig(text_config=language_model.text_config))
        self.vision_encoder = vision_encoder
        self.language_model = language_model
        self.bridge = bridge
        if isinstance(bridge, DeepPrefixBridge):
            language_model.accept_prefix()
        self.feature_scale = FeatureScale(vision_encoder.embed_dim) if standardize else None  # type: ignore[arg-type]
        self.generation_config = GenerationConfig(
            bos_token_id=language_model.start_id,
            eos_token_id=language_model.eos_id,
            pad_token_id=language_model.eos_id,
        )

    def train(self, mode: bool = True) -> CaptionerModel:
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
        with torch.autocast(values.device.type, enabled=False):
            return self.vision_encoder(values)

    def image_state(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """What the bridge makes of an image; captions and beams of the image share it."""
        bridge: Bridge = self.bridge  # type: ignore[assignment]
        return bridge.encode_image(self.bridge_features(features_bnd))

    def bridge_features(self, features_bnd: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] as the bridge reads them: on its device, standardised, in its precision."""
        features_bnd = features_bnd.to(self.device)
        if self.feature_scale is not None:
            features_bnd = self.feature_scale(features_bnd)
        return features_bnd.to(next(self.bridge.parameters()).dtype)

    # Text side: the one path of training and generation.

    def text_states(
        self,
        input_ids: torch.Tensor,
        image_state: torch.Tensor,
        segments: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> torch.Tensor:
        """The language model's last states [B, T, H] of ``input_ids`` [B, T].

        Args:
            segments: [B, T] caption numbers of packed rows (0 = pad); None for rows of one caption without pads.
            past_key_values: a cache; soft tokens enter only while it is empty.
        """
        bridge: Bridge = self.bridge  # type: ignore[assignment]
        # The bridge works in its own precision, whatever the frozen weights are stored in.
        embedded_bth = self.language_model.embed(input_ids).to(next(self.bridge.parameters()).dtype)
        text_bth = bridge.edit_text(embedded_bth, image_state)
        of_image = bridge.image_inputs(image_state)
        soft_bph = of_image.soft_tokens
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            soft_bph = None
        if soft_bph is not None:
            soft_bph = torch.cat((self._first_token(soft_bph), soft_bph.to(text_bth.dtype)), dim=1)
        num_soft = 0 if soft_bph is None else soft_bph.shape[1]
        body_dtype = next(self.language_model.parameters()).dtype
        inputs = text_bth if soft_bph is None else torch.cat((soft_bph, text_bth), dim=1)
        mask = positions = None
        if segments is not None:
            mask = self.language_model.packed_mask(segments, num_soft)
            positions = packed_positions(segments, num_soft)
        states = self.language_model.hidden_states(
            inputs.to(body_dtype),
            mask,
            positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
            prefix=of_image.key_value_prefix,
            encoder_hidden_states=_as_dtype(of_image.encoder_hidden_states, body_dtype),
        )
        return states[:, num_soft:]

    def _first_token(self, soft_bph: torch.Tensor) -> torch.Tensor:
        """The start token's embedding [B, 1, H], which goes before the soft tokens.

        Language models park idle attention on the first position (Xiao et al. 2024, "attention sinks"): a frozen
        one must find the token there that it was trained with, not an image.
        """
        start_id = self.language_model.start_id
        assert start_id is not None, "a captioner on the meta device cannot run"
        start = torch.full((len(soft_bph), 1), start_id, device=soft_bph.device)
        return self.language_model.embed(start)

    def forward(
        self,
        input_ids: torch.Tensor,
        image_state: torch.Tensor,
        segments: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] (of the last ``logits_to_keep`` positions, 0 = all)."""
        states = self.text_states(input_ids, image_state, segments, past_key_values, use_cache)
        logits = self.language_model.head(states[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def caption_loss(
        self, input_ids: torch.Tensor, labels: torch.Tensor, segments: torch.Tensor, image_state: torch.Tensor
    ) -> CaptionLoss:
        """Cross-entropy of packed rows; ``labels[:, t]`` is the token that position t must predict."""
        states = self.text_states(input_ids, image_state, segments)
        language_model = self.language_model
        head_is_trained = any(p.requires_grad for p in language_model.head_module.parameters())
        return CaptionLoss(
            *caption_cross_entropy(states, labels, language_model.head, head_is_trained=head_is_trained)
        )

    # Captioning.

    @torch.inference_mode()
    def generate_captions(
        self, features_bnd: torch.Tensor, prompt_ids: Sequence[int], decode: DecodeSettings
    ) -> tuple[list[list[int]], list[float]]:
        """Generate one caption per row of features.

        Returns:
            Token ids of each caption (without prompt and EOS) and its mean log-probability per token, in nats.

        Raises:
            ConfigurationError: captions may become longer than the language model can count.
        """
        bridge: Bridge = self.bridge  # type: ignore[assignment]
        before = len(prompt_ids) + bridge.output_num_tokens(features_bnd.shape[1])
        limit = self.language_model.max_positions
        if limit is not None and before + decode.max_new_tokens > limit:
            raise ConfigurationError(
                f"decode.max_new_tokens={decode.max_new_tokens} behind {before} positions of prompt and image is more "
                f"than the language model has, {limit}: ask for fewer"
            )
        state = self.image_state(features_bnd)
        prompt_bt = torch.tensor([list(prompt_ids)] * len(features_bnd), device=self.device)
        # Sampling has a random state of its own: the dropout of a training that it interrupts goes on undisturbed.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=decode.do_sample):
            if decode.do_sample:
                torch.manual_seed(decode.seed)
            output = self.generate(  # type: ignore[reportAttributeAccessIssue]
                input_ids=prompt_bt,
                image_state=state,
                attention_mask=torch.ones_like(prompt_bt),
                past_key_values=self.language_model.new_cache(),
                **generation_options(decode),
            )
        generated_bt = output[:, prompt_bt.shape[1] :]  # type: ignore[index]
        return self._trim_and_score(prompt_bt, generated_bt, state)

    def _trim_and_score(
        self, prompt_bt: torch.Tensor, generated_bt: torch.Tensor, image_state: torch.Tensor
    ) -> tuple[list[list[int]], list[float]]:
        eos = self.language_model.eos_id
        captions, scores = [], []
        rows = torch.cat((prompt_bt, generated_bt), dim=1)
        states = self.text_states(rows[:, :-1], image_state)[:, prompt_bt.shape[1] - 1 :]
        log_probs = self.language_model.head(states).float().log_softmax(-1)
        token_scores = log_probs.gather(-1, generated_bt[..., None])[..., 0].tolist()
        for ids, row_scores in zip(generated_bt.tolist(), token_scores, strict=True):
            end = ids.index(eos) if eos in ids else len(ids)
            kept = row_scores[: end + 1]
            captions.append(ids[:end])
            scores.append(sum(kept) / max(len(kept), 1))
        return captions, scores

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        image_state: torch.Tensor | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        # Prompts of a batch have one length and finished rows are ignored by generate: the mask says nothing.
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "image_state": image_state,
            "past_key_values": past_key_values,
            "use_cache": use_cache and past_key_values is not None,
        }

    # What was trained.

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """The bridge's weights, the feature statistics and what else is trained: all that a checkpoint holds."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in trained or name.startswith(("bridge.", "feature_scale."))
        }


def generation_options(decode: DecodeSettings) -> dict[str, Any]:
    """What transformers' `generate` takes, without the settings that the chosen way of decoding does not read:
    it warns about those."""
    options: dict[str, Any] = {
        "num_beams": decode.num_beams,
        "max_new_tokens": decode.max_new_tokens,
        "min_new_tokens": decode.min_new_tokens or None,
        "repetition_penalty": decode.repetition_penalty,
        "no_repeat_ngram_size": decode.no_repeat_ngram_size,
        "do_sample": decode.do_sample,
    }
    if decode.num_beams > 1:
        options |= {"length_penalty": decode.length_penalty}
    if decode.do_sample:
        options |= {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": 0}
    return options


def build_bridge(
    config: BridgeConfig, vision_dim: int, text: TextShape, num_image_tokens: int, *, meta: bool = False
) -> nn.Module:
    """The recipe's bridge between two widths, on the CPU or on the meta device."""
    options_class, bridge_class = BRIDGES[config.kind]
    options = config.options if config.options is not None else options_class()
    try:
        with torch.device("meta" if meta else "cpu"):
            return bridge_class(options, vision_dim, text, num_image_tokens)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def build_captioner(recipe: Recipe, *, meta: bool = False) -> CaptionerModel:
    """Compose the captioner of a recipe; the bridge is freshly initialised from ``recipe.seed``.

    Args:
        meta: build everything on the meta device, without reading weights (for `info`).
    """
    vision_encoder: Any = build_vision_encoder(
        recipe.vision_encoder, pooling=recipe.feature_cache_pooling, meta=meta
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # of cross-attention that no checkpoint held
        language_model = build_language_model(
            recipe.language_model, quantize=recipe.quantize_language_model, meta=meta
        )
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
    model = CaptionerModel(
        vision_encoder, language_model, bridge, standardize=recipe.bridge.standardize_features
    )
    choose_trainable(model, recipe.trainable)
    return model.eval()


def _as_dtype(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
