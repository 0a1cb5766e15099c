"""Configurations of a PVT and of BLIP's text decoder, read from the shapes of their tensors or from a name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_bridge.errors import ModelError
from vlm_bridge.hub import reach_hub
from vlm_bridge.model_architecture.language_model import BLIP_TEXT
from vlm_bridge.model_architecture.pvt_blip import why
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbamConfig, model_type_of, pvt_heads
from vlm_bridge.model_architecture.weights import known_architecture

BLIP_HEAD_WIDTH = 64
"""BERT's, and so that of the text decoders of BLIP base and large (Li et al. 2022)."""


PVT_TYPES = ("pvt", "pvt_v2", PVT_CBAM)


def config_of(name: str, wanted: tuple[str, ...]) -> Any:
    """The configuration of a folder or of a published model; of a whole BLIP its text part.

    Raises:
        ModelError: it cannot be had, or is of another kind of model.
    """
    from transformers import AutoConfig

    is_folder = Path(name).is_dir()
    try:
        known = None if is_folder else known_architecture(name)
        if is_folder and model_type_of(name) == PVT_CBAM:
            config: Any = PvtCbamConfig.from_folder(Path(name))
        else:
            if known is None:
                reach_hub(name)
            config = known.config if known else AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {why(error, name)}"
        ) from error
    config = config.text_config if config.model_type == "blip" and BLIP_TEXT in wanted else config
    if config.model_type not in wanted:
        raise ModelError(f"{name!r} is a {config.model_type}, not a {' or '.join(wanted)}")
    return copy.deepcopy(config)


def encoder_kind(names: Iterable[str]) -> str:
    """Which of `PVT_TYPES` an encoder's tensor names are of."""
    names = set(names)
    if "patch1.proj.weight" in names:
        return PVT_CBAM
    return "pvt_v2" if any(name.startswith("encoder.layers.") for name in names) else "pvt"


def pvt_config(state: Mapping[str, torch.Tensor]) -> Any:
    """The configuration of a PVT's state dict.

    Raises:
        KeyError: a tensor is missing.
        ValueError: no tensor tells the attention heads.
    """
    readers = {"pvt": _pvt_v1_config, "pvt_v2": _pvt_v2_config, PVT_CBAM: PvtCbamConfig.of}
    return readers[encoder_kind(state)](state)


def text_config_like(name: str, state: Mapping[str, torch.Tensor]) -> Any:
    """The configuration of a named BLIP's text decoder, for a state dict of the same layers and vocabulary.

    The width of the states that cross-attention reads is the state dict's own: a projection decides it.

    Raises:
        KeyError: a tensor is missing.
        ValueError: layers or words are missing, or more than the named decoder has.
        ModelError: the configuration cannot be had.
    """
    config = config_of(name, (BLIP_TEXT,))
    remedy = "name the BLIP it was made of (blip_model_name, --blip-model)"
    if (layers := num_layers(state)) != config.num_hidden_layers:
        raise ValueError(
            f"its text decoder has {layers} layers and that of {name!r} {config.num_hidden_layers}: layers are "
            f"missing, or {remedy}"
        )
    words = state["bert.embeddings.word_embeddings.weight"].shape[0]
    if words != config.vocab_size:
        raise ValueError(
            f"its text decoder has a vocabulary of {words} and that of {name!r} {config.vocab_size}: {remedy}"
        )
    config.encoder_hidden_size = state["bert.encoder.layer.0.crossattention.self.key.weight"].shape[
        1
    ]
    return config


def num_layers(state: Mapping[str, torch.Tensor]) -> int:
    """The number of layers of a text decoder.

    Raises:
        KeyError: there are none.
        ValueError: one is missing before the last.
    """
    numbers = {
        int(m[1]) for name in state if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))
    }
    if not numbers:
        raise KeyError("bert.encoder.layer.0.*")
    if missing := sorted(set(range(max(numbers))) - numbers):
        raise ValueError(f"its text decoder has no layer {missing[0]} of {max(numbers) + 1}")
    return max(numbers) + 1


def text_config(state: Mapping[str, torch.Tensor]) -> Any:
    """The configuration of a BLIP text decoder's state dict.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a layer is missing, or no tensor tells the attention heads.
    """
    from transformers import BlipTextConfig

    vocabulary, width = state["bert.embeddings.word_embeddings.weight"].shape
    if width % BLIP_HEAD_WIDTH:
        raise ValueError(
            f"no tensor tells the attention heads of a text decoder of width {width}: name a model of this shape with "
            "blip_model_name (--blip-model)"
        )
    layer = "bert.encoder.layer.0."
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state[layer + "crossattention.self.key.weight"].shape[1],
        intermediate_size=state[layer + "intermediate.dense.weight"].shape[0],
        num_hidden_layers=num_layers(state),
        num_attention_heads=width // BLIP_HEAD_WIDTH,
        max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
    )


def _pvt_v2_config(state: Mapping[str, torch.Tensor]) -> Any:
    from transformers import PvtV2Config

    stages = _stages(
        state, r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.", "encoder.layers.{}.blocks.0."
    )
    reductions = [stage.get("attention.spatial_reduction.weight") for stage in stages.first_blocks]
    patches = [
        state[f"encoder.layers.{i}.patch_embedding.proj.weight"].shape
        for i in range(len(stages.depths))
    ]
    return PvtV2Config(
        num_channels=patches[0][1],
        hidden_sizes=stages.widths,
        depths=stages.depths,
        num_encoder_blocks=len(stages.depths),
        num_attention_heads=list(pvt_heads(stages.widths)),
        sr_ratios=[1 if kernel is None else kernel.shape[-1] for kernel in reductions],
        # Linear attention pools and then reduces with 1x1 kernels (PVTv2-B2-Li).
        linear_attention=reductions[0] is not None and reductions[0].shape[-1] == 1,
        patch_sizes=[shape[-1] for shape in patches],
        strides=[
            (shape[-1] + 1) // 2 for shape in patches
        ],  # overlapping patches: 7 and 4, 3 and 2
        mlp_ratios=stages.mlp_ratios,
        qkv_bias="attention.query.bias" in stages.first_blocks[0],
    )


def _pvt_v1_config(state: Mapping[str, torch.Tensor]) -> Any:
    from transformers import PvtConfig

    stages = _stages(state, r"encoder\.block\.(\d+)\.(\d+)\.", "encoder.block.{}.0.")
    reductions = [
        stage.get("attention.self.sequence_reduction.weight") for stage in stages.first_blocks
    ]
    patches = [
        state[f"encoder.patch_embeddings.{i}.projection.weight"].shape
        for i in range(len(stages.depths))
    ]
    positions = state["encoder.patch_embeddings.0.position_embeddings"].shape[1]
    return PvtConfig(
        image_size=round(positions**0.5) * patches[0][-1],
        num_channels=patches[0][1],
        hidden_sizes=stages.widths,
        depths=stages.depths,
        num_encoder_blocks=len(stages.depths),
        num_attention_heads=list(pvt_heads(stages.widths)),
        sequence_reduction_ratios=[
            1 if kernel is None else kernel.shape[-1] for kernel in reductions
        ],
        patch_sizes=[shape[-1] for shape in patches],
        strides=[shape[-1] for shape in patches],
        mlp_ratios=stages.mlp_ratios,
        qkv_bias="attention.self.query.bias" in stages.first_blocks[0],
    )


class _Stages(NamedTuple):
    """What the blocks of a pyramid tell of it, stage by stage; tensors of a first block have their names within it."""

    depths: list[int]
    first_blocks: list[dict[str, torch.Tensor]]

    @property
    def widths(self) -> list[int]:
        return [block["layer_norm_1.weight"].shape[0] for block in self.first_blocks]

    @property
    def mlp_ratios(self) -> list[int]:
        hidden = [block["mlp.dense1.weight"].shape[0] for block in self.first_blocks]
        return [wide // width for wide, width in zip(hidden, self.widths, strict=True)]


def _stages(state: Mapping[str, torch.Tensor], pattern: str, first_block: str) -> _Stages:
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(pattern, name))}
    count = 1 + max((stage for stage, _ in found), default=-1)
    if not count:
        raise KeyError("encoder.layers.0.blocks.0.*")
    prefixes = [first_block.format(stage) for stage in range(count)]
    return _Stages(
        [sum(stage == index for stage, _ in found) for index in range(count)],
        [
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            for prefix in prefixes
        ],
    )
