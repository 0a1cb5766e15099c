"""Combined files: they are read in three layouts, and every bit comes back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertLMHeadModel, BlipForConditionalGeneration

from captioners import tiny_captioner, tiny_recipe
from tiny_models import seeded
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.finetuning.combined import combine_checkpoint
from vlm_bridge.formats import pvt_blip as combined
from vlm_bridge.formats.pvt_blip import (
    combine_models,
    load_combined_model,
    read_combined,
    write_combined,
)
from vlm_bridge.model_architecture.pvt_cbam import PvtBlip, PvtCbam, PvtCbamConfig
from vlm_bridge.model_architecture.weights import read_config
from vlm_bridge.training_strategy import checkpoint as checkpoints

Tensors = dict[str, torch.Tensor]
PROJECTIONS = ("linear", "mlp", "conv3x3")


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items()
    )


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
    """The original's parts under our names."""
    return dict(PvtBlip(small_pvt(), blip.text_decoder, proj, []).state_dict())


@pytest.fixture
def load(tiny_blip_dir: Path, tmp_path: Path) -> Any:
    def load(content: Any, **options: Any) -> Any:
        torch.save(content, tmp_path / "c.pth")
        return load_combined_model(
            tmp_path / "c.pth", blip_model_name=str(tiny_blip_dir), **options
        )

    return load


@pytest.fixture(params=PROJECTIONS)
def recipe(request: pytest.FixtureRequest, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> Recipe:
    plain = {"kind": "projection", "projection": request.param, "standardize_features": False}
    trainable = {"bridge.*": None, "language_model.*": None}
    tiny = tiny_recipe(tiny_pvt_v2_dir, tiny_blip_dir, "projection").to_dict()
    return recipe_from_dict({**tiny, "bridge": plain, "trainable": trainable})


@pytest.mark.parametrize("encoder", ["pvt", "pvt_v2", "pvt_cbam"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_round_trip_through_modules_is_bit_equal(
    kind: Any, encoder: str, tiny_blip_dir: Path, load: Any, request: pytest.FixtureRequest
) -> None:
    pvt = str(request.getfixturevalue(f"tiny_{encoder}_dir"))
    state = combine_models(pvt, str(tiny_blip_dir), kind)
    state = {name: x.to(torch.float16) for name, x in state.items()}
    model = load(state, pvt=None if encoder == "pvt_cbam" else pvt)
    assert equal(model.blip.state_dict(), state)
    assert not any(module.training for module in model)


def test_files_of_older_transformers_load(ours: Tensors, load: Any) -> None:
    """They hold positions, and a head that was trained apart from the embeddings."""
    apart = {**ours, "text_decoder.cls.predictions.decoder.weight": torch.ones(322, 32)}
    positions = {"text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]}
    assert equal(load(apart | positions).blip.state_dict(), apart)


@pytest.mark.parametrize("name", combined.PUBLISHED_PVT)
def test_published_encoders_are_known_by_their_tensors(name: str) -> None:
    config, _ = read_config(name, meta=True)
    with torch.device("meta"):
        model = combined.PVT[config.model_type](config)
    assert combined.pvt_config(model.state_dict()).to_dict() == config.to_dict()
    published = {"OpenGVLab/pvt_v2_b0": 3_409_760, "OpenGVLab/pvt_v2_b1": 13_496_000}
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == published.get(name, number)


@torch.no_grad()
@pytest.mark.parametrize("has_vit", [True, False], ids=["vit", "no vit"])
@pytest.mark.parametrize("projection", ["visual_proj.", "visual_proj.proj_layer.", None])
def test_the_originals_files_load(
    projection: str | None, has_vit: bool, blip: Any, proj: nn.Linear, load: Any
) -> None:
    state = prefixed("visual_encoder.", small_pvt().state_dict())
    state |= prefixed("text_decoder.", blip.state_dict())
    state |= prefixed(projection, proj.state_dict()) if projection else {}
    state = {name: x for name, x in state.items() if has_vit or ".vision_model." not in name}
    model = load(state)
    assert equal(model.pvt.state_dict(), small_pvt().state_dict())
    assert equal(model.blip.text_decoder.state_dict(), blip.text_decoder.state_dict())
    ids, states = torch.tensor([[320, 7, 9]]), torch.randn(1, 4, 24)
    theirs = blip.text_decoder(ids, encoder_hidden_states=states).logits
    assert torch.equal(model.blip(input_ids=ids, encoder_hidden_states=states).logits, theirs)
    if projection is None:
        assert model.proj is None
    else:
        assert equal(model.proj.state_dict(), proj.state_dict())


@torch.no_grad()
def test_ours_load_in_the_originals_loader(
    ours: Tensors, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    """Which loads three parts by their prefixes; only ViT's tensors may be missing."""
    write_combined(tmp_path / "c.pth", ours)
    written = torch.load(tmp_path / "c.pth", weights_only=True)
    encoder, decoder, projection = (part(written, prefix) for prefix in combined.PREFIXES)
    assert len(encoder) + len(decoder) + len(projection) == len(written)
    blip = BlipForConditionalGeneration(AutoConfig.from_pretrained(tiny_blip_dir)).eval()
    pvt, proj = small_pvt(), nn.Linear(64, 24)
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


def test_both_layouts_hold_the_same(ours: Tensors, tmp_path: Path) -> None:
    without = {name: x for name, x in ours.items() if not name.startswith("visual_proj.")}
    for state in (ours, without):
        for layout in ("own", "original", "auto"):
            write_combined(tmp_path / layout, state, layout)
            assert equal(read_combined(tmp_path / layout), state)
        assert equal(torch.load(tmp_path / "own", weights_only=True), state)
        original, auto = (
            torch.load(tmp_path / name, weights_only=True) for name in ("original", "auto")
        )
        assert equal(original, auto) and not equal(auto, state)


@pytest.mark.parametrize("form", ["whole BLIP", "decoder", "ours"])
def test_the_guides_three_state_dicts_load(
    form: str, ours: Tensors, blip: Any, proj: nn.Linear, load: Any
) -> None:
    whole, decoder = blip.state_dict(), blip.text_decoder.state_dict()
    content = {
        "pvt": small_pvt().state_dict(),
        "blip": {"whole BLIP": whole, "decoder": decoder, "ours": ours}[form],
        "projection": proj.state_dict(),
    }
    assert equal(load(content).blip.state_dict(), ours)
    assert load({"pvt": content["pvt"], "blip": content["blip"]}).proj is None


@pytest.mark.parametrize("other", ["pvt_v2", "no cbam", "conv3x3"])
def test_parts_without_a_place_in_the_originals_layout_are_refused(
    other: str, ours: Tensors, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    state = {
        "pvt_v2": combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), "linear"),
        "no cbam": {name: x for name, x in ours.items() if ".cbam." not in name},
        "conv3x3": ours | {"visual_proj.weight": torch.zeros(24, 64, 3, 3)},
    }[other]
    with pytest.raises(CheckpointError, match=r"holds PVT-Tiny with CBAM .* write it in ours"):
        write_combined(tmp_path / "c.pth", state, "original")
    assert not (tmp_path / "c.pth").exists()
    write_combined(tmp_path / "c.pth", state)
    assert equal(torch.load(tmp_path / "c.pth", weights_only=True), state)


def bert_captioner() -> Tensors:
    """PVT, a normalizer, a projection and a cross-attending BERT, of the original's training."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    state = prefixed("visual_encoder.", small_pvt().state_dict())
    state |= prefixed("feature_normalizer.norm.", nn.LayerNorm(64).state_dict())
    state |= prefixed("text_decoder.", BertLMHeadModel(config).state_dict())
    return state | prefixed("visual_proj.", nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("form", ["step", "final", "bare", "model_state"])
def test_the_originals_captioners_are_refused_and_their_pvt_is_taken(
    form: str, load: Any, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    weights, state = small_pvt().state_dict(), bert_captioner()
    content = {
        "step": {"step": 3, "model_state": state, "args": argparse.Namespace(lr=1e-5)},
        "final": state,
        "bare": weights,
        "model_state": {"model_state": weights},
    }[form]
    bert = r"decoder is bert-base, not BLIP's: .*--pvt-checkp"
    with pytest.raises(CheckpointError, match=bert if form in ("step", "final") else None):
        load(content)
    written = combine_models(str(tmp_path / "c.pth"), str(tiny_blip_dir))
    assert equal(part(written, "visual_encoder."), weights)
    assert written["visual_proj.weight"].shape == (24, 64)


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
    for read in (lambda: load(content), lambda: combine_models(str(tmp_path / "c.pth"), "x")):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert "\n" not in str(caught.value) and "c.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("visual_proj.weight", (24, 60), r"is \(24, 60\), not \(24, 64\); pvt and blip_model_name"),
        ("visual_proj.bias", None, r"visual_proj\.bias is missing"),
        ("visual_proj.scale", (3,), r"visual_proj\.scale is unknown"),
        ("text_decoder.bert.embeddings.word_embeddings.weight", None, r"embeddings\.weight is mis"),
    ],
)
def test_misfits_are_named(name: str, shape: Any, named: str, ours: Tensors, load: Any) -> None:
    state = {key: x for key, x in ours.items() if key != name}
    with pytest.raises(CheckpointError, match=named) as caught:
        load(state | ({name: torch.zeros(shape)} if shape else {}))
    assert "\n" not in str(caught.value) and "c.pth" in str(caught.value)


def test_models_that_do_not_go_together_are_refused(
    tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, load: Any
) -> None:
    state = combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), "linear")
    with pytest.raises(CheckpointError, match=r"its PVT is none of .*: name it with pvt \(--pvt\)"):
        load(state)
    with pytest.raises(ModelError, match="is a blip, not a pvt or pvt_v2"):
        load(state, pvt=str(tiny_blip_dir))
    with pytest.raises(ModelError, match="cannot load the configuration 'nobody/nothing'"):
        load(state, pvt="nobody/nothing")


def test_other_files_are_refused(ours: Tensors, tmp_path: Path) -> None:
    torch.save({"visual_proj.weight": print}, tmp_path / "evil.pth")
    torch.save(ours, tmp_path / "half.pth")
    checkpoints.save_checkpoint(tmp_path / "run.pth", Recipe(), {})
    whole = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    for name, says in (
        ("evil.pth", "holds code; it was not loaded"),
        ("nowhere.pth", r"no combined file at .*nowhere\.pth; .*save_combined.*--checkpoint"),
        ("", "no combined file at .*--checkpoint"),
        ("run.pth", r"run\.pth is not a combined file, .*--checkpoint"),
        ("half.pth", "is damaged"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            read_combined(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_run_becomes_a_file_in_full_precision(recipe: Recipe, tmp_path: Path) -> None:
    model, run = tiny_captioner(recipe), tmp_path / "run" / "checkpoints"
    trained, whole = model.trained_state_dict(), combined.to_combined(model, "it")
    for name, weights in (
        (checkpoints.BEST_WEIGHTS, checkpoints.stored_as(trained, "bfloat16")),
        (checkpoints.LATEST, {name: tensor + 1 for name, tensor in trained.items()}),
        (checkpoints.BEST, trained),
    ):
        checkpoints.save_checkpoint(run / name, recipe, weights)
    for path in (tmp_path / "run", run / checkpoints.BEST):
        assert equal(combine_checkpoint(path), whole)
    write_combined(tmp_path / "a" / "c.pth", whole)
    assert equal(read_combined(tmp_path / "a" / "c.pth"), whole)
    assert len(whole) == len(model.state_dict())


def test_captioners_that_have_no_place_in_it_are_refused(
    tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tiny_vit_dir: Path, tiny_bert_dir: Path
) -> None:
    for vision, text, says in (
        (tiny_pvt_v2_dir, tiny_blip_dir, r"no place for feature_scale\.mean"),
        (tiny_vit_dir, tiny_blip_dir, "holds a PVT and BLIP's text decoder: it has ViTModel"),
        (tiny_pvt_v2_dir, tiny_bert_dir, "holds a PVT and BLIP's text decoder: it has PvtV2"),
    ):
        with pytest.raises(CheckpointError, match=says):
            combined.to_combined(tiny_captioner(tiny_recipe(vision, text, "projection")), "it")
