"""Published image-to-text models behind the interface of our own captioners, to be scored exactly as those are.

A family of `transformers` is a class of a few lines that says how its decoder takes an image and which tokens
start and end a caption. Everything else is shared: opening pictures, batching, decoding, teacher-forced losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig

from vlm_bridge import runtime
from vlm_bridge.captioning.pipeline import CaptionResult, caption_in_batches
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.feature_cache import OnTheFlyPixels
from vlm_bridge.data_pipeline.loader import (
    IGNORE_INDEX,
    CaptionFormat,
    PackedBatch,
    Row,
    TokenizedImages,
    in_batches,
)
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.errors import ModelError, UsageError
from vlm_bridge.evaluation.run import NotMeasurable
from vlm_bridge.hub import hub_problem, reach_hub
from vlm_bridge.model_architecture.generation import Caption, image_keys, search, searched_together
from vlm_bridge.model_architecture.plain_text import encode_as_text
from vlm_bridge.training_strategy.validation import Validation, shuffled_images

OUR_MODEL_TYPE = "vlm-bridge-captioner"


class Family(Protocol):
    """How one class of `transformers` captions: its image state, its decoder, and the ids around a caption.

    ``decoder`` is called, and generates, with what ``inputs`` returns; its logits [B, T, vocabulary] end with
    those of the T text positions.
    """

    prompt: str
    """What the authors put before every caption; ``""`` for nothing."""
    decoder: Any
    start_id: int | None
    eos_id: int | None
    max_positions: int
    """Text positions that the decoder has, the start token and the prompt included."""

    def __init__(self, model: Any): ...

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> what the decoder reads of each image [B, ...]."""
        ...

    def inputs(
        self, state: torch.Tensor, ids_bt: torch.Tensor, mask_bt: torch.Tensor
    ) -> dict[str, Any]: ...


class Blip:
    """BLIP (Li et al. 2022): a BERT decoder that cross-attends to a ViT, starts with `[DEC]`, ends with `[SEP]`.

    The prompt is that of its published captioning configuration (`caption_coco.yaml`).
    """

    prompt = "a picture of"

    def __init__(self, model: Any):
        text = model.config.text_config
        self.encoder, self.decoder = model.vision_model, model.text_decoder
        self.start_id, self.eos_id = text.bos_token_id, text.sep_token_id
        self.max_positions = text.max_position_embeddings

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values=pixels_bchw).last_hidden_state

    def inputs(
        self, state: torch.Tensor, ids_bt: torch.Tensor, mask_bt: torch.Tensor
    ) -> dict[str, Any]:
        return {"input_ids": ids_bt, "attention_mask": mask_bt, "encoder_hidden_states": state}


class Git:
    """GIT (Wang et al. 2022): image patches stand before the text of one decoder; `[CLS]` starts, `[SEP]` ends.

    The image is encoded inside the decoder's own forward pass, so its state is the pixels themselves.
    """

    prompt = ""

    def __init__(self, model: Any):
        self.decoder = model
        self.start_id, self.eos_id = model.config.bos_token_id, model.config.eos_token_id
        self.max_positions = model.config.max_position_embeddings

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return pixels_bchw

    def inputs(
        self, state: torch.Tensor, ids_bt: torch.Tensor, mask_bt: torch.Tensor
    ) -> dict[str, Any]:
        return {"input_ids": ids_bt, "attention_mask": mask_bt, "pixel_values": state}


class VisionEncoderDecoder:
    """Any vision encoder and cross-attending decoder that were trained together, such as vit-gpt2."""

    prompt = ""

    def __init__(self, model: Any):
        self.encoder, self.decoder = model.encoder, model
        text = model.config.decoder
        # Published folders keep these ids in one of three places.
        places = (model.generation_config, model.config, text)
        self.start_id = _first_id(places, "decoder_start_token_id", "bos_token_id")
        self.eos_id = _first_id(places, "eos_token_id")
        self.max_positions = getattr(text, "max_position_embeddings", None) or 10**6

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values=pixels_bchw).last_hidden_state

    def inputs(
        self, state: torch.Tensor, ids_bt: torch.Tensor, mask_bt: torch.Tensor
    ) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        return {
            "decoder_input_ids": ids_bt,
            "decoder_attention_mask": mask_bt,
            "encoder_outputs": BaseModelOutput(last_hidden_state=state),  # type: ignore[arg-type]
        }


FAMILIES: dict[str, tuple[str, type[Family]]] = {
    "blip": ("BlipForConditionalGeneration", Blip),
    "git": ("GitForCausalLM", Git),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", VisionEncoderDecoder),
}
"""``model_type`` of a configuration -> the captioning class of `transformers`, and how it is driven."""


class BaselineCaptioner:
    """A published captioner, evaluated like our own: ``BaselineCaptioner.from_pretrained("microsoft/git-base-coco")``.

    It works in float32. Generation settings that its authors published are set aside: what a caption is searched
    with is said by :class:`DecodeSettings` alone, so that models are compared and not their settings.
    """

    def __init__(
        self, model: Any, processor: Any, tokenizer: Any, family: Family, prompt: str | None = None
    ):
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = tokenizer
        self.family = family
        if family.start_id is None or family.eos_id is None:
            raise ModelError(
                f"{type(model).__name__}: its configuration names no token that "
                f"{'starts' if family.start_id is None else 'ends'} a caption (decoder_start_token_id, eos_token_id)"
            )
        format = CaptionFormat(
            lambda texts: encode_as_text(tokenizer, texts),
            start_id=family.start_id,
            eos_id=family.eos_id,
            prompt=(family.prompt if prompt is None else prompt).strip(),
        )
        room = family.max_positions - len(format.prompt_ids) + 1
        self.format = replace(format, max_caption_tokens=min(format.max_caption_tokens, room))
        family.decoder.generation_config = GenerationConfig(
            bos_token_id=family.start_id,
            decoder_start_token_id=family.start_id,
            eos_token_id=family.eos_id,
            pad_token_id=self.pad_id,
        )

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
            prompt: text before every caption; None means what the family was trained with.

        Raises:
            ModelError: no such model, no captioner, weights that are missing, or no access.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        target = runtime.resolve_device(device)
        try:
            reach_hub(name, revision)
            config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
            model_class, family = _captioning_class(name, config)
            # Old files are pickles: transformers reads those, too, with weights_only=True.
            model, loading = model_class.from_pretrained(
                name, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"cannot load the model {name!r}: {_why(error, name)}") from error
        # Poolers classify and take no part in captions: published captioners often lack theirs.
        missing = sorted(key for key in loading["missing_keys"] if ".pooler." not in key)
        if missing:
            raise ModelError(
                f"{name} is no whole {model_class.__name__}: {len(missing)} weights are missing ({missing[0]}, ...), "
                "and random ones would caption at random; name a checkpoint of that class"
            )
        # Without its files transformers builds BERT's tokenizer of special tokens alone, and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ModelError(
                f"the tokenizer of {name} knows no words: its files (tokenizer.json) are missing"
            )
        return cls(model.to(target), processor, tokenizer, family(model), prompt)

    @property
    def pad_id(self) -> int:
        """What fills rows up; it is never scored, so a family without a pad takes its EOS."""
        pad = self.tokenizer.pad_token_id
        return self.format.eos_id if pad is None else pad

    def caption(
        self,
        images: Sequence[str | PictureFile | Image.Image],
        *,
        decode: DecodeSettings,
        batch_size: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[CaptionResult]:
        """Caption pictures in the order given, as :meth:`vlm_bridge.captioning.pipeline.Captioner.caption` does.

        Raises:
            UsageError: prompt and caption do not fit into the decoder's positions.
        """
        needed = len(self.format.prompt_ids) + decode.max_new_tokens
        if needed > self.family.max_positions:
            raise UsageError(
                f"max_new_tokens={decode.max_new_tokens} needs {needed} positions with the prompt, and the decoder of "
                f"{type(self.model).__name__} has {self.family.max_positions}: ask for fewer"
            )
        return caption_in_batches(
            images, lambda pictures: self._caption_batch(pictures, decode), batch_size, progress
        )

    @torch.inference_mode()
    def validate(
        self,
        images: Sequence[CaptionedImage],
        *,
        batch_size: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Validation:
        """Loss, perplexity and visual gain on captioned images: EOS is counted, pads and prompt never are.

        Raises:
            NotMeasurable: a position of the decoder sees what it should predict: a loss would mean nothing.
        """
        data = TokenizedImages(images, self.format)
        pixels = OnTheFlyPixels(
            [image.path for image in images], lambda x: self._preprocess(x).numpy()
        )
        self._check_causality(data, pixels)

        wrong_image = shuffled_images(len(data))
        right_sum = wrong_sum = 0.0
        num_tokens = done = 0
        for batch in in_batches(range(len(data)), batch_size):
            right, wrong = (
                self._encode(pixels[indices]) for indices in (np.array(batch), wrong_image[batch])
            )
            rows = [
                Row(place, (caption,))
                for place, image in enumerate(batch)
                for caption in range(data.captions_per_image[image])
            ]
            for some in in_batches(rows, batch_size):
                packed = data.pack([Row(batch[row.image], row.captions) for row in some])
                places = torch.tensor([row.image for row in some], device=self.model.device)
                right_sum += self._loss(right[places], packed)
                wrong_sum += self._loss(wrong[places], packed)
                num_tokens += packed.num_supervised
            done += len(batch)
            progress(done)
        loss = right_sum / num_tokens
        return Validation(loss, wrong_sum / num_tokens - loss if len(data) > 1 else 0.0, num_tokens)

    @torch.inference_mode()
    def _caption_batch(
        self, pictures: Sequence[Image.Image], decode: DecodeSettings
    ) -> list[tuple[str, float, bool]]:
        pixels = self._preprocess(pictures)
        prompt_rt = torch.tensor([self.format.prompt_ids] * len(pictures), device=self.model.device)
        keys = image_keys(pixels) if decode.do_sample else None
        captions: list[Caption] = []
        for part, own_keys in searched_together(len(pictures), decode, keys):
            state, prompt = self._encode(pixels[part].numpy()), prompt_rt[part]
            inputs = self.family.inputs(state, prompt, torch.ones_like(prompt))
            generate = partial(self.family.decoder.generate, **inputs, pad_token_id=self.pad_id)
            captions += search(generate, prompt, decode, self.format.eos_id, keys=own_keys)
        return [
            (
                self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                score,
                len(ids) < decode.max_new_tokens,
            )
            for ids, score in captions
        ]

    def _preprocess(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.processor(list(pictures), return_tensors="pt")["pixel_values"]

    def _encode(self, pixels_bchw: np.ndarray) -> torch.Tensor:
        return self.family.encode(torch.from_numpy(pixels_bchw).to(self.model.device))

    def _logits(
        self, state: torch.Tensor, ids_bt: torch.Tensor, mask_bt: Any = None
    ) -> torch.Tensor:
        """Logits [B, T, vocabulary] of the text positions, whatever stands before the text."""
        mask_bt = torch.ones_like(ids_bt) if mask_bt is None else mask_bt
        output = self.family.decoder(**self.family.inputs(state, ids_bt, mask_bt), use_cache=False)
        return output.logits[:, -ids_bt.shape[1] :].float()

    def _loss(self, state: torch.Tensor, batch: PackedBatch) -> float:
        """Sum of the token losses of rows of one caption each, in nats."""
        device = self.model.device
        ids, labels, mask = (
            torch.from_numpy(array).to(device)
            for array in (batch.input_ids, batch.labels, (batch.segments > 0).astype("int64"))
        )
        ids = ids.masked_fill(mask == 0, self.pad_id)
        logits = self._logits(state, ids, mask)
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.double().sum().item()

    def _check_causality(self, data: TokenizedImages, pixels: OnTheFlyPixels) -> None:
        """A decoder built without a causal mask reads the answer: measure that it does not, on one caption."""
        ids = torch.tensor([data.caption(0, 0).input_ids], device=self.model.device)
        if ids.shape[1] < 2:
            return
        other = ids.clone()
        other[:, -1] = (
            self.format.start_id if ids[0, -1] != self.format.start_id else self.format.eos_id
        )
        state = self._encode(pixels[np.array([0])])
        before, after = (self._logits(state, rows)[:, :-1] for rows in (ids, other))
        if not torch.allclose(before, after, atol=1e-3, rtol=1e-3):
            raise NotMeasurable(
                f"the decoder of {type(self.model).__name__} sees later words of the caption it should predict"
            )


def _captioning_class(name: str, config: Mapping[str, Any]) -> tuple[Any, type[Family]]:
    """The class of `transformers` that a checkpoint must be of, and its family here."""
    import transformers

    model_type = config.get("model_type")
    if model_type is None:
        raise ModelError(f"{name} names no model: its config.json is missing or has no model_type")
    if model_type == OUR_MODEL_TYPE:
        raise ModelError(f"{name} is a captioner of vlm-bridge: score it with --checkpoint {name}")
    class_name, family = FAMILIES.get(model_type, ("", None))
    saved_as = (config.get("architectures") or [class_name or f"model of type {model_type}"])[0]
    if family is None or saved_as != class_name:
        works = ", ".join(class_name for class_name, _ in FAMILIES.values())
        raise ModelError(
            f"{name} holds a {saved_as}, which is no captioner known here; these classes work: {works}"
        )
    return getattr(transformers, class_name), family


def _first_id(places: Sequence[Any], *names: str) -> int | None:
    """The first token id that any place has under the first of the names that is set."""
    for name in names:
        for place in places:
            value = getattr(place, name, None)
            if value is not None:
                return value[0] if isinstance(value, list) else value
    return None


def _why(error: Exception, name: str) -> str:
    if problem := hub_problem(error, name):
        return problem
    # transformers goes on with advice about names on the hub, which is misleading for a folder.
    first = str(error).strip().split("\n")[0].split(". If you ")[0] or type(error).__name__
    return f"{first} (give a folder made by save_pretrained, or a hub name with network access)"
