"""How users write a training step without this library, in the plainest way that works. Each is honest work:

* ``published_step``: the published recipe. One row a caption, padded to the longest; the encoder runs in every step on
  the picture of every caption; logits of all positions in float32; `nn.CrossEntropyLoss`. The same models and bridge.
* ``hugging_face_step``: the same, as a good user of Hugging Face writes it: encoder, activations, logits and loss in
  bfloat16, and the fused AdamW. The strongest rival.
* ``encoder_decoder_step``: Hugging Face's `VisionEncoderDecoderModel` trained by `Trainer`. The same encoder, but its
  decoder needs cross-attention, which Llama and Gemma have not: a GPT-2 of the same width, depth, heads and vocabulary
  takes their place, frozen but for its cross-attention. Its weights are float32 under autocast, as `Trainer(bf16=True)`
  has them.
* ``clipcap_step``: ClipCap (Mokady et al. 2021). Features computed beforehand, averaged over the image; an MLP makes a
  prefix of 10 embeddings; rows of one caption padded to the longest of the whole data set; logits of all positions; the
  same language model, frozen.

Each function returns a callable that trains on all captions of a system once, in batches of the recipe's size, with the
same AdamW and gradient clipping as ours.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.systems import START, System
from vlm_bridge.device import autocast, keep_freed_memory
from vlm_bridge.model_architecture.attach import attach

IGNORE = -100
CLIPCAP_PREFIX = 10
Batch = dict[str, torch.Tensor]


class CaptionDataset(Dataset):
    """An item is one caption with its picture, as pixels or as features; in an order shuffled once."""

    def __init__(self, system: System, *, cached_features: bool = False):
        self.data = system.data
        self.images = system.features if cached_features else system.pixels
        items = [
            (image, n)
            for image, count in enumerate(system.data.captions_per_image)
            for n in range(count)
        ]
        self.items = [
            items[place]
            for place in np.random.default_rng(system.recipe.seed).permutation(len(items))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, number = self.items[index]
        caption = self.data.caption(image, number)
        return {
            "image": torch.from_numpy(self.images[np.array([image])])[0],
            "input_ids": torch.tensor(caption.input_ids),
            "labels": torch.tensor(caption.labels),
        }


def collate(items: list[dict[str, torch.Tensor]], length: int | None = None) -> Batch:
    """Rows of one caption, padded to the longest or to ``length``."""
    length = length or max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, item in enumerate(items):
        end = len(item["input_ids"])
        ids[row, :end], mask[row, :end], labels[row, :end] = item["input_ids"], 1, item["labels"]
    images = torch.stack([item["image"] for item in items])
    return {"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels}


def on_device(loader: DataLoader, device: torch.device) -> Iterator[Batch]:
    for batch in loader:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


# The published recipe.


def published_logits(system: System, batch: Batch, encoder: nn.Module) -> torch.Tensor:
    """Logits [R, T, vocabulary] of rows of one caption, by the language model's own forward pass."""
    model = system.model
    bridge: Any = model.bridge
    with torch.no_grad():
        features = encoder(batch["images"]).float()
    if model.feature_scale is not None:
        features = model.feature_scale(features)
    causal_lm = model.language_model.causal_lm
    with attach(model.language_model, bridge.encode(features)) as attached:
        return causal_lm(
            **attached.inputs(batch["input_ids"]),
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).logits


def published_loss(system: System, batch: Batch) -> torch.Tensor:
    """Mean loss per supervised token of rows of one caption."""
    logits = published_logits(system, batch, system.model.vision_encoder).float()
    return nn.CrossEntropyLoss(ignore_index=IGNORE)(logits.flatten(0, 1), batch["labels"].flatten())


def published_step(system: System) -> Callable[[], None]:
    loader = DataLoader(
        CaptionDataset(system), batch_size=system.recipe.batch_size, collate_fn=collate
    )
    return _loop(system, loader, _trained(system), lambda batch: published_loss(system, batch))


def _trained(system: System) -> list[nn.Parameter]:
    return [parameter for parameter in system.model.parameters() if parameter.requires_grad]


# The same, as a good user of Hugging Face writes it.


def hugging_face_loss(system: System, batch: Batch, encoder: nn.Module) -> torch.Tensor:
    """Mean loss per supervised token from logits in bfloat16."""
    logits = published_logits(system, batch | {"images": batch["images"].bfloat16()}, encoder)
    with torch.autocast(logits.device.type, enabled=False):  # it would make them float32
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE
        )


def hugging_face_step(system: System) -> Callable[[], None]:
    encoder = copy.deepcopy(system.model.vision_encoder).bfloat16()
    loader = DataLoader(
        CaptionDataset(system), batch_size=system.recipe.batch_size, collate_fn=collate
    )
    loss_of = lambda batch: hugging_face_loss(system, batch, encoder)  # noqa: E731
    return _loop(system, loader, _trained(system), loss_of, fused=True)


# ClipCap.


class ClipCapModel(nn.Module):
    """An MLP from one image vector to a prefix of embeddings of a frozen language model."""

    def __init__(self, causal_lm: Any, image_width: int):
        super().__init__()
        self.causal_lm = causal_lm
        width = causal_lm.get_input_embeddings().weight.shape[1]
        self.mapper = nn.Sequential(
            nn.Linear(image_width, width * CLIPCAP_PREFIX // 2),
            nn.Tanh(),
            nn.Linear(width * CLIPCAP_PREFIX // 2, width * CLIPCAP_PREFIX),
        )

    def forward(
        self, image: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        text = self.causal_lm.get_input_embeddings()(tokens)
        prefix = self.mapper(image).view(len(image), CLIPCAP_PREFIX, -1).to(text.dtype)
        prefix_mask = torch.ones(len(image), CLIPCAP_PREFIX, dtype=mask.dtype, device=mask.device)
        return self.causal_lm(
            inputs_embeds=torch.cat((prefix, text), dim=1),
            attention_mask=torch.cat((prefix_mask, mask), dim=1),
            use_cache=False,
        ).logits


def clipcap_step(system: System) -> Callable[[], None]:
    device = system.model.device
    causal_lm = system.model.language_model.causal_lm
    encoder: Any = system.model.vision_encoder
    model = ClipCapModel(causal_lm, encoder.embed_dim).to(device)
    loader = DataLoader(
        CaptionDataset(system, cached_features=True),
        batch_size=system.recipe.batch_size,
        collate_fn=lambda items: collate(items, system.max_tokens),
    )

    def loss(batch: Batch) -> torch.Tensor:
        image = batch["images"].float().mean(1)
        logits = model(image, batch["input_ids"], batch["attention_mask"])[:, CLIPCAP_PREFIX:]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORE
        )

    return _loop(system, loader, list(model.mapper.parameters()), loss)


def _loop(
    system: System,
    loader: DataLoader,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Batch], torch.Tensor],
    **options: Any,
) -> Callable[[], None]:
    """The usual loop: autocast around the forward pass, backward, clip, step (AdamW with ``options``)."""
    recipe, device = system.recipe, system.model.device
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **options
    )

    def run() -> None:
        keep_freed_memory(False)  # as Python begins
        for batch in on_device(loader, device):
            with autocast(device, recipe.autocast_dtype):
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip_val)
            optimizer.step()

    return run


# Hugging Face's VisionEncoderDecoderModel and Trainer.


class EncoderConfig(PreTrainedConfig):
    model_type = "benchmark-encoder"

    def __init__(self, hidden_size: int = 1, **options: Any):
        self.hidden_size = hidden_size
        super().__init__(**options)


AutoConfig.register(
    EncoderConfig.model_type, EncoderConfig
)  # or VisionEncoderDecoderConfig does not know it


class WrappedEncoder(PreTrainedModel):
    """The system's vision encoder as transformers wants one."""

    config_class = EncoderConfig
    main_input_name = "pixel_values"

    def __init__(self, encoder: Any):
        super().__init__(EncoderConfig(encoder.embed_dim))
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.encoder(pixel_values))


def encoder_decoder_step(system: System) -> Callable[[], object]:
    # It brings tens of MiB of libraries along, which are no part of the other variants' memory.
    from transformers import PrinterCallback, Trainer, TrainingArguments

    recipe, device = system.recipe, system.model.device
    text: Any = system.model.language_model.text_config
    decoder_config = GPT2Config(
        vocab_size=text.vocab_size,
        n_embd=text.hidden_size,
        n_layer=text.num_hidden_layers,
        n_head=text.num_attention_heads,
        n_inner=text.intermediate_size,
        n_positions=1024,
        add_cross_attention=True,
        use_cache=False,
        bos_token_id=START,
        eos_token_id=START,
    )
    encoder: Any = WrappedEncoder(system.model.vision_encoder)
    model: Any = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(decoder_config))
    model.config.decoder_start_token_id = model.config.pad_token_id = START
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            any(part in name for part in ("crossattention", "ln_cross_attn", "enc_to_dec_proj"))
        )
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=1,
        max_grad_norm=recipe.gradient_clip_val,
        lr_scheduler_type="constant",
        bf16=recipe.autocast_dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
    )

    def inputs(items: list[dict[str, torch.Tensor]]) -> Batch:
        batch = collate(items)
        return {
            "pixel_values": batch["images"],
            "decoder_input_ids": batch["input_ids"],
            "decoder_attention_mask": batch["attention_mask"],
            "labels": batch["labels"],
        }

    trainer = Trainer(
        model,
        arguments,
        data_collator=inputs,
        train_dataset=CaptionDataset(system),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train
