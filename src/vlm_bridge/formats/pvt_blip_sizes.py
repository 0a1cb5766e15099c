"""Configurations of a PVT and of BLIP's text decoder, from shapes of tensors or from a name."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_bridge.errors import ModelError
from vlm_bridge.hub import reach_hub
from vlm_bridge.model_architecture.language_model import BLIP_TEXT
from vlm_bridge.model_architecture.pvt_blip import why
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbamConfig, model_type_of, pvt_heads
from vlm_bridge.model_architecture.weights import known_architecture

Tensors = Mapping[str, torch.Tensor]

BLIP_HEAD_WIDTH = 64  # of BLIP base and large (Li et al. 2022)
PVT_TYPES = ("pvt", "pvt_v2", PVT_CBAM)
# Names in transformers: a stage's blocks, its patch embedding, keys' reduction, a query's bias.
_NAMES = {
    "pvt": (
        "encoder.block.{}.", "encoder.patch_embeddings.{}.projection.weight",
        "attention.self.sequence_reduction.weight", "attention.self.query.bias",
    ),
    "pvt_v2": (
        "encoder.layers.{}.blocks.", "encoder.layers.{}.patch_embedding.proj.weight",
        "attention.spatial_reduction.weight", "attention.query.bias",
    ),
}  # fmt: skip


def config_of(name: str, wanted: tuple[str, ...]) -> Any:
    """Return the configuration of a folder or a published model; of a whole BLIP, its text part.

    Raises:
        ModelError: it cannot be read, or is of another kind of model.
    """
    from transformers import AutoConfig

    is_folder = Path(name).is_dir()
    try:
        known = None if is_folder else known_architecture(name)
        if is_folder and model_type_of(name) == PVT_CBAM:
            config: Any = PvtCbamConfig.from_folder(Path(name))
        elif known:
            config = known.config
        else:
            reach_hub(name)
            config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {why(error, name)}"
        ) from error
    config = config.text_config if config.model_type == "blip" and BLIP_TEXT in wanted else config
    if config.model_type not in wanted:
        raise ModelError(f"{name!r} is a {config.model_type}, not a {' or '.join(wanted)}")
    return copy.deepcopy(config)


def encoder_kind(names: Mapping[str, Any]) -> str:
    """Return which of `PVT_TYPES` has an encoder's tensor names."""
    if "patch1.proj.weight" in names:
        return PVT_CBAM
    return "pvt_v2" if any(name.startswith("encoder.layers.") for name in names) else "pvt"


def pvt_config(state: Tensors) -> Any:
    """Return the configuration of a PVT's state dict.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the attention heads are not those of the published models.
    """
    from transformers import PvtConfig, PvtV2Config

    if (kind := encoder_kind(state)) == PVT_CBAM:
        return PvtCbamConfig.of(state)
    stage_name, patch_name, reduction_name, bias_name = _NAMES[kind]
    depths: list[int] = []
    while depth := _count(state, stage_name.format(len(depths))):
        depths.append(depth)
    firsts = [f"{stage_name.format(stage)}0." for stage in range(max(1, len(depths)))]
    widths = [state[f"{first}layer_norm_1.weight"].shape[0] for first in firsts]
    hidden = [state[f"{first}mlp.dense1.weight"].shape[0] for first in firsts]
    patches = [state[patch_name.format(stage)].shape for stage in range(len(depths))]
    reductions = [
        state[name].shape[-1] if (name := first + reduction_name) in state else 1
        for first in firsts
    ]
    sizes: dict[str, Any] = {
        "num_channels": patches[0][1],
        "hidden_sizes": widths,
        "depths": depths,
        "num_encoder_blocks": len(depths),
        "num_attention_heads": list(pvt_heads(widths)),
        "patch_sizes": [shape[-1] for shape in patches],
        "mlp_ratios": [wide // width for wide, width in zip(hidden, widths, strict=True)],
        "qkv_bias": firsts[0] + bias_name in state,
    }
    if kind == "pvt":
        positions = state["encoder.patch_embeddings.0.position_embeddings"].shape[1]
        return PvtConfig(
            image_size=round(positions**0.5) * patches[0][-1],
            sequence_reduction_ratios=reductions,
            strides=sizes["patch_sizes"],
            **sizes,
        )
    return PvtV2Config(
        sr_ratios=reductions,
        # Linear attention pools, then reduces with 1x1 kernels (PVTv2-B2-Li).
        linear_attention=firsts[0] + reduction_name in state and reductions[0] == 1,
        strides=[(shape[-1] + 1) // 2 for shape in patches],  # patches overlap: 7 and 4, 3 and 2
        **sizes,
    )


def text_config(state: Tensors, like: str | None = None) -> Any:
    """Return the configuration of a BLIP text decoder's state dict.

    The width of the states that cross-attention reads is always read from the tensors.

    Args:
        like: name or folder of a BLIP with as many layers and words; None reads all from tensors.

    Raises:
        KeyError: a tensor is missing.
        ValueError: layers or words differ, or the attention heads are not those of BLIP.
        ModelError: the configuration of ``like`` cannot be read.
    """
    from transformers import BlipTextConfig

    vocabulary, width = state["bert.embeddings.word_embeddings.weight"].shape
    if not (layers := _count(state, "bert.encoder.layer.")):
        raise KeyError("bert.encoder.layer.0.*")
    layer = "bert.encoder.layer.0."
    states_width = state[layer + "crossattention.self.key.weight"].shape[1]
    if like is not None:
        config = config_of(like, (BLIP_TEXT,))
        remedy = "name the BLIP it was made of (blip_model_name, --blip-model)"
        if layers != config.num_hidden_layers:
            raise ValueError(
                f"its text decoder has {layers} layers and that of {like!r} "
                f"{config.num_hidden_layers}: layers are missing, or {remedy}"
            )
        if vocabulary != config.vocab_size:
            raise ValueError(
                f"its text decoder has a vocabulary of {vocabulary} and that of {like!r} "
                f"{config.vocab_size}: {remedy}"
            )
        config.encoder_hidden_size = states_width
        return config
    if width % BLIP_HEAD_WIDTH:
        raise ValueError(
            f"no tensor tells the attention heads of a text decoder of width {width}: name a model "
            "of this shape with blip_model_name (--blip-model)"
        )
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=states_width,
        intermediate_size=state[layer + "intermediate.dense.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // BLIP_HEAD_WIDTH,
        max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
    )


def _count(state: Tensors, prefix: str) -> int:
    """Return the number of layers under a prefix. Raises ValueError where one is missing."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(found[1]) for name in state if (found := pattern.match(name))}
    if missing := sorted(set(range(max(numbers, default=0))) - numbers):
        raise ValueError(f"it has no layer {missing[0]} of {max(numbers) + 1} ({prefix}*)")
    return len(numbers)
