"""Combined files: PVT, projection and BLIP's text decoder as one dict of tensors.

The published guide's layout: `visual_encoder.*` is the state dict of transformers' PVT, `text_decoder.*` that of its
`BlipTextLMHeadModel`, and `visual_proj.*` the projection's. For PVTv2-B0 with a linear projection the last is
`visual_proj.weight` [768, 256] and `visual_proj.bias` [768]; a 3x3 convolution has a weight [768, 512, 3, 3].
Ours are the same tensors under other names, so that translating is renaming and every bit survives both ways.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.model_architecture.hub import hub_problem
from vlm_bridge.model_architecture.interchange import shortened
from vlm_bridge.model_architecture.known_architectures import known_architecture
from vlm_bridge.model_architecture.language_model import BLIP_TEXT

OUR_PREFIXES = {
    "visual_encoder.": "vision_encoder.model.",
    "text_decoder.": "language_model.causal_lm.",
    "visual_proj.": "bridge.projection.",
}
"""The parts of a combined file -> where a captioner keeps them."""
PVT_TYPES = ("pvt", "pvt_v2")
PVT_HEADS = (1, 2, 5, 8)
"""Attention heads of the four stages of PVT (Wang et al. 2021) and PVTv2 (2022), and the proportion of their widths."""
BLIP_HEAD_WIDTH = 64
"""BERT's, and so that of the text decoders of BLIP base and large (Li et al. 2022)."""

ProjectionKind = Literal["linear", "mlp", "conv3x3"]


class CombinedModel(NamedTuple):
    """The modules of a combined file, in evaluation mode.

    Attributes:
        pvt: transformers' PvtV2Model or PvtModel.
        blip: BlipTextLMHeadModel, which cross-attends to states [B, N, W].
        proj: nn.Linear or nn.Sequential on tokens [..., D] -> [..., W], or nn.Conv2d on maps [B, D, h, w].
    """

    pvt: Any
    blip: Any
    proj: nn.Module


def to_combined(captioner: Any, where: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a captioner under the names of a combined file; no value changes.

    Raises:
        CheckpointError: a part of it has no place there (another encoder or decoder, feature statistics, position
            embeddings); its tensors are named with their shapes.
    """
    vision: Any = getattr(captioner.vision_encoder, "model", None)
    vision_type = getattr(getattr(vision, "config", None), "model_type", None)
    if vision_type not in PVT_TYPES or not captioner.language_model.is_blip:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a PVT of transformers and BLIP's text decoder: "
            f"it has {type(vision or captioner.vision_encoder).__name__} and "
            f"{type(captioner.language_model.causal_lm).__name__}"
        )
    ours = captioner.state_dict()
    renamed = _renamed(ours, {our: theirs for theirs, our in OUR_PREFIXES.items()})
    if homeless := [f"{name} {tuple(ours[name].shape)} has no place" for name in ours if name not in renamed]:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a plain projection (bridge.kind=projection, "
            f"bridge.standardize_features=false, bridge.position_embeddings=false): {shortened(homeless)}"
        )
    return {renamed[name]: tensor for name, tensor in ours.items()}


def from_combined(state: Mapping[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a combined file under a captioner's names; no value changes.

    Raises:
        CheckpointError: a tensor is of none of the three parts.
    """
    _check_parts(state, where)
    renamed = _renamed(state, OUR_PREFIXES)
    return {renamed[name]: tensor for name, tensor in state.items()}


def combined_state(model: CombinedModel) -> dict[str, torch.Tensor]:
    """The dict of a combined file from its three modules: what `build_combined` reads."""
    return {
        f"{prefix}{name}": tensor
        for prefix, part in zip(OUR_PREFIXES, model, strict=True)
        for name, tensor in part.state_dict().items()
    }


def build_combined(
    state: Mapping[str, torch.Tensor], where: str | Path, *, pvt: str | None = None, blip: str | None = None
) -> CombinedModel:
    """transformers' modules with the weights of a combined file, in the file's own types.

    Args:
        where: the file, for messages.
        pvt: name or folder whose configuration the encoder has; None reads its sizes from the tensors.
        blip: the same for the decoder; of a whole BLIP the text part is taken.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape (each is named with it); or heads, which
            no tensor tells, are not those of the published models and no name is given.
        ModelError: a name's configuration cannot be had.
    """
    _check_parts(state, where)
    encoder, decoder, projection = (
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for prefix in OUR_PREFIXES
    )
    pvt_config = _config_of(pvt, PVT_TYPES) if pvt else _read_sizes(_pvt_config, encoder, where)
    text_config = _config_of(blip, (BLIP_TEXT,)) if blip else _read_sizes(_blip_config, decoder, where)
    text_config.is_decoder = True
    text_config.tie_word_embeddings = _is_tied(decoder, text_config)
    kind = _read_sizes(projection_kind, projection, where)

    from transformers import BlipTextLMHeadModel, PvtModel, PvtV2Model

    model = CombinedModel(
        (PvtModel if pvt_config.model_type == "pvt" else PvtV2Model)(pvt_config),
        BlipTextLMHeadModel(text_config),
        new_projection(kind, pvt_config.hidden_sizes[-1], text_config.encoder_hidden_size),
    )
    states = (encoder, _with_tied(decoder, model.blip), projection)
    parts = list(zip(OUR_PREFIXES, model, states, strict=True))
    if problems := [problem for prefix, part, its in parts for problem in _misfits(prefix, part, its)]:
        raise CheckpointError(f"{where} does not fit: {shortened(problems)}")
    for _, part, its in parts:
        part.load_state_dict(its, strict=False, assign=True)  # assigned, tensors keep their type
        part.eval()
    model.blip.tie_weights()
    return model


def new_projection(kind: ProjectionKind, vision_dim: int, width: int) -> nn.Module:
    """A projection D -> W as a combined file has it, with random weights."""
    if kind == "linear":
        return nn.Linear(vision_dim, width)
    if kind == "conv3x3":
        return nn.Conv2d(vision_dim, width, kernel_size=3, padding=1)
    return nn.Sequential(nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width))


def projection_kind(projection: Mapping[str, torch.Tensor]) -> ProjectionKind:
    """Which projection a state dict is of (`weight` [W, D]; `weight` [W, D, 3, 3]; or two layers `0` and `2`).

    Raises:
        KeyError, ValueError: of none of them.
    """
    if "0.weight" in projection:
        return "mlp"
    weight = projection["weight"]
    kinds: dict[int, ProjectionKind] = {2: "linear", 4: "conv3x3"}
    if weight.ndim not in kinds:
        raise ValueError(
            f"visual_proj.weight {tuple(weight.shape)} is of no projection (linear, mlp, conv3x3)"
        )
    return kinds[weight.ndim]


# Names


def _renamed(names: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, str]:
    """Each name that has one of the prefixes -> the name with the other prefix."""
    return {
        name: other + name.removeprefix(prefix)
        for prefix, other in prefixes.items()
        for name in names
        if name.startswith(prefix)
    }


def _check_parts(state: Mapping[str, torch.Tensor], where: str | Path) -> None:
    known = _renamed(state, OUR_PREFIXES)
    problems = [f"{name} {tuple(state[name].shape)} is of no part" for name in state if name not in known]
    problems += [
        f"{prefix}* is missing"
        for prefix in OUR_PREFIXES
        if not any(name.startswith(prefix) for name in state)
    ]
    if problems:
        raise CheckpointError(
            f"{where} is not a combined file of {', '.join(f'{prefix}*' for prefix in OUR_PREFIXES)}: "
            f"{shortened(problems)}"
        )


def _misfits(prefix: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps a state dict from being this module's, a phrase each.

    Buffers that transformers computes itself were part of state dicts in its older versions, and are let pass.
    """
    wanted = module.state_dict()
    computed = {name for name, _ in module.named_buffers()} - wanted.keys()
    return (
        [
            f"{prefix}{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & state.keys())
            if state[name].shape != wanted[name].shape
        ]
        + [
            f"{prefix}{name} {tuple(wanted[name].shape)} is missing"
            for name in sorted(wanted.keys() - state.keys())
        ]
        + [
            f"{prefix}{name} {tuple(state[name].shape)} is unknown"
            for name in sorted(state.keys() - wanted.keys() - computed)
        ]
    )


def _is_tied(decoder: Mapping[str, torch.Tensor], config: Any) -> bool:
    """Whether the decoder's head has the weights of its word embeddings, as BLIP's; one that is left out has."""
    from transformers import BlipTextLMHeadModel

    tied_config = copy.deepcopy(config)
    tied_config.tie_word_embeddings = True
    with torch.device("meta"):
        tied = BlipTextLMHeadModel(tied_config)
    tied.tie_weights()
    held = [[decoder[name] for name in names if name in decoder] for names in _names_of_parameters(tied)]
    return all(torch.equal(first, other) for first, *others in filter(None, held) for other in others)


def _names_of_parameters(module: nn.Module) -> list[list[str]]:
    """Every parameter's names: several where modules share it."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return list(names.values())


def _with_tied(state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict with every name of the tensors that the module ties, where it has one of them."""
    completed = dict(state)
    for aliases in _names_of_parameters(module):
        if (present := next((name for name in aliases if name in state), None)) is not None:
            completed |= {name: state[present] for name in aliases if name not in state}
    return completed


# Configurations


def _config_of(name: str, wanted: tuple[str, ...]) -> Any:
    """The configuration of a published model or a folder; of a whole BLIP its text part."""
    from transformers import AutoConfig

    try:
        known = known_architecture(name)
        config = known.config if known else AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        why = hub_problem(error, name) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot read the configuration of {name!r}: {why}") from error
    config = config.text_config if config.model_type == "blip" and BLIP_TEXT in wanted else config
    if config.model_type not in wanted:
        raise ModelError(f"{name!r} is a {config.model_type}, not a {' or '.join(wanted)}")
    return copy.deepcopy(config)


def _read_sizes(
    read: Callable[[Mapping[str, torch.Tensor]], Any], state: Mapping[str, torch.Tensor], where: str | Path
) -> Any:
    try:
        return read(state)
    except KeyError as error:
        named = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:2])
        raise CheckpointError(
            f"{where} does not have the names of transformers: {error.args[0]} is missing beside {named} ..."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _pvt_config(state: Mapping[str, torch.Tensor]) -> Any:
    is_v2 = any(name.startswith("encoder.layers.") for name in state)
    return _pvt_v2_config(state) if is_v2 else _pvt_v1_config(state)


def _pvt_v2_config(state: Mapping[str, torch.Tensor]) -> Any:
    from transformers import PvtV2Config

    stages = _stages(state, r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.", "encoder.layers.{}.blocks.0.")
    reductions = [stage.get("attention.spatial_reduction.weight") for stage in stages.first_blocks]
    patches = [
        state[f"encoder.layers.{i}.patch_embedding.proj.weight"].shape for i in range(len(stages.depths))
    ]
    return PvtV2Config(
        num_channels=patches[0][1],
        hidden_sizes=stages.widths,
        depths=stages.depths,
        num_encoder_blocks=len(stages.depths),
        num_attention_heads=_pvt_heads(stages.widths),
        sr_ratios=[1 if kernel is None else kernel.shape[-1] for kernel in reductions],
        # Linear attention pools and then reduces with 1x1 kernels (PVTv2-B2-Li).
        linear_attention=reductions[0] is not None and reductions[0].shape[-1] == 1,
        patch_sizes=[shape[-1] for shape in patches],
        strides=[(shape[-1] + 1) // 2 for shape in patches],  # overlapping patches: 7 and 4, 3 and 2
        mlp_ratios=stages.mlp_ratios,
        qkv_bias="attention.query.bias" in stages.first_blocks[0],
    )


def _pvt_v1_config(state: Mapping[str, torch.Tensor]) -> Any:
    from transformers import PvtConfig

    stages = _stages(state, r"encoder\.block\.(\d+)\.(\d+)\.", "encoder.block.{}.0.")
    reductions = [stage.get("attention.self.sequence_reduction.weight") for stage in stages.first_blocks]
    patches = [
        state[f"encoder.patch_embeddings.{i}.projection.weight"].shape for i in range(len(stages.depths))
    ]
    positions = state["encoder.patch_embeddings.0.position_embeddings"].shape[1]
    return PvtConfig(
        image_size=round(positions**0.5) * patches[0][-1],
        num_channels=patches[0][1],
        hidden_sizes=stages.widths,
        depths=stages.depths,
        num_encoder_blocks=len(stages.depths),
        num_attention_heads=_pvt_heads(stages.widths),
        sequence_reduction_ratios=[1 if kernel is None else kernel.shape[-1] for kernel in reductions],
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


def _pvt_heads(widths: list[int]) -> list[int]:
    if [width * PVT_HEADS[0] for width in widths] != [widths[0] * heads for heads in PVT_HEADS]:
        raise ValueError(
            f"no tensor tells the attention heads of a PVT of widths {widths}: name a model of this shape with pvt "
            "(--pvt)"
        )
    return list(PVT_HEADS)


def _blip_config(state: Mapping[str, torch.Tensor]) -> Any:
    from transformers import BlipTextConfig

    vocabulary, width = state["bert.embeddings.word_embeddings.weight"].shape
    if width % BLIP_HEAD_WIDTH:
        raise ValueError(
            f"no tensor tells the attention heads of a text decoder of width {width}: name a model of this shape with "
            "blip (--blip)"
        )
    layer = "bert.encoder.layer.{}."
    numbers = {int(m[1]) for name in state if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state[layer.format(0) + "crossattention.self.key.weight"].shape[1],
        intermediate_size=state[layer.format(0) + "intermediate.dense.weight"].shape[0],
        num_hidden_layers=len(numbers),
        num_attention_heads=width // BLIP_HEAD_WIDTH,
        max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
    )
