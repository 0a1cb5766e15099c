"""The layouts of combined files: the original's, the guide's three state dicts, and ours; and what is none of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    BlipForConditionalGeneration,
    BlipTextLMHeadModel,
)

from tiny_models import seeded
from vlm_bridge.errors import CheckpointError, ConfigurationError
from vlm_bridge.formats.pvt_blip import (
    combine_models,
    load_combined_model,
    read_combined,
    write_combined,
)
from vlm_bridge.model_architecture.pvt_blip import PvtBlip
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig

Tensors = dict[str, torch.Tensor]


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(x, other[name]) for name, x in one.items()
    )


def small_pvt(cbam: Any = "sequence") -> PvtCbam:
    with seeded():
        return PvtCbam(PvtCbamConfig((8, 16, 40, 64), cbam=cbam)).eval()


def prefixed(prefix: str, state: Any) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def blip(tiny_blip_dir: Path) -> Any:
    return BlipForConditionalGeneration.from_pretrained(tiny_blip_dir).eval()


@pytest.fixture
def proj() -> nn.Linear:
    with seeded():
        return nn.Linear(64, 24)


@pytest.fixture
def ours(blip: Any, proj: nn.Linear) -> Tensors:
    return dict(PvtBlip(small_pvt(), blip.text_decoder, proj, None).state_dict())


@pytest.fixture
def load(tiny_blip_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def load(content: Any, **options: Any) -> Any:
        torch.save(content, tmp_path / "c.pth")
        return load_combined_model(tmp_path / "c.pth", "cpu", str(tiny_blip_dir), **options)

    return load


def by_the_originals_loader(
    state: Tensors, tiny_blip_dir: Path
) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """What the original's loader does, but that every tensor must fit; only ViT's may be missing, as there."""

    def part(prefix: str) -> Tensors:
        return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}

    pvt = small_pvt()
    nn.init.zeros_(pvt.norm.weight)
    pvt.load_state_dict(part("visual_encoder."))
    blip = BlipForConditionalGeneration(AutoConfig.from_pretrained(tiny_blip_dir)).eval()
    found = blip.load_state_dict(part("text_decoder."), strict=False)
    assert not found.unexpected_keys and all(
        key.startswith("vision_model.") for key in found.missing_keys
    )
    if not (weights := part("visual_proj.")):
        return pvt, blip, None
    width, dim = weights["weight"].shape
    proj = nn.Linear(dim, width)
    proj.load_state_dict(weights)
    assert len(part("visual_encoder.")) + len(part("text_decoder.")) + len(weights) == len(state)
    return pvt, blip, proj


@torch.no_grad()
@pytest.mark.parametrize("has_vit", [True, False], ids=["vit", "no vit"])
@pytest.mark.parametrize("projection", ["visual_proj.", "visual_proj.proj_layer.", None])
def test_the_originals_files_load(
    projection: str | None, has_vit: bool, blip: Any, proj: nn.Linear, load: Any, caplog: Any
) -> None:
    state = prefixed("visual_encoder.", small_pvt().state_dict())
    state |= prefixed("text_decoder.", blip.state_dict())
    state |= prefixed(projection, proj.state_dict()) if projection else {}
    state = {name: x for name, x in state.items() if has_vit or ".vision_model." not in name}
    caplog.set_level("INFO", "vlm_bridge")
    model = load(state)
    (line,) = caplog.messages
    assert "the original's combined file: PVT-Tiny with CBAM, BLIP's decoder of 2 layers" in line
    assert ("its ViT is left out" in line) is has_vit and ("no projection" in line) is (
        projection is None
    )
    assert equal(model.pvt.state_dict(), dict(small_pvt().state_dict()))
    assert equal(model.blip.text_decoder.state_dict(), dict(blip.text_decoder.state_dict()))
    ids, states = torch.tensor([[320, 7, 9]]), torch.randn(1, 4, 24)
    theirs = blip.text_decoder(ids, encoder_hidden_states=states).logits
    assert torch.equal(model.blip(input_ids=ids, encoder_hidden_states=states).logits, theirs)
    if projection is None:
        assert model.proj is None
    else:
        assert equal(model.proj.state_dict(), dict(proj.state_dict()))
    assert not any(part.training for part in model if part is not None)


@torch.no_grad()
def test_ours_load_in_the_originals_loader(
    ours: Tensors, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    write_combined(tmp_path / "c.pth", ours)
    written = torch.load(tmp_path / "c.pth", weights_only=True)
    theirs = by_the_originals_loader(written, tiny_blip_dir)
    model = load_combined_model(tmp_path / "c.pth", "cpu", str(tiny_blip_dir))
    pixels = torch.randn(2, 3, 64, 64)
    features = model.pvt(pixels)
    assert torch.equal(features, theirs[0](pixels))
    tokens = features.flatten(2).transpose(1, 2)
    ids = torch.tensor([[320, 7, 9], [320, 11, 5]])
    ours_logits = model.blip(input_ids=ids, encoder_hidden_states=model.proj(features)).logits
    decoder: Any = theirs[1].text_decoder
    assert theirs[2] is not None
    torch.testing.assert_close(
        ours_logits, decoder(ids, encoder_hidden_states=theirs[2](tokens)).logits
    )
    assert equal(read_combined(tmp_path / "c.pth"), ours)


def test_both_layouts_hold_the_same(ours: Tensors, tmp_path: Path) -> None:
    for layout in ("own", "original"):
        write_combined(tmp_path / layout, ours, layout)
        assert equal(read_combined(tmp_path / layout), ours)
    assert equal(torch.load(tmp_path / "own", weights_only=True), ours)
    without = {name: x for name, x in ours.items() if not name.startswith("visual_proj.")}
    write_combined(tmp_path / "without", without, "original")
    assert equal(read_combined(tmp_path / "without"), without)


@pytest.mark.parametrize("form", ["whole BLIP", "decoder", "ours"])
def test_the_guides_three_state_dicts_load(
    form: str, ours: Tensors, blip: Any, proj: nn.Linear, load: Any, caplog: Any
) -> None:
    blips = {
        "whole BLIP": blip.state_dict(),
        "decoder": blip.text_decoder.state_dict(),
        "ours": ours,
    }
    content = {
        "pvt": small_pvt().state_dict(),
        "blip": blips[form],
        "projection": proj.state_dict(),
    }
    caplog.set_level("INFO", "vlm_bridge")
    assert equal(load(content).blip.state_dict(), ours)
    assert "the guide's dict of state dicts" in caplog.text
    without = load({"pvt": content["pvt"], "blip": content["blip"]})
    assert without.proj is None


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_encoders_without_a_place_there_are_refused(
    kind: Any, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    state = combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), kind)
    with pytest.raises(CheckpointError, match=r"pvt-blip layout.*: it has PVTv2 of transformers"):
        write_combined(tmp_path / "c.pth", state, "original")
    assert not (tmp_path / "c.pth").exists()
    write_combined(tmp_path / "c.pth", state)
    assert equal(torch.load(tmp_path / "c.pth", weights_only=True), state)


@pytest.mark.parametrize(
    ("cbam", "says"),
    [(None, "PVT-Tiny without CBAM"), ("map", "CBAM with a Conv2d over the map")],
)
def test_other_cbam_is_refused_there_and_kept_here(
    cbam: Any, says: str, blip: Any, proj: nn.Linear, load: Any, tmp_path: Path
) -> None:
    state = dict(PvtBlip(small_pvt(cbam), blip.text_decoder, proj, None).state_dict())
    with pytest.raises(CheckpointError, match=says):
        write_combined(tmp_path / "o.pth", state, "original")
    assert equal(load(state).blip.state_dict(), state)


def test_a_projection_without_a_place_there_is_refused(ours: Tensors, tmp_path: Path) -> None:
    ours["visual_proj.weight"] = torch.zeros(24, 64, 3, 3)
    with pytest.raises(CheckpointError, match=r"a projection of weight \(24, 64, 3, 3\)"):
        write_combined(tmp_path / "c.pth", ours, "original")


def bert_captioner() -> Tensors:
    """What the original's training makes: PVT, a normalizer, a projection and BERT with cross-attention."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    state = prefixed("visual_encoder.", small_pvt().state_dict())
    state |= prefixed("feature_normalizer.norm.", nn.LayerNorm(64).state_dict())
    state |= prefixed("text_decoder.", BertLMHeadModel(config).state_dict())
    return state | prefixed("proj_layer.", nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("form", ["step", "final"])
def test_the_originals_captioners_are_refused_and_their_pvt_is_taken(
    form: str, load: Any, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    state = bert_captioner()
    content: Any = {"step": 3, "model_state": state, "args": argparse.Namespace(lr=1e-5)}
    if form == "final":  # its own names for what it writes at the end
        content = {
            name.replace("proj_layer.", "visual_proj."): x
            for name, x in state.items()
            if not name.startswith("feature_normalizer.")
        }
    with pytest.raises(
        CheckpointError, match=r"decoder is bert-base, not BLIP's: .*--pvt-checkpoint"
    ):
        load(content)
    combined = combine_models(str(tmp_path / "c.pth"), str(tiny_blip_dir))
    taken = {
        n.removeprefix("visual_encoder."): x
        for n, x in combined.items()
        if n.startswith("visual_enc")
    }
    assert equal(taken, dict(small_pvt().state_dict()))
    assert combined["visual_proj.weight"].shape == (24, 64)


@pytest.mark.parametrize("form", ["bare", "model_state", "prefixed"])
def test_weights_of_the_originals_pvt_are_an_encoder(
    form: str, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    weights = dict(small_pvt().state_dict())
    forms: dict[str, Any] = {
        "bare": weights, "model_state": {"model_state": weights}, "prefixed": prefixed("visual_encoder.", weights)
    }  # fmt: skip
    torch.save(forms[form], tmp_path / "pvt.pth")
    combined = combine_models(str(tmp_path / "pvt.pth"), str(tiny_blip_dir))
    assert equal(
        {n: x for n, x in combined.items() if "visual_e" in n}, prefixed("visual_encoder.", weights)
    )


def test_other_files_are_no_encoder(tiny_blip_dir: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth does not hold the original's PVT"):
        combine_models(str(tmp_path / "other.pth"), str(tiny_blip_dir))
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.pth; --pvt takes"):
        combine_models(str(tmp_path / "nowhere.pth"), str(tiny_blip_dir))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a folder, not a combined file; of a run, .*--checkpoint"
    ):
        load_combined_model(tmp_path)


def test_a_device_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for device in ("warp", "cuda", "mps", "xpu"):
        with pytest.raises(ConfigurationError, match=f"device='{device}'"):
            load_combined_model(tmp_path / "nowhere.pth", device)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("layer.0.", "has no layer 0 of 2"),
        ("layer.1.", "has 1 layers and that of '.*' 2: layers are missing"),
    ],
)
def test_a_decoder_with_a_layer_missing_is_refused(
    missing: str, says: str, ours: Tensors, load: Any
) -> None:
    with pytest.raises(CheckpointError, match=says):
        load({name: x for name, x in ours.items() if missing not in name})


def test_a_decoder_of_another_vocabulary_is_refused(
    ours: Tensors, tiny_blip_dir: Path, load: Any, tmp_path: Path
) -> None:
    text = AutoConfig.from_pretrained(tiny_blip_dir).text_config
    text.vocab_size += 8
    longer = prefixed("text_decoder.", BlipTextLMHeadModel(text).state_dict())
    with pytest.raises(
        CheckpointError, match=r"vocabulary of 330 and that of '.*' 322: name the BLIP"
    ):
        load(ours | longer)
    write_combined(tmp_path / "c.pth", ours)
    with pytest.raises(CheckpointError, match=r"has 2 layers and that of 'Salesforce/.*-base' 12"):
        load_combined_model(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"model_state": torch.zeros(2)},
        {"pvt": torch.zeros(2), "blip": 3},
        {"pvt": {"patch1.proj.weight": 3}, "blip": {1: torch.zeros(2)}, "projection": {}},
        {
            "visual_encoder.patch1.proj.weight": torch.zeros(()),
            "text_decoder.bert.x": torch.zeros(0),
        },
        {
            "visual_encoder.stage1.0.norm1.weight": torch.zeros(()),
            "text_decoder.bert.x": torch.zeros(0),
        },
    ],
)
def test_what_is_no_combined_file_is_one_line(
    content: Any, load: Any, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(content)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="does not hold the original's PVT"):
        combine_models(str(tmp_path / "c.pth"), str(tiny_blip_dir))


def test_a_bert_decoder_in_the_guides_dict_is_refused(load: Any) -> None:
    state = bert_captioner()
    decoder = {
        n.removeprefix("text_decoder."): x
        for n, x in state.items()
        if n.startswith("text_decoder.")
    }
    with pytest.raises(CheckpointError, match="decoder is bert-base, not BLIP's"):
        load({"pvt": small_pvt().state_dict(), "blip": decoder})
