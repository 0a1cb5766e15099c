"""Combined files: PVT, projection and BLIP's text decoder as one dict of tensors, here under our names.

`visual_encoder.*` is the state dict of transformers' PVT or of `PvtCbam`, `text_decoder.*` that of transformers'
`BlipTextLMHeadModel`, and `visual_proj.*` the projection's. For PVTv2-B0 with a linear projection the last is
`visual_proj.weight` [768, 256] and `visual_proj.bias` [768]; a 3x3 convolution has a weight [768, 512, 3, 3].
A captioner has the same tensors under other names, so that translating is renaming and every bit survives both ways.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.combined_layouts import PREFIXES, part_of
from vlm_bridge.model_architecture.combined_sizes import (
    PVT_TYPES,
    config_of,
    pvt_config,
    text_config,
    text_config_like,
)
from vlm_bridge.model_architecture.pvt_blip import MapLinear, PvtBlip
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbam
from vlm_bridge.model_architecture.tensor_files import shortened

OUR_PREFIXES: dict[str, str] = dict(
    zip(
        PREFIXES,
        ("vision_encoder.model.", "language_model.causal_lm.", "bridge.projection."),
        strict=True,
    )
)
"""The parts of a combined file -> where a captioner keeps them."""

ProjectionKind = Literal["linear", "mlp", "conv3x3"]


class CombinedModel(NamedTuple):
    """The modules of a combined file, in evaluation mode.

    Attributes:
        pvt: transformers' PvtV2Model or PvtModel, or `PvtCbam`, which gives maps [B, D, h, w].
        blip: captions images; it holds the two others, so that training them trains it.
        proj: nn.Linear or nn.Sequential on tokens [..., D] -> [..., W], or nn.Conv2d on maps [B, D, h, w]; behind
            `PvtCbam` a linear one takes maps too. None where the file has none.
    """

    pvt: Any
    blip: PvtBlip
    proj: nn.Module | None


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
            f"{where} cannot be written as a combined file, which holds a PVT and BLIP's text decoder: "
            f"it has {type(vision or captioner.vision_encoder).__name__} and "
            f"{type(captioner.language_model.causal_lm).__name__}"
        )
    ours = captioner.state_dict()
    renamed = _renamed(ours, {our: theirs for theirs, our in OUR_PREFIXES.items()})
    if homeless := [
        f"{name} {tuple(ours[name].shape)} has no place" for name in ours if name not in renamed
    ]:
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


def build_combined(
    state: Mapping[str, torch.Tensor],
    where: str | Path,
    *,
    pvt: str | None = None,
    blip: str | None = None,
) -> CombinedModel:
    """The modules with the weights of a combined file, in the file's own types.

    Args:
        state: under our names.
        where: the file, for messages.
        pvt: name or folder whose configuration the encoder has; None reads its sizes from the tensors.
        blip: the same for the decoder; of a whole BLIP the text part is taken.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape (each is named with it); or heads, which
            no tensor tells, are not those of the published models and no name is given.
        ModelError: a name's configuration cannot be had.
    """
    _check_parts(state, where)
    states = [part_of(state, prefix) for prefix in PREFIXES]
    encoder, decoder, projection = states
    encoder_config = config_of(pvt, PVT_TYPES) if pvt else _read_sizes(pvt_config, encoder, where)
    decoder_config = _read_sizes(
        text_config if blip is None else lambda tensors: text_config_like(blip, tensors),
        decoder,
        where,
    )
    decoder_config.is_decoder = True
    decoder_config.tie_word_embeddings = _is_tied(decoder, decoder_config)

    from transformers import BlipTextLMHeadModel, PvtModel, PvtV2Model

    encoders: dict[str, Any] = {"pvt": PvtModel, "pvt_v2": PvtV2Model, PVT_CBAM: PvtCbam}
    text_decoder = BlipTextLMHeadModel(decoder_config)
    proj = None
    if projection:
        kind = _read_sizes(projection_kind, projection, where)
        proj = projection_for(encoder_config, kind, decoder_config.encoder_hidden_size)
    model = PvtBlip(encoders[encoder_config.model_type](encoder_config), text_decoder, proj, blip)
    complete = {
        prefix + name: tensor
        for prefix, its in zip(
            PREFIXES, (encoder, _with_tied(decoder, text_decoder), projection), strict=True
        )
        for name, tensor in its.items()
    }
    if problems := _misfits(model, complete):
        raise CheckpointError(f"{where} does not fit: {shortened(problems)}")
    model.load_state_dict(complete, strict=False, assign=True)  # assigned, tensors keep their type
    text_decoder.tie_weights()
    return CombinedModel(model.visual_encoder, model.eval(), model.visual_proj)


def projection_for(encoder_config: Any, kind: ProjectionKind, width: int) -> nn.Module:
    """A projection from an encoder's features to a width, with random weights."""
    vision_dim = encoder_config.hidden_sizes[-1]
    if kind == "linear" and encoder_config.model_type == PVT_CBAM:
        return MapLinear(vision_dim, width)
    return new_projection(kind, vision_dim, width)


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
    problems = [
        f"{name} {tuple(state[name].shape)} is of no part" for name in state if name not in known
    ]
    problems += [
        f"{prefix}* is missing"
        for prefix in PREFIXES[:2]
        if not any(name.startswith(prefix) for name in state)
    ]
    if problems:
        raise CheckpointError(
            f"{where} is not a combined file of {', '.join(f'{prefix}*' for prefix in PREFIXES)}: "
            f"{shortened(problems)}"
        )


def _misfits(module: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps a state dict from being this module's, a phrase each.

    Buffers that transformers computes itself were part of state dicts in its older versions, and are let pass.
    """
    wanted = module.state_dict()
    computed = {name for name, _ in module.named_buffers()} - wanted.keys()
    return (
        [
            f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & state.keys())
            if state[name].shape != wanted[name].shape
        ]
        + [
            f"{name} {tuple(wanted[name].shape)} is missing"
            for name in sorted(wanted.keys() - state.keys())
        ]
        + [
            f"{name} {tuple(state[name].shape)} is unknown"
            for name in sorted(state.keys() - wanted.keys() - computed)
        ]
    )


def _read_sizes(
    read: Callable[[Mapping[str, torch.Tensor]], Any],
    state: Mapping[str, torch.Tensor],
    where: str | Path,
) -> Any:
    try:
        return read(state)
    except KeyError as error:
        named = ", ".join(
            f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:2]
        )
        raise CheckpointError(
            f"{where} lacks {error.args[0]}, or has other names than transformers: it has {named} ..."
        ) from error
    except (IndexError, ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _is_tied(decoder: Mapping[str, torch.Tensor], config: Any) -> bool:
    """Whether the decoder's head has the weights of its word embeddings, as BLIP's; one that is left out has."""
    from transformers import BlipTextLMHeadModel

    tied_config = copy.deepcopy(config)
    tied_config.tie_word_embeddings = True
    with torch.device("meta"):
        tied = BlipTextLMHeadModel(tied_config)
    tied.tie_weights()
    held = [
        [decoder[name] for name in names if name in decoder] for names in _names_of_parameters(tied)
    ]
    return all(
        torch.equal(first, other) for first, *others in filter(None, held) for other in others
    )


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
