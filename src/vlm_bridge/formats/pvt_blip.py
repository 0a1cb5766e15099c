"""pvt-blip's combined files: PVT, projection and BLIP's text decoder as one dict of tensors.

They are read in three layouts. Tensors are renamed and no value changes.

    part        ours                original's                         the guide's dict
    PVT         visual_encoder.*    visual_encoder.*                   pvt: *
    decoder     text_decoder.*      text_decoder.text_decoder.*        blip: text_decoder.* or *
    projection  visual_proj.*       visual_proj.*, or none             projection: *

The original's encoder is `PvtCbam`. Its decoder is a whole BlipForConditionalGeneration, whose ViT
(`text_decoder.vision_model.*`) is not read. The others' parts are state dicts of transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    BlipTextConfig,
    BlipTextLMHeadModel,
    PvtConfig,
    PvtModel,
    PvtV2Config,
    PvtV2Model,
)

from vlm_bridge.configuration import LanguageModelConfig, VisionEncoderConfig
from vlm_bridge.credentials import reach_hub
from vlm_bridge.device import resolve_device
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.model_architecture.language_model import BLIP_TEXT
from vlm_bridge.model_architecture.pvt_blip import MapLinear, PvtBlip
from vlm_bridge.model_architecture.pvt_cbam import PVT_CBAM, PvtCbam, PvtCbamConfig, check_heads
from vlm_bridge.model_architecture.tensor_files import misfits, read_file, shortened, write_file
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder, model_type_of
from vlm_bridge.model_architecture.weights import (
    LOADING_ERRORS,
    build_language_model,
    known_architecture,
    loading_error,
)

logger = logging.getLogger(__name__)

DEFAULT_FILE = "checkpoints/blip_pvt_combined.pth"
BLIP = "Salesforce/blip-image-captioning-base"
BLIP_HEAD_WIDTH = 64  # of BLIP base and large (Li et al. 2022)
COMBINE = (
    "scripts/save_combined_checkpoint.py --checkpoint {} --output FILE.pth makes a combined file "
    "of it"
)
Tensors = Mapping[str, torch.Tensor]
Layout = Literal["auto", "original", "own"]
ProjectionKind = Literal["linear", "mlp", "conv3x3"]

PREFIXES = ("visual_encoder.", "text_decoder.", "visual_proj.")
_OURS = ("vision_encoder.model.", "language_model.causal_lm.", "bridge.projection.")
_WITHIN_BLIP, _VIT = "text_decoder.text_decoder.", "text_decoder.vision_model."
# The original keeps the name of the projection in the checkpoint it was taken from.
_PROJECTION_NAMES = re.compile(r"^visual_proj\.(proj_layer|visual_proj|visual_projection|proj)\.")
PVT: dict[str, Any] = {"pvt": PvtModel, "pvt_v2": PvtV2Model, PVT_CBAM: PvtCbam}
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class CombinedModel(NamedTuple):
    """The modules of a combined file, in evaluation mode.

    Attributes:
        blip: captions images; it holds the two others.
        proj: on tokens [..., D] -> [..., W], or nn.Conv2d on maps [B, D, h, w]; behind `PvtCbam`
            a linear one takes maps too. None where the file has none.
    """

    pvt: Any
    blip: PvtBlip
    proj: nn.Module | None


# Files


def read_combined(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a combined file in any layout under our names. Raises CheckpointError."""
    path = Path(path)
    content, layout = _read(path, "scripts/save_combined_checkpoint.py makes one"), "our layout"
    if content.get("format") == "vlm-bridge checkpoint":
        raise CheckpointError(
            f"{path} is a checkpoint of a run, not a combined file: {COMBINE.format(path)}"
        )
    if isinstance(content.get("pvt"), Mapping) and isinstance(content.get("blip"), Mapping):
        content, layout = _flattened(content), "the guide's dict of state dicts"
    elif any(name.startswith((_WITHIN_BLIP, _VIT)) for name in content):
        layout = "the original's combined file"
    if "text_decoder.bert.embeddings.token_type_embeddings.weight" in content:
        raise CheckpointError(
            f"{path} is a captioner of the original's train_caption_pvt.py, whose decoder is "
            "bert-base, not BLIP's: take its PVT alone (scripts/save_combined_checkpoint.py "
            f"--pvt-checkpoint {path}), then fine-tune"
        )
    if not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} is not a combined file, which is a dict of tensors alone")
    state = {
        _PROJECTION_NAMES.sub("visual_proj.", name.replace(_WITHIN_BLIP, "text_decoder.", 1)): x
        for name, x in content.items()
        if not name.startswith(_VIT)
    }
    encoder = PVT[_encoder_kind(_part(state, PREFIXES[0]))].__name__
    vit = " (its ViT is left out)" if len(state) < len(content) else ""
    projection = "a projection" if _part(state, PREFIXES[2]) else "no projection"
    logger.info(f"{path}: {layout}: {encoder}, BLIP's decoder{vit}, {projection}")
    return state


def write_combined(path: str | Path, state: Tensors, layout: Layout = "auto") -> None:
    """Write tensors with our names as a combined file. Raises CheckpointError.

    Args:
        layout: `original` is read by the original's loader, `own` is ours, and `auto` the
            original's where that has a place for all tensors.
    """
    fits = layout != "own" and _fits_original(state)
    if layout == "original" and not fits:
        raise CheckpointError(
            f"{path} cannot be written in the original's pvt-blip layout, which holds PVT-Tiny "
            "with CBAM and a linear projection: write it in ours (--layout own)"
        )
    decoder = _WITHIN_BLIP if fits else "text_decoder."
    renamed = {re.sub(r"^text_decoder\.", decoder, n): x.detach().cpu() for n, x in state.items()}
    write_file(Path(path), renamed)


def load_combined_model(
    checkpoint_path: str | Path,
    device: str = "cpu",
    blip_model_name: str | None = BLIP,
    pvt: str | None = None,
) -> CombinedModel:
    """Load the modules of a combined file in any layout, in evaluation mode.

    Args:
        blip_model_name: name or folder of the BLIP whose decoder the file holds: its configuration
            and the tokenizer of the prompt. None reads sizes from the tensors.
        pvt: name or folder whose configuration the encoder has; None reads sizes from the tensors.

    Raises:
        CheckpointError: missing, damaged, or its tensors do not fit.
        ModelError: the configuration of ``pvt`` or ``blip_model_name`` cannot be read.
    """
    target = resolve_device(device)
    state = read_combined(checkpoint_path)
    model = build_combined(state, checkpoint_path, pvt=pvt, blip=blip_model_name)
    model.blip.to(target)
    return model


def combine_models(
    pvt: str, blip: str, projection: ProjectionKind | None = None, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return the tensors of pretrained parts and a random projection.

    Args:
        pvt: name, folder, or a .pth file with the weights of the original's PVT.
        projection: None is `linear` for the original's PVT, else `conv3x3`.

    Raises:
        ModelError, CheckpointError: a part cannot be loaded, or is no PVT or no BLIP.
    """
    if pvt.endswith((".pth", ".pt")):
        encoder, kind = _pvt_of_file(Path(pvt)), projection or "linear"
    else:
        vision: Any = build_vision_encoder(VisionEncoderConfig(name=pvt))
        encoder, kind = getattr(vision, "model", vision), projection or "conv3x3"
    decoder = build_language_model(LanguageModelConfig(name=blip)).causal_lm
    _check_parts(encoder, decoder, f"{pvt} + {blip}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        proj = projection_for(encoder.config, kind, decoder.config.encoder_hidden_size)
    return dict(PvtBlip(encoder, decoder, proj, None).state_dict())


def _read(path: Path, remedy: str) -> dict[str, Any]:
    """Return a file's dict, or the one under `model_state`; no dict is one nameless entry."""
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a combined file; of a run, {COMBINE.format(path)}"
        )
    if not path.is_file():
        raise CheckpointError(f"no file at {path}; {remedy}")
    content = read_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("model_state"), Mapping):
        content = content["model_state"]
    if not isinstance(content, Mapping):
        return {"": content}
    return {str(name): value for name, value in content.items()}


def _flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guide's three state dicts as one."""
    pvt, blip, projection = (content.get(key, {}) for key in ("pvt", "blip", "projection"))
    if any(str(name).startswith("text_decoder.") for name in blip):  # a whole BLIP, or ours
        kept = ("text_decoder.", "vision_model.")
        blip = {name: x for name, x in blip.items() if str(name).startswith(kept)}
    parts = zip(PREFIXES, (pvt, blip, projection), strict=True)
    return {f"{prefix}{name}": x for prefix, part in parts for name, x in part.items()}


def _pvt_of_file(path: Path) -> PvtCbam:
    """Load the original's PVT: bare, under `model_state`, or as `visual_encoder.*`."""
    content = _read(path, "--pvt takes a hub name, a folder or a .pth file")
    tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    weights = _part(tensors, "visual_encoder.") or {
        name: x for name, x in tensors.items() if name.startswith(("patch", "stage", "norm."))
    }
    try:
        model = PvtCbam(PvtCbamConfig.of(weights))
        model.load_state_dict(weights)
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the original's PVT (patch1.*, stage1.*, ...)"
        ) from error
    return model


def _fits_original(state: Tensors) -> bool:
    """Return whether the original's loader has modules for all tensors."""
    weights = [x for name, x in state.items() if name.startswith(PREFIXES[2]) and x.ndim > 1]
    has_cbam = "visual_encoder.stage1.0.cbam.sa.conv.weight" in state
    return has_cbam and (not weights or [x.ndim for x in weights] == [2])


def _part(state: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


# Captioners


def to_combined(captioner: Any, where: str | Path) -> dict[str, torch.Tensor]:
    """Return all weights of a captioner under the names of a combined file.

    Raises:
        CheckpointError: a part has no place there (another encoder, feature statistics, ...).
    """
    encoder = getattr(captioner.vision_encoder, "model", captioner.vision_encoder)
    _check_parts(encoder, captioner.language_model.causal_lm, where)
    state = captioner.state_dict()
    if homeless := [f"no place for {name}" for name in state if not name.startswith(_OURS)]:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a plain projection "
            "(bridge.kind=projection, bridge.standardize_features=false, "
            f"bridge.position_embeddings=false): {shortened(homeless)}"
        )
    return _renamed(state, _OURS, PREFIXES)


def from_combined(state: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a combined file under a captioner's names."""
    return _renamed(state, PREFIXES, _OURS)


def _renamed(state: Tensors, old: tuple[str, ...], new: tuple[str, ...]) -> dict[str, torch.Tensor]:
    pairs = list(zip(old, new, strict=True))
    return {ours + name: x for p, ours in pairs for name, x in _part(state, p).items()}


def _check_parts(encoder: Any, decoder: Any, where: str | Path) -> None:
    if isinstance(encoder, tuple(PVT.values())) and isinstance(decoder, BlipTextLMHeadModel):
        return
    raise CheckpointError(
        f"{where} cannot be written as a combined file, which holds a PVT and BLIP's text "
        f"decoder: it has {type(encoder).__name__} and {type(decoder).__name__}"
    )


# Modules


def build_combined(
    state: Tensors, where: str | Path, *, pvt: str | None = None, blip: str | None = None
) -> CombinedModel:
    """Build the modules of a combined file, in the file's own types, as `load_combined_model`."""
    encoder, decoder, projection = (_part(state, prefix) for prefix in PREFIXES)
    try:
        encoder_config = config_of(pvt, tuple(PVT)) if pvt else pvt_config(encoder)
        decoder_config = text_config(decoder, blip)
        kind = projection_kind(projection) if projection else None
    except KeyError as error:
        raise CheckpointError(f"{where} does not fit: {error.args[0]} is missing") from error
    except (IndexError, ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    for one, other in (*_TIED.items(), *((b, a) for a, b in _TIED.items())):
        if other in decoder:  # older files hold a tied tensor once
            decoder.setdefault(one, decoder[other])
    decoder_config.is_decoder = True
    decoder_config.tie_word_embeddings = all(
        name in decoder and torch.equal(decoder[name], decoder[other])
        for name, other in _TIED.items()
    )
    width = decoder_config.encoder_hidden_size
    model = PvtBlip(
        PVT[encoder_config.model_type](encoder_config),
        BlipTextLMHeadModel(decoder_config),
        projection_for(encoder_config, kind, width) if kind else None,
        blip,
    )
    wanted = model.state_dict()
    # Older versions of transformers saved buffers that are computed today.
    computed = {name for name, _ in model.named_buffers()} - wanted.keys()
    state = {**state, **{f"{PREFIXES[1]}{name}": tensor for name, tensor in decoder.items()}}
    state = {name: tensor for name, tensor in state.items() if name not in computed}
    if problems := misfits(state, wanted):
        raise CheckpointError(
            f"{where} does not fit: {shortened(problems)}; pvt and blip_model_name (--pvt, "
            "--blip-model) name the models it was made of"
        )
    model.load_state_dict(state, assign=True)  # assigned, tensors keep their type
    model.text_decoder.tie_weights()
    return CombinedModel(model.visual_encoder, model.eval(), model.visual_proj)


def projection_for(encoder_config: Any, kind: ProjectionKind, width: int) -> nn.Module:
    """Build a random projection from an encoder's features to a width."""
    vision_dim = encoder_config.hidden_sizes[-1]
    if kind == "conv3x3":
        return nn.Conv2d(vision_dim, width, kernel_size=3, padding=1)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width))
    linear = MapLinear if encoder_config.model_type == PVT_CBAM else nn.Linear
    return linear(vision_dim, width)


def projection_kind(projection: Tensors) -> ProjectionKind:
    """Return the kind of a projection's state dict. Raises KeyError."""
    if "0.weight" in projection:
        return "mlp"
    return "conv3x3" if projection["weight"].ndim == 4 else "linear"


# Sizes


def config_of(name: str, wanted: tuple[str, ...]) -> Any:
    """Read the configuration of a model; of a whole BLIP, its text part. Raises ModelError."""
    try:
        if model_type_of(name) == PVT_CBAM:
            config: Any = PvtCbamConfig.from_folder(Path(name))
        elif not Path(name).is_dir() and (known := known_architecture(name)):
            config, _ = known
        else:
            reach_hub(name)
            config = AutoConfig.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise loading_error("configuration", name, error) from error
    config = config.text_config if config.model_type == "blip" and BLIP_TEXT in wanted else config
    if config.model_type not in wanted:
        raise ModelError(f"{name!r} is a {config.model_type}, not a {' or '.join(wanted)}")
    return config


def pvt_config(state: Tensors) -> Any:
    """Read the configuration of a PVT from tensors, as far as published ones differ.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the attention heads are not those of the published models.
    """
    kind = _encoder_kind(state)
    if kind == PVT_CBAM:
        return PvtCbamConfig.of(state)
    stage_name = "encoder.block.{}." if kind == "pvt" else "encoder.layers.{}.blocks."
    stages = [stage_name.format(stage) for stage in range(4)]
    widths = [state[f"{stage}0.layer_norm_1.weight"].shape[0] for stage in stages]
    hidden = [state[f"{stage}0.mlp.dense1.weight"].shape[0] for stage in stages]
    check_heads(widths)
    sizes: dict[str, Any] = {
        "hidden_sizes": widths,
        "depths": [_count(state, stage) for stage in stages],
        "mlp_ratios": [wide // width for wide, width in zip(hidden, widths, strict=True)],
    }
    if kind == "pvt_v2":
        return PvtV2Config(**sizes)
    positions = state["encoder.patch_embeddings.0.position_embeddings"].shape[1]
    return PvtConfig(image_size=4 * isqrt(positions), **sizes)  # patches of 4 px


def text_config(state: Tensors, like: str | None = None) -> Any:
    """Return the configuration of the BLIP ``like``, or read it from a decoder's tensors.

    Raises:
        KeyError, ValueError, ModelError: as `pvt_config` and `config_of`.
    """
    vocabulary, width = state["bert.embeddings.word_embeddings.weight"].shape
    layer = "bert.encoder.layer.0."
    if like is not None:
        config = config_of(like, (BLIP_TEXT,))
    elif width % BLIP_HEAD_WIDTH:
        raise ValueError(
            f"no tensor tells the attention heads of a text decoder of width {width}: name a model "
            "of this shape with blip_model_name (--blip-model)"
        )
    else:
        config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=state[layer + "intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(state, "bert.encoder.layer."),
            num_attention_heads=width // BLIP_HEAD_WIDTH,
            max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
        )
    config.encoder_hidden_size = state[layer + "crossattention.self.key.weight"].shape[1]
    return config


def _encoder_kind(names: Mapping[str, Any]) -> str:
    if "patch1.proj.weight" in names:
        return PVT_CBAM
    return "pvt_v2" if any(name.startswith("encoder.layers.") for name in names) else "pvt"


def _count(state: Tensors, prefix: str) -> int:
    """Return the number of layers under a prefix."""
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})
