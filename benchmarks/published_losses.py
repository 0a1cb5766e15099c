"""The first losses of the dinov2-gemma recipe, beside those of the published formula on the same data.

    python -m benchmarks.published_losses              bridge of 66,092,544 parameters, Gemma 2 of two layers x 2304
    python -m benchmarks.published_losses --tiny       does it run at all?

Ours is `vlm-training` with `config/training-default.yaml`, in float32 and without dropout. The formula is written out
below in plain torch: rows of the embedding matrix e become 48 (e + bridge(e)), 48 being sqrt(2304); AdamW at 1e-5,
gradients clipped at 0.3, a cosine over all steps. Both start from the same bridge, whose residual branches are zero.
The training set is one batch, so that the order of its captions does not matter; all captions have one length, so that
there are no pads, which the published code counts and ours does not. Models are random, of the real classes.

The largest relative difference must be below 1e-2; the exit code is 1 if it is not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import harness
from vlm_bridge.configuration import DEFAULT_RECIPE, Recipe, load_recipe, shipped_recipe
from vlm_bridge.formats.dinov2_gemma import to_original
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy.trainer import train

LARGEST_DIFFERENCE = 1e-2
NUM_IMAGES, NUM_WORDS, CAPTION_WORDS = 8, 500, 12
START, EOS, PAD = "<bos>", "<eos>", "<pad>"


class PublishedBridge(nn.Module):
    """The published block, under its own names; attention written out."""

    def __init__(self, vision_dim: int, text_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.vision_projection = nn.Linear(vision_dim, text_dim)
        self.ln1, self.ln2 = nn.LayerNorm(text_dim), nn.LayerNorm(text_dim)
        self.cross_attention = nn.ModuleDict(
            {f"w_{name}": nn.Linear(text_dim, text_dim) for name in "qkvo"}
        )
        self.ffn = nn.Sequential(
            nn.Linear(text_dim, 4 * text_dim),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(4 * text_dim, text_dim),
            nn.Dropout(0.0),
        )

    def forward(self, features_bnd: torch.Tensor, text_bth: torch.Tensor) -> torch.Tensor:
        seen_bnh = self.vision_projection(features_bnd)
        queries, keys, values = (
            self.cross_attention[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name, x in (("w_q", self.ln1(text_bth)), ("w_k", seen_bnh), ("w_v", seen_bnh))
        )
        weights = F.softmax(queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5, dim=-1)
        attended_bth = (weights @ values).transpose(1, 2).flatten(2)
        text_bth = text_bth + self.cross_attention["w_o"](attended_bth)
        return text_bth + self.ffn(self.ln2(text_bth))


def save_models(folder: Path, text_dim: int, vision_dim: int) -> None:
    """Random DINOv2 and Gemma 2 of two layers each, and a tokenizer of whole words."""
    vision = Dinov2Config(
        hidden_size=vision_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    Dinov2Model(vision).save_pretrained(folder / "encoder")
    size = {"height": 56, "width": 56}
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=size).save_pretrained(
        folder / "encoder"
    )
    tokens = [PAD, EOS, START, *(f"w{number}" for number in range(NUM_WORDS))]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    named = {"bos_token": START, "eos_token": EOS, "pad_token": PAD}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "decoder")
    text = Gemma2Config(
        vocab_size=len(tokens), hidden_size=text_dim, intermediate_size=4 * text_dim, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=text_dim // 8, query_pre_attn_scalar=text_dim // 8,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(text).save_pretrained(folder / "decoder")


def save_data(folder: Path, seed: int) -> list[tuple[Path, str]]:
    """A data folder as the published code prepares it; returns the images and captions of its training split."""
    random = np.random.default_rng(seed)
    pairs = []
    for split, count in (("train", NUM_IMAGES), ("val", 2)):
        (folder / split / "images").mkdir(parents=True)
        with (folder / split / "captions.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                name = f"images/{split}_{number}.jpg"
                noise = random.integers(0, 255, (56, 56, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / split / name)
                caption = " ".join(
                    f"w{word}" for word in random.integers(0, NUM_WORDS, CAPTION_WORDS)
                )
                line = {"image_path": name, "caption": caption, "original_id": f"{split}-{number}"}
                file.write(json.dumps(line) + "\n")
                if split == "train":
                    pairs.append((folder / split / name, caption))
    return pairs


def recipe_for(folder: Path, options: argparse.Namespace) -> Recipe:
    """The published recipe on the models and data in a folder, in float32 and without dropout."""
    places = ("checkpoint_dir=runs", "log_dir=logs", "data_dir=data", "feature_cache=features")
    return load_recipe(
        shipped_recipe(DEFAULT_RECIPE),
        [
            f"vision_encoder.name={folder / 'encoder'}", "vision_encoder.image_size=56",
            f"language_model.name={folder / 'decoder'}", "language_model.dtype=float32",
            "bridge.dropout=0", "amp_dtype=float32", "feature_cache_dtype=float32",
            f"num_epochs={options.steps}", f"validate_every={options.steps} epochs", "log_every_n_steps=1",
            f"save_every={options.steps} epochs",
            "num_validation_samples=0", "num_workers=0", f"device={options.device}", f"seed={options.seed}",
            *(f"{key}={folder / name}" for key, _, name in (place.partition("=") for place in places)),
        ],
    )  # fmt: skip


def our_losses(recipe: Recipe) -> list[float]:
    """The loss of each step of a training, from its log."""
    train(recipe)
    lines = (Path(recipe.log_dir) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]


def formula_losses(recipe: Recipe, pairs: list[tuple[Path, str]]) -> list[float]:
    """The losses of the published loop on the same captions, from the bridge that our training starts with."""
    captioner = build_captioner(recipe)
    weights = {
        name.removeprefix("bridge_module."): x
        for name, x in to_original(start_of(captioner), "it").items()
    }
    text_dim, vision_dim = weights["vision_projection.weight"].shape
    bridge = PublishedBridge(vision_dim, text_dim, recipe.bridge.num_heads)
    bridge.load_state_dict(weights)
    del captioner

    causal_lm: Any = Gemma2ForCausalLM.from_pretrained(
        recipe.language_model.name, attn_implementation="eager"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.language_model.name)
    processor = AutoImageProcessor.from_pretrained(recipe.vision_encoder.name, backend="pil")
    images = [Image.open(path).convert("RGB") for path, _ in pairs]
    with torch.no_grad():
        encoder: Any = Dinov2Model.from_pretrained(recipe.vision_encoder.name)
        features_bnd = encoder(
            processor(images, return_tensors="pt")["pixel_values"]
        ).last_hidden_state
    ids_bt = torch.tensor(
        tokenizer([f"{START} {caption} {EOS}" for _, caption in pairs])["input_ids"]
    )
    rows_bth = causal_lm.get_input_embeddings().weight[ids_bt[:, :-1]].detach()

    causal_lm.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        bridge.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.num_epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=steps, eta_min=recipe.min_lr
    )
    losses = []
    for _ in range(steps):
        # transformers 4 scaled whatever came in as inputs_embeds; since 5 the caller does.
        logits = causal_lm(
            inputs_embeds=text_dim**0.5 * bridge(features_bnd, rows_bth), use_cache=False
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids_bt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bridge.parameters(), recipe.gradient_clip_val)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def start_of(captioner: Any) -> dict[str, torch.Tensor]:
    """The bridge of a new captioner, under its names in checkpoints."""
    return {name: tensor.clone() for name, tensor in captioner.trained_state_dict().items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="widths of 64 and 32 instead of 2304 and 1024"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    harness.quiet_transformers()
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_models(folder, *((64, 32) if options.tiny else (2304, 1024)))
        pairs = save_data(folder / "data", options.seed)
        recipe = recipe_for(folder, options)
        ours, formula = our_losses(recipe), formula_losses(recipe, pairs)
    print("step |    ours | formula | relative difference")
    differences = []
    for step, (one, other) in enumerate(zip(ours, formula, strict=True), start=1):
        differences.append(abs(one - other) / other)
        print(f"{step:4} | {one:7.4f} | {other:7.4f} | {differences[-1]:.1e}")
    print(f"largest relative difference {max(differences):.1e} (at most {LARGEST_DIFFERENCE:g})")
    return int(max(differences) > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    raise SystemExit(main())
