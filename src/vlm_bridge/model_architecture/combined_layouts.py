"""Layouts of combined files: ours, the original's (pvt-blip), and the guide's dict of three state dicts.

All hold PVT, a projection and BLIP's text decoder, under other names:

    part        ours                original's                         the guide's dict
    PVT         visual_encoder.*    visual_encoder.*                   pvt: *
    decoder     text_decoder.*      text_decoder.text_decoder.*        blip: text_decoder.* or *
    projection  visual_proj.*       visual_proj.*, or none             projection: *

The original's encoder is `PvtCbam`, and its decoder a whole BlipForConditionalGeneration: `text_decoder.vision_model.*`
is BLIP's ViT, which nothing here reads. Translating is renaming; no value changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vlm_bridge.errors import CheckpointError
from vlm_bridge.model_architecture.combined_sizes import encoder_kind
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM

PREFIXES: tuple[str, ...] = ("visual_encoder.", "text_decoder.", "visual_proj.")
"""Of the three parts, in the order encoder, decoder, projection."""
GUIDE_KEYS = ("pvt", "blip", "projection")

Layout = Literal["auto", "original", "own"]

_WITHIN_BLIP, _VIT = "text_decoder.text_decoder.", "text_decoder.vision_model."
_PROJECTION_NAMES = re.compile(r"^visual_proj\.(proj_layer|visual_proj|visual_projection|proj)\.")
"""The original keeps the name that the projection had in the checkpoint it was taken from."""
_ENCODERS = {"pvt": "PVT of transformers", "pvt_v2": "PVTv2 of transformers", PVT_CBAM: "PVT-Tiny"}


class CombinedFile(NamedTuple):
    """A combined file as it was read.

    Attributes:
        state: its tensors under our names.
        description: one line: its layout and parts.
    """

    state: dict[str, torch.Tensor]
    description: str


def parse(content: Any, where: str | Path) -> CombinedFile:
    """Read the content of a file in any of the three layouts.

    Raises:
        CheckpointError: it is of none of them.
    """
    content = unwrapped(content)
    layout = "a combined file"
    parts = [content.get(key, {}) for key in GUIDE_KEYS]
    if all(isinstance(part, Mapping) for part in parts) and parts[0]:
        layout = "the guide's dict of state dicts"
        content = _joined(parts)
    _refuse_bert(content, where)
    if not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(f"{where} is not a combined file, which is a dict of tensors alone")
    if layout == "a combined file" and any(
        str(name).startswith((_WITHIN_BLIP, _VIT)) for name in content
    ):
        layout = "the original's combined file"
    has_vit = any(str(name).startswith(_VIT) for name in content)
    state = {
        _our_name(str(name)): x for name, x in content.items() if not str(name).startswith(_VIT)
    }
    return CombinedFile(state, _described(state, layout, has_vit))


def _our_name(name: str) -> str:
    if name.startswith(_WITHIN_BLIP):
        return name.removeprefix("text_decoder.")
    return _PROJECTION_NAMES.sub("visual_proj.", name)


def unwrapped(content: Any) -> Mapping[Any, Any]:
    """What a file holds, or what it holds under `model_state`; of anything but a dict, a dict without tensors."""
    if not isinstance(content, Mapping):
        return {"": content}
    inner = content.get("model_state")
    return inner if isinstance(inner, Mapping) else content


def part_of(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The state dict of one part."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def in_layout(
    state: Mapping[str, torch.Tensor], layout: Layout, where: str | Path
) -> dict[str, torch.Tensor]:
    """Rename the tensors for a file in a layout; `auto` is the original's wherever that has a place for all.

    Raises:
        CheckpointError: the original's layout is asked for, and has no place for a part.
    """
    problem = _no_place(state)
    if layout == "own" or (layout == "auto" and problem):
        return dict(state)
    if problem:
        raise CheckpointError(
            f"{where} cannot be written in the original's pvt-blip layout, which holds PVT-Tiny with CBAM and a linear "
            f"projection: it has {problem}; write it in ours (--layout own)"
        )
    return {
        _WITHIN_BLIP + name.removeprefix("text_decoder.")
        if name.startswith("text_decoder.")
        else name: x
        for name, x in state.items()
    }


def _no_place(state: Mapping[str, torch.Tensor]) -> str | None:
    """What the original's loader has no module for, in words."""
    encoder, _, projection = (part_of(state, prefix) for prefix in PREFIXES)
    kernel = encoder.get("stage1.0.cbam.sa.conv.weight")
    if encoder_kind(encoder) != PVT_CBAM or kernel is None:
        return _encoder_in_words(encoder)
    if kernel.ndim != 3:
        return "CBAM with a Conv2d over the map, and not a Conv1d over the tokens"
    if projection and (set(projection) != {"weight", "bias"} or projection["weight"].ndim != 2):
        return (
            f"a projection of {', '.join(f'{n} {tuple(t.shape)}' for n, t in projection.items())}"
        )
    return None


def _joined(parts: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """The guide's three state dicts as one; of a whole model under `blip`, what is not its decoder is left out."""
    encoder, blip, projection = parts
    whole = any(str(name).startswith("text_decoder.") for name in blip)
    if whole:
        blip = {
            name: x
            for name, x in blip.items()
            if str(name).startswith(("text_decoder.", "vision_model."))
        }
    return {
        f"{prefix}{name}": tensor
        for prefix, part in zip(PREFIXES, (encoder, blip, projection), strict=True)
        for name, tensor in part.items()
    }


def _refuse_bert(state: Mapping[Any, Any], where: str | Path) -> None:
    """Refuse the captioners of the original's own training, whose decoder is BERT."""
    names = set(map(str, state))
    is_bert = "text_decoder.bert.embeddings.token_type_embeddings.weight" in names or any(
        name.startswith(("feature_normalizer.", "proj_layer.")) for name in names
    )
    if is_bert:
        raise CheckpointError(
            f"{where} is a captioner of the original's train_caption_pvt.py, whose decoder is bert-base, not BLIP's: "
            f"take its PVT alone (scripts/save_combined_checkpoint.py --pvt-checkpoint {where}), then fine-tune"
        )


def _described(state: Mapping[str, torch.Tensor], layout: str, has_vit: bool) -> str:
    encoder, decoder, projection = (part_of(state, prefix) for prefix in PREFIXES)
    layers = {m[1] for name in decoder if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in projection.items() if x.ndim > 1)
    parts = [
        f"{layout}: {_encoder_in_words(encoder)}, BLIP's decoder of {len(layers)} layers",
        *(["its ViT is left out"] if has_vit else []),
        f"projection {shapes}" if shapes else "no projection",
    ]
    return "; ".join(parts)


def _encoder_in_words(encoder: Mapping[str, torch.Tensor]) -> str:
    kind = encoder_kind(encoder)
    if kind != PVT_CBAM:
        return _ENCODERS[kind]
    has_cbam = any(".cbam." in name for name in encoder)
    return f"{_ENCODERS[kind]} {'with' if has_cbam else 'without'} CBAM"
