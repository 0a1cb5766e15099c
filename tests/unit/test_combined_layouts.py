"""Layouts of combined files: the original's, the guide's three state dicts, and ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertLMHeadModel, BlipForConditionalGeneration

from tiny_models import seeded
from vlm_bridge.errors import CheckpointError
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
    return one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())


def small_pvt(cbam: Any = "sequence") -> PvtCbam:
    with seeded():
        return PvtCbam(PvtCbamConfig((8, 16, 40, 64), cbam=cbam)).eval()


def prefixed(prefix: str, state: Any) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def part(state: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


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
    def load(content: Any) -> Any:
        torch.save(content, tmp_path / "c.pth")
        return load_combined_model(tmp_path / "c.pth", "cpu", str(tiny_blip_dir))

    return load


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
    assert "the original's combined file: PvtCbam, BLIP's decoder" in line
    assert ("its ViT is left out" in line) is has_vit
    assert ("no projection" in line) is (projection is None)
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
    """Which loads three parts by their prefixes; only ViT's tensors may be missing."""
    write_combined(tmp_path / "c.pth", ours)
    written = torch.load(tmp_path / "c.pth", weights_only=True)
    encoder, decoder, projection = (
        part(written, prefix) for prefix in ("visual_encoder.", "text_decoder.", "visual_proj.")
    )
    assert len(encoder) + len(decoder) + len(projection) == len(written)
    pvt, blip, proj = (
        small_pvt(),
        BlipForConditionalGeneration(AutoConfig.from_pretrained(tiny_blip_dir)).eval(),
        nn.Linear(64, 24),
    )
    nn.init.zeros_(pvt.norm.weight)
    pvt.load_state_dict(encoder)
    proj.load_state_dict(projection)
    found = blip.load_state_dict(decoder, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("vision_model.") for key in found.missing_keys)

    model = load_combined_model(tmp_path / "c.pth", "cpu", str(tiny_blip_dir))
    pixels, ids = torch.randn(2, 3, 64, 64), torch.tensor([[320, 7, 9], [320, 11, 5]])
    features = model.pvt(pixels)
    assert torch.equal(features, pvt(pixels)) and model.proj is not None
    states = proj(features.flatten(2).transpose(1, 2))
    theirs: Any = blip.text_decoder
    torch.testing.assert_close(
        model.blip(input_ids=ids, encoder_hidden_states=model.proj(features)).logits,
        theirs(ids, encoder_hidden_states=states).logits,
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
    whole, decoder = blip.state_dict(), blip.text_decoder.state_dict()
    content = {
        "pvt": small_pvt().state_dict(),
        "blip": {"whole BLIP": whole, "decoder": decoder, "ours": ours}[form],
        "projection": proj.state_dict(),
    }
    caplog.set_level("INFO", "vlm_bridge")
    assert equal(load(content).blip.state_dict(), ours)
    assert "the guide's dict of state dicts" in caplog.text
    assert load({"pvt": content["pvt"], "blip": content["blip"]}).proj is None


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_encoders_without_a_place_in_the_originals_layout_are_refused(
    kind: Any, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    state = combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), kind)
    with pytest.raises(
        CheckpointError, match="original's pvt-blip layout, which holds PVT-Tiny with CBAM"
    ):
        write_combined(tmp_path / "c.pth", state, "original")
    assert not (tmp_path / "c.pth").exists()
    write_combined(tmp_path / "c.pth", state)
    assert equal(torch.load(tmp_path / "c.pth", weights_only=True), state)


def test_other_parts_are_refused_there_and_kept_here(
    ours: Tensors, blip: Any, proj: nn.Linear, load: Any, tmp_path: Path
) -> None:
    plain = dict(PvtBlip(small_pvt(None), blip.text_decoder, proj, None).state_dict())
    assert equal(load(plain).blip.state_dict(), plain)
    conv = ours | {"visual_proj.weight": torch.zeros(24, 64, 3, 3)}
    for state in (plain, conv):
        with pytest.raises(CheckpointError, match="write it in ours"):
            write_combined(tmp_path / "o.pth", state, "original")


def bert_captioner() -> Tensors:
    """PVT, a normalizer, a projection and a cross-attending BERT, of the original's training."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    state = prefixed("visual_encoder.", small_pvt().state_dict())
    state |= prefixed("feature_normalizer.norm.", nn.LayerNorm(64).state_dict())
    state |= prefixed("text_decoder.", BertLMHeadModel(config).state_dict())
    return state | prefixed("proj_layer.", nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("form", ["step", "final", "guide"])
def test_the_originals_captioners_are_refused_and_their_pvt_is_taken(
    form: str, load: Any, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    state = bert_captioner()
    final = {name.replace("proj_layer.", "visual_proj."): x for name, x in state.items()}
    forms: dict[str, Any] = {
        "step": {"step": 3, "model_state": state, "args": argparse.Namespace(lr=1e-5)},
        "final": {n: x for n, x in final.items() if not n.startswith("feature_normalizer.")},
        "guide": {"pvt": small_pvt().state_dict(), "blip": part(state, "text_decoder.")},
    }
    with pytest.raises(CheckpointError, match=r"decoder is bert-base, not BLIP's: .*--pvt-checkp"):
        load(forms[form])
    if form != "guide":
        combined = combine_models(str(tmp_path / "c.pth"), str(tiny_blip_dir))
        assert equal(part(combined, "visual_encoder."), dict(small_pvt().state_dict()))
        assert combined["visual_proj.weight"].shape == (24, 64)


@pytest.mark.parametrize("form", ["bare", "model_state", "prefixed"])
def test_weights_of_the_originals_pvt_are_an_encoder(
    form: str, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    weights = dict(small_pvt().state_dict())
    with_prefix = prefixed("visual_encoder.", weights)
    forms = {"bare": weights, "model_state": {"model_state": weights}, "prefixed": with_prefix}
    torch.save(forms[form], tmp_path / "pvt.pth")
    combined = combine_models(str(tmp_path / "pvt.pth"), str(tiny_blip_dir))
    assert equal(part(combined, "visual_encoder."), weights)


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"fc.weight": torch.zeros(2)},
        {"model_state": torch.zeros(2)},
        {"pvt": torch.zeros(2), "blip": 3},
        {"pvt": {"patch1.proj.weight": 3}, "blip": {1: torch.zeros(2)}, "projection": {}},
        {
            "visual_encoder.patch1.proj.weight": torch.zeros(()),
            "visual_encoder.stage1.0.norm1.weight": torch.zeros(()),
            "text_decoder.bert.x": torch.zeros(0),
        },
    ],
)
def test_other_content_is_one_line(
    content: Any, load: Any, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(content)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="does not hold the original's PVT"):
        combine_models(str(tmp_path / "c.pth"), str(tiny_blip_dir))
