"""PVT, projection and BLIP's text decoder as one module that is called as transformers' BLIP is."""

from __future__ import annotations

from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import nn

from vlm_bridge.credentials import reach_hub
from vlm_bridge.errors import ModelError, UsageError
from vlm_bridge.model_architecture.weights import LOADING_ERRORS, loading_error

PROMPT = "a picture of"  # what BLIP's captions continue (Li et al. 2022)
NO_REPEAT_NGRAM_SIZE = 3  # of the recipes `blip-pvt-*`
# By which `BlipProcessor` normalizes, and every published PVT.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PvtBlip(nn.Module):
    """PVT in the place of BLIP's vision encoder: takes the pixels of `BlipProcessor`.

    Its state dict is a combined file in our layout. The encoder is frozen and stays in evaluation
    mode.

    Attributes:
        visual_encoder: transformers' PvtModel or PvtV2Model, or `PvtCbam`.
        text_decoder: BlipTextLMHeadModel, which cross-attends to states [B, N, W].
        visual_proj: D -> W; None where it was never trained.
        tokenizer_name: whose tokenizer encodes the prompt; it is loaded at the first `generate`.
    """

    def __init__(
        self,
        visual_encoder: Any,
        text_decoder: Any,
        visual_proj: nn.Module | None,
        tokenizer_name: str | None,
    ):
        super().__init__()
        self.visual_encoder: Any = visual_encoder.requires_grad_(False)
        self.text_decoder: Any = text_decoder
        self.visual_proj = visual_proj
        self.tokenizer_name = tokenizer_name

    def train(self, mode: bool = True) -> PvtBlip:
        super().train(mode)
        self.visual_encoder.eval()
        return self

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the states [B, N, W] that the decoder reads, of pixels as in `feature_map`."""
        if self.visual_proj is None:
            raise ModelError(
                "no projection between PVT and BLIP's decoder: fine-tune first "
                "(scripts/finetune_combined.py makes one)"
            )
        map_bdhw = self.feature_map(pixel_values)
        if isinstance(self.visual_proj, nn.Conv2d):
            return self.visual_proj(map_bdhw).flatten(2).transpose(1, 2)
        return self.visual_proj(map_bdhw.flatten(2).transpose(1, 2))

    def feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return PVT's map [B, D, h/32, w/32] of pixels [B, 3, h, w] that `BlipProcessor` made."""
        # Renormalize in one step of double precision: rounding of pixels grows in the layers.
        clip_mean, clip_std, mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
        )
        scale, shift = clip_std / std, (clip_mean - mean) / std
        pixels_bchw = torch.addcmul(shift.to(pixel_values), pixel_values, scale.to(pixel_values))
        output = self.visual_encoder(pixels_bchw.to(self.visual_encoder.dtype))
        features = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        if features.ndim == 4:
            return features
        side = isqrt(features.shape[1])  # PvtModel's tokens; a class token stands before the grid
        return features[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the decoder over captions that see images.

        Args:
            pixel_values: [B, 3, h, w] as `BlipProcessor` makes them.
            input_ids: [B, T].
            attention_mask: [B, T], 0 for pads.
            labels: [B, T], usually the input ids; the decoder shifts them. Pads are not supervised.
            encoder_hidden_states: projected images, a map [B, W, h, w] or tokens [B, N, W].

        Returns:
            The decoder's output: ``loss`` (nats per token) and ``logits`` [B, T, vocabulary].
        """
        if encoder_hidden_states is None:
            if pixel_values is None:
                raise UsageError("give pixel_values, or encoder_hidden_states made of them")
            encoder_hidden_states = self.encode(pixel_values)
        elif encoder_hidden_states.ndim == 4:
            encoder_hidden_states = encoder_hidden_states.flatten(2).transpose(1, 2)
        if labels is not None:
            labels = labels.masked_fill(labels == self.text_decoder.config.pad_token_id, -100)
        return self.text_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            encoder_hidden_states=encoder_hidden_states.to(self.text_decoder.dtype),
            is_decoder=True,
            **options,
        )

    @torch.no_grad()
    def generate(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        """Caption images by the decoder's own `generate`.

        Args:
            pixel_values: [B, 3, h, w] as `BlipProcessor` makes them.
            options: transformers'; `max_length` counts the start token and the prompt too.

        Returns:
            The output of transformers; its sequences [B, T] are the start token and the caption
            without the prompt.
        """
        states_bnw = self.encode(pixel_values)
        config = self.text_decoder.config
        start_ids = torch.tensor([[config.bos_token_id, *self.prompt_ids]])
        input_ids = start_ids.to(pixel_values.device).repeat(len(pixel_values), 1)
        output = self.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            encoder_hidden_states=states_bnw.to(self.text_decoder.dtype),
            bos_token_id=config.bos_token_id,
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            **{"no_repeat_ngram_size": NO_REPEAT_NGRAM_SIZE, **options},
        )
        is_tensor = isinstance(output, torch.Tensor)
        ids_bt = output if is_tensor else output.sequences
        ids_bt = torch.cat((ids_bt[:, :1], ids_bt[:, input_ids.shape[1] :]), dim=1)
        if not is_tensor:
            output.sequences = ids_bt
        return ids_bt if is_tensor else output

    @cached_property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt, without special tokens."""
        if self.tokenizer_name is None:
            raise ModelError(
                "the prompt needs a tokenizer: load the file with blip_model_name, the BLIP that "
                "it was made of"
            )
        return load_tokenizer(self.tokenizer_name)(PROMPT, add_special_tokens=False)["input_ids"]


class MapLinear(nn.Linear):
    """A linear layer over the channels of maps [B, D, h, w]; it takes tokens [..., D] too."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            return super().forward(features.movedim(1, -1)).movedim(-1, 1)
        return super().forward(features)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a name or folder. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        reach_hub(name)
        return AutoTokenizer.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise loading_error("tokenizer of BLIP", name, error) from error
