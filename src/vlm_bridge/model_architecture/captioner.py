"""The captioner: frozen vision encoder -> bridge -> language model, in one forward path.

Training and captioning run the same `forward`; `generate` (greedy, beams, sampling, KV cache, streaming) is
transformers' own. Tensor names carry their shape: b rows, n image tokens, p soft tokens, t text, h text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import (
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_bridge.configuration import BridgeConfig, DecodeSettings, Recipe
from vlm_bridge.errors import ConfigurationError, ModelError
from vlm_bridge.model_architecture.bridges import BRIDGES, Bridge, DeepPrefixBridge
from vlm_bridge.model_architecture.decoder_loading import build_language_model
from vlm_bridge.model_architecture.language_model import LanguageModel, LayerEntry, packed_positions
from vlm_bridge.model_architecture.loss import IGNORE_INDEX, Kernel, caption_cross_entropy
from vlm_bridge.model_architecture.object_names import ObjectBonus, ObjectNamer
from vlm_bridge.model_architecture.text_shape import TextShape
from vlm_bridge.model_architecture.trainable import choose_trainable
from vlm_bridge.model_architecture.vision_encoder import ENCODE_TOGETHER_ON_CPU, build_vision_encoder


class CaptionerConfig(PreTrainedConfig):
    """Configuration of a captioner: that of its language model, as far as transformers' generation asks."""

    model_type = "vlm-bridge-captioner"

    def __init__(self, text_config: Any = None, **kwargs: Any):
        self._text_config = text_config
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        return self._text_config if self._text_config is not None else self


class SharedState(NamedTuple):
    """An image state that `generate` hands on as it is, instead of repeating it for every beam."""

    of_images: torch.Tensor


class FixedSizeCache(NamedTuple):
    """A static KV cache of text: for so many images with so many beams, up to a length."""

    num_images: int
    num_beams: int
    length: int
    cache: StaticCache

    def holds(self, num_images: int, num_beams: int, length: int) -> bool:
        return num_images <= self.num_images and (num_beams, length) == (self.num_beams, self.length)


@dataclass
class CaptionLoss:
    """Loss of a batch: the sum over its supervised tokens, in nats; differentiable."""

    total: torch.Tensor
    losses_v: torch.Tensor | None

    @property
    def token_losses(self) -> torch.Tensor:
        """[V], every supervised token's; not where a kernel was asked for gradients and gives the sum alone."""
        assert self.losses_v is not None
        return self.losses_v

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
        if bridge.first_layer:
            language_model.open_layer(bridge.first_layer)  # type: ignore[arg-type]
        self.loss_kernel: Kernel | None = None
        self.feature_scale = FeatureScale(vision_encoder.embed_dim) if standardize else None  # type: ignore[arg-type]
        self.generation_config = GenerationConfig(
            bos_token_id=language_model.start_id,
            eos_token_id=language_model.eos_id,
            pad_token_id=language_model.eos_id,
        )
        self._static_caches = False
        self._kept_cache: FixedSizeCache | None = None
        self._decode_step: Any = None
        self._object_namer: ObjectNamer | None = None

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
        together = ENCODE_TOGETHER_ON_CPU if values.device.type == "cpu" else len(values)
        with torch.autocast(values.device.type, enabled=False):
            parts = [self.vision_encoder(some) for some in values.split(max(together, 1))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
        continues: bool = False,
        text_at_bridge: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The language model's last states [B, T, H] of ``input_ids`` [B, T].

        Args:
            image_state: of B images, or of fewer that divide B: then as many rows beside each other read each.
            segments: [B, T] caption numbers of packed rows (0 = pad); None for rows of one caption without pads.
            past_key_values: a cache, extended in place.
            continues: the cache holds what stands before ``input_ids``: soft tokens do not enter again.
            text_at_bridge: what the method of this name gives, computed before: the layers below do not run.
        """
        bridge: Bridge = self.bridge  # type: ignore[assignment]

        def edit(text_bth: torch.Tensor) -> torch.Tensor:
            # The bridge works in its own precision, whatever the frozen weights are stored in. Text is edited one
            # position at a time: positions of rows that share an image may stand in one row.
            per_image = text_bth.to(next(self.bridge.parameters()).dtype)
            per_image = per_image.reshape(len(image_state), -1, text_bth.shape[-1])
            return bridge.edit_text(per_image, image_state).reshape(text_bth.shape)

        body_dtype = next(self.language_model.parameters()).dtype
        text_bth = self.language_model.embed(input_ids) if text_at_bridge is None else text_at_bridge
        entry = None
        if bridge.first_layer:
            entry = LayerEntry(bridge.first_layer, edit, _as_dtype(text_at_bridge, body_dtype))
        else:
            text_bth = edit(text_bth)
        of_image = bridge.image_inputs(image_state)
        beams = len(input_ids) // len(image_state)
        soft_bph = None if continues else _for_beams(of_image.soft_tokens, beams)
        encoder_states = _for_beams(of_image.encoder_hidden_states, beams, only_shape=continues)
        if soft_bph is not None:
            soft_bph = torch.cat((self._first_token(soft_bph), soft_bph.to(text_bth.dtype)), dim=1)
        num_soft = 0 if soft_bph is None else soft_bph.shape[1]
        inputs = text_bth if soft_bph is None else torch.cat((soft_bph, text_bth), dim=1)
        mask, positions = self._mask_and_positions(segments, num_soft)
        states = self.language_model.hidden_states(
            inputs.to(body_dtype),
            mask,
            positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
            prefix=of_image.key_value_prefix,
            encoder_hidden_states=_as_dtype(encoder_states, body_dtype),
            entry=entry,
        )
        return states[:, num_soft:]

    def text_at_bridge(self, input_ids: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        """Text [B, T, H] as it meets the image: embeddings, or the states that enter the bridge's first layer.

        A caption's depend on nothing but the caption, whichever row and batch it stands in.
        """
        embedded_bth = self.language_model.embed(input_ids)
        layer: int = self.bridge.first_layer  # type: ignore[assignment]
        if layer == 0:
            return embedded_bth
        return self.language_model.states_entering(
            layer, embedded_bth, *self._mask_and_positions(segments, num_soft_tokens=0)
        )

    def _mask_and_positions(self, segments: torch.Tensor | None, num_soft_tokens: int) -> tuple[Any, Any]:
        """Attention mask and position ids of packed rows; none for rows of one caption without pads."""
        if segments is None:
            return None, None
        mask = self.language_model.packed_mask(segments, num_soft_tokens)
        return mask, packed_positions(segments, num_soft_tokens)

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
        continues: bool = False,
        beams_to_start: int = 1,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] (of the last ``logits_to_keep`` positions, 0 = all).

        Args:
            continues: see `text_states`.
            beams_to_start: repeat every row of the cache and of the result: the beams of an image begin alike, and
                one of them is read for all.
            output_hidden_states: return the states that the logits were made of as well.
        """
        if continues and self._decode_step is not None:
            # A compiled step writes its next result over this one.
            states = self._decode_step(input_ids, image_state, None, past_key_values, True, True).clone()
        else:
            states = self.text_states(input_ids, image_state, segments, past_key_values, use_cache, continues)
        states = states[:, -logits_to_keep:]
        logits = self.language_model.head(states)
        if beams_to_start > 1:
            past_key_values.batch_repeat_interleave(beams_to_start)
            states, logits = (tensor.repeat_interleave(beams_to_start, dim=0) for tensor in (states, logits))
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(states,) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def caption_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        segments: torch.Tensor,
        image_state: torch.Tensor,
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
        states = self.text_states(input_ids, image_state, segments, text_at_bridge=text_at_bridge)
        language_model = self.language_model
        total, losses = caption_cross_entropy(
            states,
            labels,
            language_model.linear_head or language_model.head,
            head_is_trained=any(p.requires_grad for p in language_model.head_module.parameters()),
            supervised_v=supervised,
            weights_v=weights,
            label_smoothing=label_smoothing,
            kernel=self.loss_kernel,
        )
        return CaptionLoss(total, losses)

    # Captioning.

    @torch.inference_mode()
    def generate_captions(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        decode: DecodeSettings,
        num_return_sequences: int = 1,
    ) -> tuple[list[list[int]], list[float]]:
        """Generate captions of each row of features: one, or the best ``num_return_sequences`` beams, or as many draws.

        Returns:
            Token ids of each caption (without prompt and EOS) and its mean log-probability per token, in nats; the
            captions of an image beside each other, the best beam first.

        Raises:
            ConfigurationError: captions may become longer than the language model can count, or a search is asked
                for more captions than it has beams.
        """
        if not decode.do_sample and num_return_sequences > decode.num_beams:
            raise ConfigurationError(
                f"num_return_sequences={num_return_sequences} is more than decode.num_beams={decode.num_beams}: "
                "search with more beams, or sample"
            )
        bridge: Bridge = self.bridge  # type: ignore[assignment]
        before = len(prompt_ids) + bridge.output_num_tokens(features_bnd.shape[1])
        limit = self.language_model.max_positions
        if limit is not None and before + decode.max_new_tokens > limit:
            raise ConfigurationError(
                f"decode.max_new_tokens={decode.max_new_tokens} behind {before} positions of prompt and image is more "
                f"than the language model has, {limit}: ask for fewer"
            )
        num_images = len(features_bnd)
        past_key_values: Any = self.language_model.new_cache()
        if self._static_caches:
            rows = max(decode.num_beams, num_return_sequences)
            kept = self._fixed_size_cache(num_images, rows, before + decode.max_new_tokens)
            past_key_values, features_bnd = kept.cache, _filled_up(features_bnd, kept.num_images)
        state = self.image_state(features_bnd)
        prompt_bt = torch.tensor([list(prompt_ids)] * len(features_bnd), device=self.device)
        # Sampling has a random state of its own: the dropout of a training that it interrupts goes on undisturbed.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=decode.do_sample):
            if decode.do_sample:
                torch.manual_seed(decode.seed)
            output: Any = self.generate(  # type: ignore[reportAttributeAccessIssue]
                input_ids=prompt_bt,
                image_state=SharedState(state),
                attention_mask=torch.ones_like(prompt_bt),
                past_key_values=past_key_values,
                return_dict_in_generate=True,
                output_hidden_states=True,
                num_return_sequences=num_return_sequences,
                disable_compile=True,  # of the whole forward; ours compiles the step of beams too
                logits_processor=LogitsProcessorList(
                    self._logits_processors(features_bnd, prompt_bt, decode)
                ),
                **generation_options(decode),
            )
        ids, scores = self._trim_and_score(output, prompt_bt.shape[1])
        asked = num_images * num_return_sequences
        return ids[:asked], scores[:asked]

    def _logits_processors(
        self, features_bnd: torch.Tensor, prompt_bt: torch.Tensor, decode: DecodeSettings
    ) -> list[LogitsProcessor]:
        """What changes scores beside transformers' own settings."""
        if not decode.object_bonus:
            return []
        names = self.object_namer()(features_bnd, decode.known_objects)
        return [ObjectBonus(names, decode.object_bonus, prompt_bt.shape[1])]

    def object_namer(self) -> ObjectNamer:
        """What ``decode.object_bonus`` needs; ConfigurationError where the encoder has no classifier."""
        if self._object_namer is None:
            self._object_namer = ObjectNamer(self.vision_encoder, self.language_model)
        return self._object_namer

    @torch.inference_mode()
    def sample_captions(
        self,
        features_bnd: torch.Tensor,
        prompt_ids: Sequence[int],
        *,
        count: int,
        max_new_tokens: int,
        seed: int,
        temperature: float = 1.0,
    ) -> list[list[int]]:
        """Draw ``count`` captions of each row of features from the model's own distribution, none of it cut off.

        Images leave the batch when all their captions have ended; `generate` would decode until the longest of all has,
        and its `torch.multinomial` takes longer over a large vocabulary than a layer of the language model.

        Returns:
            Token ids without the prompt, the captions of an image beside each other; with EOS, if one has ended.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        cache: Any = self.language_model.new_cache()
        state = self.image_state(features_bnd)
        prompt_bt = torch.tensor([list(prompt_ids)] * len(features_bnd), device=self.device)
        step = self(
            prompt_bt, state, past_key_values=cache, use_cache=True, logits_to_keep=1, beams_to_start=count
        )
        captions: list[list[int]] = [[] for _ in range(len(features_bnd) * count)]
        rows = torch.arange(len(captions), device=self.device)
        has_ended = torch.zeros(len(captions), dtype=torch.bool, device=self.device)
        for position in range(max_new_tokens):
            ids = _draw(step.logits[:, -1] / temperature, generator)
            for row, token in zip(rows[~has_ended].tolist(), ids[~has_ended].tolist(), strict=True):
                captions[row].append(token)
            has_ended |= ids == self.language_model.eos_id
            goes_on = ~has_ended.view(-1, count).all(1)
            if position + 1 == max_new_tokens or not goes_on.any():
                break
            if goes_on.float().mean() < WORTH_REMOVING:
                kept = goes_on.repeat_interleave(count)
                cache.batch_select_indices(kept.nonzero()[:, 0])
                state, rows, ids, has_ended = state[goes_on], rows[kept], ids[kept], has_ended[kept]
            step = self(ids[:, None], state, past_key_values=cache, use_cache=True, continues=True)
        return captions

    def _trim_and_score(self, output: Any, prompt_length: int) -> tuple[list[list[int]], list[float]]:
        """Captions and their scores from what `generate` returns.

        The states that chose each token are still there: the head reads those of the captions that were found, and
        nothing runs through the language model again.
        """
        ids_bt = output.sequences[:, prompt_length:]
        is_eos = ids_bt == self.language_model.eos_id
        is_kept = is_eos.cumsum(1) - is_eos.long() == 0  # up to the first EOS and with it
        states_srh = torch.stack([states[:, -1] for (states,) in output.hidden_states])
        steps = torch.arange(ids_bt.shape[1], device=ids_bt.device)
        rows_bt = getattr(output, "beam_indices", None)  # which beam a token was chosen for
        if rows_bt is None:
            rows_bt = torch.arange(len(ids_bt), device=ids_bt.device)[:, None]
        states_bth = states_srh[steps, rows_bt.long().clamp_min(0)]
        labels_bt = ids_bt.masked_fill(~is_kept, IGNORE_INDEX)
        _, losses = caption_cross_entropy(states_bth, labels_bt, self.language_model.head)
        assert losses is not None, "without gradients there is no kernel"
        lengths = is_kept.sum(1).tolist()
        scores = [-row.mean().item() for row in losses.cpu().split(lengths)]
        ends = (is_kept & ~is_eos).sum(1).tolist()
        return [row[:end] for row, end in zip(ids_bt.tolist(), ends, strict=True)], scores

    def use_static_caches(self, *, compile_step: bool) -> None:
        """Generate with KV caches of fixed size, kept from batch to batch, and with a decode step compiled for them.

        For GPUs, where most of a plain step is the launching of kernels. Captions are the same. The first batch waits
        for the compiler; a smaller one is filled up, for another shape would be compiled anew.

        Raises:
            ModelError: the language model is a decoder that cross-attends.
        """
        if self.language_model.shape.cross_attention_width is not None:
            raise ModelError(
                f"{type(self.language_model.causal_lm).__name__} cross-attends, and its cache cannot be of fixed size: "
                "caption without --compile"
            )
        self._static_caches = True
        if compile_step:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._decode_step = torch.compile(self.text_states, mode=mode, dynamic=False)

    def _fixed_size_cache(self, num_images: int, num_beams: int, length: int) -> FixedSizeCache:
        """An empty static cache for at least so many images: the last one again where it is large enough."""
        kept = self._kept_cache
        if kept is None or not kept.holds(num_images, num_beams, length):
            cache = StaticCache(config=self.language_model.text_config, max_cache_len=length)
            kept = self._kept_cache = FixedSizeCache(num_images, num_beams, length, cache)
        kept.cache.reset()
        return kept

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        image_state: torch.Tensor | SharedState | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        # Prompts of a batch have one length and finished rows are ignored by generate: the mask says nothing.
        of_images = image_state.of_images if isinstance(image_state, SharedState) else image_state
        assert of_images is not None, "generate needs the image_state of its rows"
        use_cache = use_cache and past_key_values is not None
        continues = use_cache and not is_first_iteration
        beams_to_start = 1
        if continues:
            input_ids = input_ids[:, -1:]
        elif use_cache and not self._static_caches:  # those cannot be repeated
            beams_to_start = len(input_ids) // len(of_images)
            input_ids = input_ids[::beams_to_start]
        return {
            "input_ids": input_ids,
            "image_state": of_images,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "continues": continues,
            "beams_to_start": beams_to_start,
            "output_hidden_states": output_hidden_states,
        }

    def _reorder_cache(self, past_key_values: Any, beam_idx: Any) -> Any:
        """Let beams go on from the beams that they were chosen from; `generate` calls it after every step.

        The image's own keys and values stay where they are, since beams change places within an image alone; static
        tensors are written in place, since compiled steps know them by their address.
        """
        if isinstance(past_key_values, StaticCache):
            layers: list[Any] = past_key_values.layers
            for layer in layers:
                layer.keys.copy_(layer.keys.index_select(0, beam_idx))
                layer.values.copy_(layer.values.index_select(0, beam_idx))
        elif isinstance(past_key_values, EncoderDecoderCache):
            past_key_values.self_attention_cache.reorder_cache(beam_idx)
        else:
            past_key_values.reorder_cache(beam_idx)
        return past_key_values

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
    if recipe.decode.object_bonus and not meta:
        model.object_namer().check(recipe.decode.known_objects)  # refused now rather than after an epoch
    return model.eval()


WORTH_REMOVING = 0.85
"""Below this share of images that go on, sampling takes the others out of the cache, which copies it."""


def _draw(logits_bv: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token [B] of each row's distribution: where its cumulative probabilities pass a uniform number.

    The last one where logits are no numbers: the loss will tell, where `torch.multinomial` aborts on a GPU.
    """
    cumulative_bv = logits_bv.float().softmax(-1).cumsum(-1)
    uniform_b1 = torch.rand(len(logits_bv), 1, device=logits_bv.device, generator=generator)
    ids_b1 = torch.searchsorted(cumulative_bv, uniform_b1 * cumulative_bv[:, -1:], right=True)
    return ids_b1[:, 0].clamp_max(logits_bv.shape[1] - 1)  # a product may be rounded up to the sum itself


def _for_beams(
    states_bnd: torch.Tensor | None, beams: int, *, only_shape: bool = False
) -> torch.Tensor | None:
    """States of images once for each of their beams.

    Args:
        only_shape: the values are not read (a cache has what was made of them), and are not copied.
    """
    if states_bnd is None or beams == 1:
        return states_bnd
    if only_shape:
        return states_bnd[:1].expand(len(states_bnd) * beams, -1, -1)
    return states_bnd.repeat_interleave(beams, dim=0)


def _as_dtype(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _filled_up(features_bnd: torch.Tensor, num_images: int) -> torch.Tensor:
    """Features [num_images, N, D]: the given ones, then the last of them again."""
    missing = num_images - len(features_bnd)
    return torch.cat((features_bnd, features_bnd[-1:].expand(missing, -1, -1))) if missing else features_bnd
