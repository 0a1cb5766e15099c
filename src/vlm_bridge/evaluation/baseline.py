"""Published image-to-text models of `transformers`, scored exactly as our own captioners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig

from vlm_bridge.captioning.pipeline import (
    CaptionResult,
    batches_of,
    caption_in_batches,
    counted,
)
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.credentials import hub_problem, reach_hub
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.device import resolve_device
from vlm_bridge.errors import ModelError, UsageError

# The `model_type` of a configuration, and the captioning class of `transformers`.
MODELS = {
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}
# Text that the authors put before every caption (BLIP: `caption_coco.yaml`).
PROMPTS = {"blip": "a picture of"}
SETTINGS = (
    "num_beams", "max_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip


class BaselineCaptioner:
    """A published captioner in float32: ``from_pretrained("microsoft/git-base-coco")``.

    `DecodeSettings` alone decide how captions are decoded. Generation settings that the authors
    saved are ignored, so that models are compared and not their settings.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None = None):
        self.model, self.processor, self.tokenizer = model.eval(), processor, tokenizer
        self.model_type: str = model.config.model_type
        self.prompt = (PROMPTS.get(self.model_type, "") if prompt is None else prompt).strip()
        text = model.config.get_text_config(decoder=True)
        self.max_positions: int = text.max_position_embeddings
        # Published folders keep the ids in one of three places.
        places = (text, model.config, model.generation_config)
        ids = {name: i for p in places for name, i in p.to_dict().items() if i is not None}
        end = ids["sep_token_id" if self.model_type == "blip" else "eos_token_id"]
        self.eos_id: int = end[0] if isinstance(end, list) else end
        start = ids.get("decoder_start_token_id", ids.get("bos_token_id"))
        words = tokenizer(self.prompt, add_special_tokens=False).input_ids if self.prompt else []
        self.prompt_ids = [start, *words]

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str = "auto",
        *,
        revision: str | None = None,
        prompt: str | None = None,
    ) -> BaselineCaptioner:
        """Load a captioning model of `transformers` from a folder or the Hugging Face hub.

        Args:
            revision: branch, tag or commit of a model on the hub.
            prompt: text before every caption; None is the prompt of its authors.

        Raises:
            ModelError: no such model, no captioner, missing weights, or no access.
        """
        target = resolve_device(device)
        try:
            reach_hub(name, revision)
            config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
            class_name = _captioning_class(name, config)
            # transformers reads old pickle files with weights_only=True, too.
            model, loading = getattr(transformers, class_name).from_pretrained(
                name, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            # transformers adds advice about names on the hub, which misleads for a folder.
            reason = str(error).strip().split("\n")[0].split(". If you ")[0]
            advice = "(give a folder made by save_pretrained, or a hub name with network access)"
            why = hub_problem(error, name) or f"{reason or type(error).__name__} {advice}"
            raise ModelError(f"cannot load the model {name!r}: {why}") from error
        # Poolers take no part in captioning, and published captioners often lack theirs.
        missing = sorted(key for key in loading["missing_keys"] if ".pooler." not in key)
        if missing:
            lost = f"{len(missing)} weights are missing ({missing[0]}, ...)"
            raise ModelError(f"{name} is no whole {class_name}: {lost}")
        # Without its files, transformers builds BERT's tokenizer of special tokens alone.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ModelError(f"the tokenizer of {name} knows no words: tokenizer.json is missing")
        return cls(model.to(target), processor, tokenizer, prompt)

    def caption(
        self,
        images: Sequence[str | ImageFile | Image.Image],
        *,
        decode: DecodeSettings,
        batch_size: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[CaptionResult]:
        """Caption images in the order given, as `Captioner.caption` does.

        Raises:
            UsageError: prompt and caption exceed the decoder's positions.
        """
        if len(self.prompt_ids) + decode.max_new_tokens > self.max_positions:
            raise UsageError(
                f"max_new_tokens={decode.max_new_tokens} and a prompt of {len(self.prompt_ids)} "
                f"exceed the {self.max_positions} positions of {type(self.model).__name__}"
            )
        batches = batches_of(images, [batch_size])
        captions = caption_in_batches(batches, lambda batch, _: self._caption_batch(batch, decode))
        return counted(captions, progress)

    def validation(self, images: object) -> None:
        """Return nothing: perplexity is measured for captioners of vlm-bridge alone."""

    @torch.inference_mode()
    def _caption_batch(
        self, images: Sequence[Image.Image], decode: DecodeSettings
    ) -> list[tuple[str, None, bool]]:
        """Caption RGB images: (caption, no log-probability, whether it ended in time)."""
        model, device, pad_id = self.model, self.model.device, self.tokenizer.pad_token_id
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(device)
        ids = torch.tensor([self.prompt_ids] * len(images), device=device)
        inputs = {"pixel_values": pixels, "input_ids": ids}
        if self.model_type == "blip":
            # Its own generate drops the last token of a prompt, which it takes for [SEP].
            states = model.vision_model(pixel_values=pixels).last_hidden_state
            model, inputs = model.text_decoder, {"input_ids": ids, "encoder_hidden_states": states}
        elif self.model_type == "vision-encoder-decoder":
            inputs = {"pixel_values": pixels, "decoder_input_ids": ids}
        settings = GenerationConfig(
            bos_token_id=self.prompt_ids[0],
            decoder_start_token_id=self.prompt_ids[0],
            eos_token_id=self.eos_id,
            pad_token_id=self.eos_id if pad_id is None else pad_id,
            min_new_tokens=decode.min_new_tokens or None,
            **{name: getattr(decode, name) for name in SETTINGS},
        )
        captions = []
        for row in model.generate(**inputs, generation_config=settings)[:, ids.shape[1] :].tolist():
            finished = self.eos_id in row
            kept = row[: row.index(self.eos_id)] if finished else row
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            captions.append((text.strip(), None, finished))
        return captions


def _captioning_class(name: str, config: dict[str, Any]) -> str:
    """Return the name of the class of `transformers` that captions with a checkpoint."""
    model_type = config.get("model_type", "")
    if model_type == "vlm-bridge-captioner":
        raise ModelError(f"{name} is a captioner of vlm-bridge: score it with --checkpoint {name}")
    (saved_as, *_) = config.get("architectures") or [MODELS.get(model_type, model_type)]
    if saved_as != MODELS.get(model_type):
        holds = saved_as or "model without a config.json"
        raise ModelError(f"{name} holds a {holds}; these work: {', '.join(MODELS.values())}")
    return MODELS[model_type]
