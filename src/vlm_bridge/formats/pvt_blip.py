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

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, BlipTextLMHeadModel, PvtModel, PvtV2Model

from vlm_bridge.configuration import LanguageModelConfig, VisionEncoderConfig
from vlm_bridge.device import resolve_device
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.formats import misfits, read_file, shortened, write_file
from vlm_bridge.model_architecture.language_model import BLIP_TEXT
from vlm_bridge.model_architecture.pvt_cbam import (
    PROMPT,
    PVT_CBAM,
    ProjectionKind,
    PvtBlip,
    PvtCbam,
    PvtCbamConfig,
    projection_for,
)
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import (
    LOADING_ERRORS,
    build_language_model,
    loading_error,
    read_config,
)

DEFAULT_FILE = "checkpoints/blip_pvt_combined.pth"
BLIP = "Salesforce/blip-image-captioning-base"
Tensors = Mapping[str, torch.Tensor]
Layout = Literal["auto", "original", "own"]

PVT: dict[str, Any] = {"pvt": PvtModel, "pvt_v2": PvtV2Model, PVT_CBAM: PvtCbam}
PUBLISHED_PVT = ("OpenGVLab/pvt_v2_b0", "OpenGVLab/pvt_v2_b1", "Zetatech/pvt-tiny-224")
PREFIXES = ("visual_encoder.", "text_decoder.", "visual_proj.")
_CAPTIONER = ("vision_encoder.model.", "language_model.causal_lm.", "bridge.projection.")
# Beginnings of names in all layouts -> ours; the first that matches counts. BLIP's ViT, and parts
# that the guide's dict holds twice, are left out.
_RULES = {
    r"(text_decoder|blip)\.vision_model\.": None,
    r"blip\.visual_(encoder|proj)\.": None,
    r"pvt\.": PREFIXES[0],
    r"(text_decoder|blip)\.(text_decoder\.)?": PREFIXES[1],
    # The original keeps the name of the projection in the checkpoint it was taken from.
    r"(visual_proj|projection)\.((proj_layer|visual_proj|visual_projection|proj)\.)?": PREFIXES[2],
}
_HEAD, _EMBEDDINGS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


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
    named = [(_our_name(name), tensor) for name, tensor in _read(Path(path)).items()]
    state = {name: tensor for name, tensor in named if name is not None}
    if "text_decoder.bert.embeddings.token_type_embeddings.weight" in state:
        raise CheckpointError(
            f"{path} is a captioner of the original's train_caption_pvt.py, whose decoder is "
            "bert-base, not BLIP's: take its PVT alone (scripts/save_combined_checkpoint.py "
            f"--pvt-checkpoint {path}), then fine-tune"
        )
    return state


def _our_name(name: str) -> str | None:
    for rule, ours in _RULES.items():
        if match := re.match(rule, name):
            return None if ours is None else ours + name[match.end() :]
    return name


def write_combined(path: str | Path, state: Tensors, layout: Layout = "auto") -> None:
    """Write tensors with our names as a combined file. Raises CheckpointError.

    Args:
        layout: `original` is read by the original's loader, `own` is ours, and `auto` the
            original's where that has a place for all tensors.
    """
    projection = _part(state, "visual_proj.")
    is_linear = not projection or projection_kind(projection) == "linear"
    fits = is_linear and "visual_encoder.stage1.0.cbam.sa.conv.weight" in state
    if layout == "original" and not fits:
        raise CheckpointError(
            f"{path} cannot be written in the original's pvt-blip layout, which holds PVT-Tiny "
            "with CBAM and a linear projection: write it in ours (--layout own)"
        )
    decoder = "text_decoder.text_decoder." if fits and layout != "own" else "text_decoder."
    renamed = {re.sub(r"^text_decoder\.", decoder, n): x.detach().cpu() for n, x in state.items()}
    write_file(Path(path), renamed)


def load_combined_model(
    checkpoint_path: str | Path,
    device: str = "cpu",
    blip_model_name: str = BLIP,
    pvt: str | None = None,
) -> CombinedModel:
    """Load the modules of a combined file in any layout, in evaluation mode.

    Args:
        blip_model_name: name or folder of the BLIP whose decoder the file holds: its configuration
            and the tokenizer of the prompt.
        pvt: name or folder whose configuration the encoder has; None reads sizes from the tensors.

    Raises:
        CheckpointError: missing, damaged, or its tensors do not fit.
        ModelError: the configuration of ``pvt`` or ``blip_model_name`` cannot be read.
    """
    target, where = resolve_device(device), checkpoint_path
    state = read_combined(checkpoint_path)
    encoder, decoder, projection = (_part(state, prefix) for prefix in PREFIXES)
    decoder_config = config_of(blip_model_name, (BLIP_TEXT,))
    decoder_config.is_decoder = True
    tokenizer = AutoTokenizer.from_pretrained(blip_model_name)
    try:
        encoder_config = config_of(pvt, tuple(PVT)) if pvt else pvt_config(encoder)
        width, proj = decoder_config.encoder_hidden_size, None
        if projection:
            proj = projection_for(encoder_config, projection_kind(projection), width)
        # In files of older versions of transformers, the head was trained for itself.
        decoder_config.tie_word_embeddings = torch.equal(decoder[_HEAD], decoder[_EMBEDDINGS])
    except KeyError as error:
        raise CheckpointError(f"{where} does not fit: {error.args[0]} is missing") from error
    except (IndexError, ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    model = PvtBlip(
        PVT[encoder_config.model_type](encoder_config),
        BlipTextLMHeadModel(decoder_config),
        proj,
        tokenizer(PROMPT, add_special_tokens=False)["input_ids"],
    )
    # Older versions also saved positions, which are computed today.
    state = {name: x for name, x in state.items() if not name.endswith("embeddings.position_ids")}
    if problems := misfits(state, model.state_dict()):
        raise CheckpointError(
            f"{where} does not fit: {shortened(problems)}; pvt and blip_model_name (--pvt, "
            "--blip-model) name the models it was made of"
        )
    model.load_state_dict(state, assign=True)  # assigned, tensors keep their type
    model.text_decoder.tie_weights()
    model.eval().to(target)
    return CombinedModel(model.visual_encoder, model, model.visual_proj)


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
    return dict(PvtBlip(encoder, decoder, proj, []).state_dict())


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, or of its `model_state`; the guide's dict is flattened."""
    hint = "scripts/save_combined_checkpoint.py makes one, also of a run (--checkpoint RUN)"
    if not path.is_file():
        raise CheckpointError(f"no combined file at {path}; {hint}")
    content = read_file(path)
    if isinstance(content, Mapping):
        content = content.get("model_state", content)
    if isinstance(content, Mapping) and isinstance(content.get("pvt"), Mapping):
        parts = [(part, x) for part, x in content.items() if isinstance(x, Mapping)]
        content = {f"{part}.{name}": x for part, state in parts for name, x in state.items()}
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in content.items()
    ):
        raise CheckpointError(f"{path} is not a combined file, a dict of tensors alone; {hint}")
    return dict(content)


def _pvt_of_file(path: Path) -> PvtCbam:
    """Load the original's PVT: bare, under `model_state`, or as `visual_encoder.*`."""
    tensors = _read(path)
    weights = _part(tensors, "visual_encoder.") or tensors
    try:
        model = PvtCbam(PvtCbamConfig.of(weights))
        model.load_state_dict(weights)
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the original's PVT (patch1.*, stage1.*, ...)"
        ) from error
    return model


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
    if homeless := [f"no place for {name}" for name in state if not name.startswith(_CAPTIONER)]:
        raise CheckpointError(
            f"{where} cannot be written as a combined file, which holds a plain projection "
            "(bridge.kind=projection, bridge.standardize_features=false, "
            f"bridge.position_embeddings=false): {shortened(homeless)}"
        )
    pairs = zip(_CAPTIONER, PREFIXES, strict=True)
    return {prefix + n: x for ours, prefix in pairs for n, x in _part(state, ours).items()}


def _check_parts(encoder: Any, decoder: Any, where: str | Path) -> None:
    if isinstance(encoder, tuple(PVT.values())) and isinstance(decoder, BlipTextLMHeadModel):
        return
    raise CheckpointError(
        f"{where} cannot be written as a combined file, which holds a PVT and BLIP's text "
        f"decoder: it has {type(encoder).__name__} and {type(decoder).__name__}"
    )


# Sizes


def config_of(name: str, wanted: tuple[str, ...]) -> Any:
    """Read the configuration of a model; of a whole BLIP, its text part. Raises ModelError."""
    try:
        config, _ = read_config(name)
    except LOADING_ERRORS as error:
        raise loading_error("configuration", name, error) from error
    config = config.text_config if config.model_type == "blip" and BLIP_TEXT in wanted else config
    if config.model_type not in wanted:
        raise ModelError(f"{name!r} is a {config.model_type}, not a {' or '.join(wanted)}")
    return config


def pvt_config(state: Tensors) -> Any:
    """Return the configuration of `PvtCbam`, or of the published PVT whose shapes tensors have."""
    if "patch1.proj.weight" in state:
        return PvtCbamConfig.of(state)
    for name in PUBLISHED_PVT:
        config, _ = read_config(name, meta=True)
        with torch.device("meta"):
            model = PVT[config.model_type](config)
        if not misfits(state, model.state_dict()):
            return config
    raise ValueError(f"its PVT is none of {', '.join(PUBLISHED_PVT)}: name it with pvt (--pvt)")


def projection_kind(projection: Tensors) -> ProjectionKind:
    """Return the kind of a projection's state dict. Raises KeyError."""
    if "0.weight" in projection:
        return "mlp"
    return "conv3x3" if projection["weight"].ndim == 4 else "linear"
