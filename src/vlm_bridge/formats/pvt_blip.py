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

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vlm_bridge import runtime
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats.pvt_blip_sizes import (
    PVT_TYPES,
    config_of,
    encoder_kind,
    pvt_config,
    text_config,
)
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.pvt_blip import MapLinear, PvtBlip
from vlm_bridge.model_architecture.pvt_cbam import (
    PVT_CBAM,
    PvtCbam,
    PvtCbamConfig,
    image_processor,
)
from vlm_bridge.model_architecture.tensor_files import misfits, read_file, shortened, write_file

logger = logging.getLogger(__name__)

DEFAULT_FILE = "checkpoints/blip_pvt_combined.pth"
BLIP = "Salesforce/blip-image-captioning-base"
COMBINE = (
    "scripts/save_combined_checkpoint.py --checkpoint {} --output FILE.pth makes a combined file "
    "of it"
)
Tensors = Mapping[str, torch.Tensor]
Layout = Literal["auto", "original", "own"]
ProjectionKind = Literal["linear", "mlp", "conv3x3"]

PREFIXES = ("visual_encoder.", "text_decoder.", "visual_proj.")
OUR_PREFIXES: dict[str, str] = dict(
    zip(
        PREFIXES,
        ("vision_encoder.model.", "language_model.causal_lm.", "bridge.projection."),
        strict=True,
    )
)  # a part of a combined file -> a captioner's
_WITHIN_BLIP, _VIT = "text_decoder.text_decoder.", "text_decoder.vision_model."
# The original keeps the name of the projection in the checkpoint it was taken from.
_PROJECTION_NAMES = re.compile(r"^visual_proj\.(proj_layer|visual_proj|visual_projection|proj)\.")
_ENCODERS = {"pvt": "PVT of transformers", "pvt_v2": "PVTv2 of transformers", PVT_CBAM: "PVT-Tiny"}


class CombinedModel(NamedTuple):
    """The modules of a combined file, in evaluation mode.

    Attributes:
        pvt: transformers' PvtV2Model or PvtModel, or `PvtCbam`, which gives maps [B, D, h, w].
        blip: captions images; it holds the two others.
        proj: on tokens [..., D] -> [..., W], or nn.Conv2d on maps [B, D, h, w]; behind `PvtCbam`
            a linear one takes maps too. None where the file has none.
    """

    pvt: Any
    blip: PvtBlip
    proj: nn.Module | None


# Files


def read_combined(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a combined file in any layout; the tensors have our names.

    Raises:
        CheckpointError: missing, damaged, of a run, or anything but tensors.
    """
    path = Path(path)
    content = _read(path, "scripts/save_combined_checkpoint.py makes one")
    if isinstance(content, dict) and content.get("format") == "vlm-bridge checkpoint":
        raise CheckpointError(
            f"{path} is a checkpoint of a run, not a combined file: {COMBINE.format(path)}"
        )
    content, layout = _unwrapped(content), "a combined file"
    parts = [content.get(key, {}) for key in ("pvt", "blip", "projection")]
    if all(isinstance(part, Mapping) for part in parts) and parts[0]:
        layout = "the guide's dict of state dicts"
        if any(str(name).startswith("text_decoder.") for name in parts[1]):  # a whole BLIP
            kept = ("text_decoder.", "vision_model.")
            parts[1] = {n: x for n, x in parts[1].items() if str(n).startswith(kept)}
        content = {
            f"{prefix}{name}": tensor
            for prefix, part in zip(PREFIXES, parts, strict=True)
            for name, tensor in part.items()
        }
    elif any(str(name).startswith((_WITHIN_BLIP, _VIT)) for name in content):
        layout = "the original's combined file"
    if "text_decoder.bert.embeddings.token_type_embeddings.weight" in content or any(
        str(name).startswith(("feature_normalizer.", "proj_layer.")) for name in content
    ):
        raise CheckpointError(
            f"{path} is a captioner of the original's train_caption_pvt.py, whose decoder is "
            "bert-base, not BLIP's: take its PVT alone (scripts/save_combined_checkpoint.py "
            f"--pvt-checkpoint {path}), then fine-tune"
        )
    if not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} is not a combined file, which is a dict of tensors alone")
    state = {
        _PROJECTION_NAMES.sub("visual_proj.", str(n).replace(_WITHIN_BLIP, "text_decoder.", 1)): x
        for n, x in content.items()
        if not str(n).startswith(_VIT)
    }
    logger.info(f"{path}: {_described(state, layout, has_vit=len(state) < len(content))}")
    return state


def write_combined(path: str | Path, state: Tensors, layout: Layout = "auto") -> None:
    """Write a combined file.

    Args:
        state: under our names.
        layout: `original` is read by the original's loader, `own` is ours, and `auto` the
            original's where that has a place for all tensors.

    Raises:
        CheckpointError: the file cannot be written, or the original's layout has no place.
    """
    problem = None if layout == "own" else _no_place(state)
    if problem and layout == "original":
        raise CheckpointError(
            f"{path} cannot be written in the original's pvt-blip layout, which holds PVT-Tiny "
            f"with CBAM and a linear projection: it has {problem}; write it in ours (--layout own)"
        )
    decoder = "text_decoder." if layout == "own" or problem else _WITHIN_BLIP
    write_file(
        Path(path),
        {
            re.sub(r"^text_decoder\.", decoder, name): tensor.detach().cpu()
            for name, tensor in state.items()
        },
    )


def load_combined_model(
    checkpoint_path: str | Path,
    device: str = "cpu",
    blip_model_name: str | None = BLIP,
    pvt: str | None = None,
) -> CombinedModel:
    """Load the modules of a combined file in any layout, in evaluation mode.

    Args:
        device: `cpu`, `cuda`, `mps`, or `auto`.
        blip_model_name: name or folder of the BLIP whose decoder the file holds: its configuration
            and the tokenizer of the prompt. None reads sizes from the tensors.
        pvt: name or folder whose configuration the encoder has; None reads sizes from the tensors.

    Raises:
        CheckpointError: missing, damaged, or its tensors do not fit.
        ConfigurationError: there is no such device here.
        ModelError: the configuration of ``pvt`` or ``blip_model_name`` cannot be read.
    """
    target = runtime.resolve_device(device)
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
        blip: name or folder; of a whole BLIP the text decoder is taken.
        projection: None is `linear` for the original's PVT, else `conv3x3`.

    Raises:
        ModelError: a part cannot be loaded.
        CheckpointError: it is no PVT, or no BLIP.
    """
    if pvt.endswith((".pth", ".pt")):
        with TemporaryDirectory() as folder:
            _pvt_of_file(Path(pvt)).save_pretrained(folder)
            image_processor().save_pretrained(folder)
            return combine_models(folder, blip, projection or "linear", seed=seed)
    recipe = recipe_from_dict(
        {
            "vision_encoder": {"name": pvt},
            "language_model": {"name": blip},
            "bridge": {
                "kind": "projection",
                "projection": projection or "conv3x3",
                "standardize_features": False,
            },
            "trainable": {"bridge.*": None},
            "seed": seed,
        }
    )
    return to_combined(build_captioner(recipe), f"{pvt} + {blip}")


def _read(path: Path, remedy: str) -> Any:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a combined file; of a run, {COMBINE.format(path)}"
        )
    if not path.is_file():
        raise CheckpointError(f"no file at {path}; {remedy}")
    return read_file(path)


def _unwrapped(content: Any) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        return {"": content}
    inner = content.get("model_state")
    return inner if isinstance(inner, Mapping) else content


def _pvt_of_file(path: Path) -> PvtCbam:
    """Load the original's PVT: bare, under `model_state`, or as `visual_encoder.*`."""
    content = _unwrapped(_read(path, "--pvt takes a hub name, a folder or a .pth file"))
    tensors = {str(name): x for name, x in content.items() if isinstance(x, torch.Tensor)}
    weights = _part(tensors, "visual_encoder.") or {
        name: x for name, x in tensors.items() if name.startswith(("patch", "stage", "norm."))
    }
    try:
        model = PvtCbam(PvtCbamConfig.of(weights))
        model.load_state_dict(weights)
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold the original's PVT (patch1.*, stage1.*, ...): {message}"
        ) from error
    return model


def _no_place(state: Tensors) -> str | None:
    """Return what the original's loader has no module for."""
    encoder, projection = _part(state, PREFIXES[0]), _part(state, PREFIXES[2])
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


def _described(state: Tensors, layout: str, *, has_vit: bool) -> str:
    encoder, decoder, projection = (_part(state, prefix) for prefix in PREFIXES)
    layers = {m[1] for name in decoder if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in projection.items() if x.ndim > 1)
    parts = [
        f"{layout}: {_encoder_in_words(encoder)}, BLIP's decoder of {len(layers)} layers",
        *(["its ViT is left out"] if has_vit else []),
        f"projection {shapes}" if shapes else "no projection",
    ]
    return "; ".join(parts)


def _encoder_in_words(encoder: Tensors) -> str:
    kind = encoder_kind(encoder)
    if kind != PVT_CBAM:
        return _ENCODERS[kind]
    has_cbam = any(".cbam." in name for name in encoder)
    return f"{_ENCODERS[kind]} {'with' if has_cbam else 'without'} CBAM"


def _part(state: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


# Captioners


def to_combined(captioner: Any, where: str | Path) -> dict[str, torch.Tensor]:
    """Return all weights of a captioner under the names of a combined file.

    Raises:
        CheckpointError: a part has no place there (another encoder, feature statistics, ...).
    """
    vision: Any = getattr(captioner.vision_encoder, "model", None)
    vision_type = getattr(getattr(vision, "config", None), "model_type", None)
    if vision_type not in PVT_TYPES or not captioner.language_model.is_blip:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a PVT and BLIP's text "
            f"decoder: it has {type(vision or captioner.vision_encoder).__name__} and "
            f"{type(captioner.language_model.causal_lm).__name__}"
        )
    state, homeless = _renamed(
        captioner.state_dict(), {our: theirs for theirs, our in OUR_PREFIXES.items()}
    )
    if homeless:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a plain projection "
            "(bridge.kind=projection, bridge.standardize_features=false, "
            "bridge.position_embeddings=false): "
            f"{shortened([f'{name} has no place' for name in homeless])}"
        )
    return state


def from_combined(state: Tensors, where: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a combined file under a captioner's names.

    Raises:
        CheckpointError: a tensor is of none of the three parts.
    """
    renamed, unknown = _renamed(state, OUR_PREFIXES)
    problems = [f"{name} is of no part" for name in unknown] + [
        f"{prefix}* is missing" for prefix in PREFIXES[:2] if not _part(state, prefix)
    ]
    if problems:
        raise CheckpointError(
            f"{where} is not a combined file of {', '.join(f'{prefix}*' for prefix in PREFIXES)}: "
            f"{shortened(problems)}"
        )
    return renamed


def _renamed(
    state: Tensors, prefixes: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Exchange prefixes of names; return the tensors without one as phrases with their shapes."""
    renamed, others = {}, []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            others.append(f"{name} {tuple(tensor.shape)}")
        else:
            renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed, others


# Modules


def build_combined(
    state: Tensors, where: str | Path, *, pvt: str | None = None, blip: str | None = None
) -> CombinedModel:
    """Build the modules of a combined file, in the file's own types.

    Args:
        state: under our names.
        where: the file, for messages.
        pvt: name or folder whose configuration the encoder has; None reads it from the tensors.
        blip: the same for the decoder.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape.
        ModelError: the configuration of a name cannot be read.
    """
    from transformers import BlipTextLMHeadModel, PvtModel, PvtV2Model

    from_combined(state, where)
    encoder, decoder, projection = (_part(state, prefix) for prefix in PREFIXES)
    encoder_config = config_of(pvt, PVT_TYPES) if pvt else _sizes(pvt_config, encoder, where)
    decoder_config = _sizes(lambda tensors: text_config(tensors, blip), decoder, where)
    decoder_config.is_decoder = True
    decoder_config.tie_word_embeddings = _is_tied(decoder, decoder_config)

    encoders: dict[str, Any] = {"pvt": PvtModel, "pvt_v2": PvtV2Model, PVT_CBAM: PvtCbam}
    text_decoder = BlipTextLMHeadModel(decoder_config)
    proj = None
    if projection:
        kind = _sizes(projection_kind, projection, where)
        proj = projection_for(encoder_config, kind, decoder_config.encoder_hidden_size)
    model = PvtBlip(encoders[encoder_config.model_type](encoder_config), text_decoder, proj, blip)
    complete = dict(state)
    for aliases in _aliases(text_decoder):
        names = [f"text_decoder.{alias}" for alias in aliases]
        if (held := next((name for name in names if name in state), None)) is not None:
            complete = dict.fromkeys(names, state[held]) | complete
    wanted = model.state_dict()
    # Older versions of transformers saved buffers that are computed today.
    computed = {name for name, _ in model.named_buffers()} - wanted.keys()
    known = {name: tensor for name, tensor in complete.items() if name not in computed}
    if problems := misfits(known, wanted):
        raise CheckpointError(f"{where} does not fit: {shortened(problems)}")
    model.load_state_dict(complete, strict=False, assign=True)  # assigned, tensors keep their type
    text_decoder.tie_weights()
    return CombinedModel(model.visual_encoder, model.eval(), model.visual_proj)


def projection_for(encoder_config: Any, kind: ProjectionKind, width: int) -> nn.Module:
    """Build a random projection from an encoder's features to a width."""
    vision_dim = encoder_config.hidden_sizes[-1]
    if kind == "linear" and encoder_config.model_type == PVT_CBAM:
        return MapLinear(vision_dim, width)
    return new_projection(kind, vision_dim, width)


def new_projection(kind: ProjectionKind, vision_dim: int, width: int) -> nn.Module:
    """Build a random projection D -> W."""
    if kind == "linear":
        return nn.Linear(vision_dim, width)
    if kind == "conv3x3":
        return nn.Conv2d(vision_dim, width, kernel_size=3, padding=1)
    return nn.Sequential(nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width))


def projection_kind(projection: Tensors) -> ProjectionKind:
    """Return the kind of a projection's state dict. Raises KeyError or ValueError."""
    if "0.weight" in projection:
        return "mlp"
    weight = projection["weight"]
    kinds: dict[int, ProjectionKind] = {2: "linear", 4: "conv3x3"}
    if weight.ndim not in kinds:
        raise ValueError(
            f"visual_proj.weight {tuple(weight.shape)} is of no projection (linear, mlp, conv3x3)"
        )
    return kinds[weight.ndim]


def _sizes(read: Callable[[Tensors], Any], state: Tensors, where: str | Path) -> Any:
    try:
        return read(state)
    except KeyError as error:
        named = ", ".join(f"{name} {tuple(x.shape)}" for name, x in list(state.items())[:2])
        raise CheckpointError(
            f"{where} lacks {error.args[0]}, or has other names than transformers: "
            f"it has {named} ..."
        ) from error
    except (IndexError, ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _is_tied(decoder: Tensors, config: Any) -> bool:
    """Return whether the head has the weights of the word embeddings, or is left out."""
    from transformers import BlipTextLMHeadModel

    tied_config = copy.deepcopy(config)
    tied_config.tie_word_embeddings = True
    with torch.device("meta"):
        tied = BlipTextLMHeadModel(tied_config)
    tied.tie_weights()
    held = [[decoder[name] for name in names if name in decoder] for names in _aliases(tied)]
    return all(
        torch.equal(first, other) for first, *others in filter(None, held) for other in others
    )


def _aliases(module: nn.Module) -> list[list[str]]:
    """Return the names of every parameter: several where modules share it."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return list(names.values())
