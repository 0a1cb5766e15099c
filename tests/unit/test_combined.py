"""Combined files: every bit comes back, misfits are named, and nothing in a file is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    BlipTextConfig,
    BlipTextLMHeadModel,
    PvtConfig,
    PvtModel,
    PvtV2Config,
    PvtV2Model,
)

from captioners import tiny_captioner, tiny_recipe
from tiny_models import seeded
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.finetuning import combine_checkpoint
from vlm_bridge.formats import pvt_blip as combined
from vlm_bridge.formats.pvt_blip import (
    combine_models,
    load_combined_model,
    read_combined,
    write_combined,
)
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.pvt_blip import PvtBlip
from vlm_bridge.model_architecture.weights import known_architecture
from vlm_bridge.training_strategy import checkpoint as checkpoints

Tensors = dict[str, torch.Tensor]
PROJECTIONS = ("linear", "mlp", "conv3x3")


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


@pytest.fixture(params=PROJECTIONS)
def recipe(request: pytest.FixtureRequest, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> Recipe:
    plain = {"kind": "projection", "projection": request.param, "standardize_features": False}
    trainable = {"bridge.*": None, "language_model.*": None}
    tiny = tiny_recipe(tiny_pvt_v2_dir, tiny_blip_dir, "projection").to_dict()
    return recipe_from_dict({**tiny, "bridge": plain, "trainable": trainable})


@pytest.fixture
def state(tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> Tensors:
    """The tensors of a combined file of the tiny models."""
    return combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), "linear")


def small_published_state(kind: combined.ProjectionKind = "linear", first: bool = False) -> Tensors:
    """Of models that are shaped as published, but thin: the tensors tell all of their sizes."""
    widths = [8, 16, 40, 64]
    text = BlipTextConfig(
        vocab_size=50, hidden_size=128, encoder_hidden_size=24, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=20,
    )  # fmt: skip
    with seeded():
        pvt = (
            PvtModel(PvtConfig(image_size=64, hidden_sizes=widths))
            if first
            else PvtV2Model(PvtV2Config(hidden_sizes=widths, depths=[1, 2, 1, 1]))
        )
        proj = combined.projection_for(pvt.config, kind, 24)
        return dict(PvtBlip(pvt, BlipTextLMHeadModel(text), proj, None).state_dict())


def load(path: Path) -> combined.CombinedModel:
    """Load a file whose decoder is smaller than the published one."""
    return load_combined_model(path, blip_model_name=None)


def test_a_round_trip_through_a_captioner_is_bit_equal(recipe: Recipe, tmp_path: Path) -> None:
    model = tiny_captioner(recipe)
    write_combined(tmp_path / "a" / "c.pth", combined.to_combined(model, "it"))
    read = read_combined(tmp_path / "a" / "c.pth")
    assert equal(combined.from_combined(read), dict(model.state_dict()))
    fresh = build_captioner(recipe)
    fresh.load_state_dict(combined.from_combined(read))
    assert equal(combined.to_combined(fresh, "it"), read)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c.pth"]


@pytest.mark.parametrize("first", [False, True], ids=["pvt_v2", "pvt"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_round_trip_through_modules_is_bit_equal(
    kind: combined.ProjectionKind, first: bool, tmp_path: Path
) -> None:
    dtype = torch.float16 if first else torch.float32
    state = {name: tensor.to(dtype) for name, tensor in small_published_state(kind, first).items()}
    write_combined(tmp_path / "c.pth", state)
    write_combined(tmp_path / "again.pth", load(tmp_path / "c.pth").blip.state_dict())
    assert equal(read_combined(tmp_path / "again.pth"), state)


def test_older_state_dicts_load(tmp_path: Path) -> None:
    """They have buffers that transformers computes today, and one name of a tied tensor."""
    state = small_published_state()
    older = {**state, "text_decoder.bert.embeddings.position_ids": torch.arange(20)[None]}
    for kind in ("weight", "bias"):
        del older[f"text_decoder.cls.predictions.decoder.{kind}"]
    write_combined(tmp_path / "c.pth", older)
    assert equal(load(tmp_path / "c.pth").blip.state_dict(), state)


PUBLISHED = {
    "OpenGVLab/pvt_v2_b0": 3_409_760,
    "OpenGVLab/pvt_v2_b1": 13_496_000,
    "Zetatech/pvt-tiny-224": None,
    "Salesforce/blip-image-captioning-base": None,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_tell_the_sizes_of_published_models(name: str) -> None:
    config, _ = known_architecture(name) or (None, None)
    assert config is not None
    config = config.text_config if name.startswith("Salesforce") else config
    classes = {**combined.PVT, "blip_text_model": BlipTextLMHeadModel}
    with torch.device("meta"):
        model = classes[config.model_type](config)
    is_text = config.model_type == "blip_text_model"
    read = (combined.text_config if is_text else combined.pvt_config)(model.state_dict())
    assert read.to_dict() == config.to_dict()
    number = sum(parameter.numel() for parameter in model.parameters())
    assert PUBLISHED[name] in (None, number)


def test_heads_that_no_tensor_tells_are_asked_for(
    state: Tensors, tiny_pvt_v2_dir: Path, tmp_path: Path
) -> None:
    write_combined(tmp_path / "c.pth", state)
    with pytest.raises(CheckpointError, match=r"heads of a PVT of widths \[8, 16, 24, 32\].*--pvt"):
        load(tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"heads of a text decoder of width 32.*--blip"):
        load_combined_model(tmp_path / "c.pth", blip_model_name=None, pvt=str(tiny_pvt_v2_dir))


def test_names_of_other_models_are_refused(
    state: Tensors, tiny_blip_dir: Path, tiny_pvt_v2_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.pth"
    write_combined(path, state)
    with pytest.raises(ModelError, match="is a blip, not a pvt or pvt_v2"):
        load_combined_model(path, pvt=str(tiny_blip_dir))
    with pytest.raises(ModelError, match="cannot load the configuration 'nobody/nothing'"):
        load_combined_model(path, pvt="nobody/nothing")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"visual_proj.weight": (24, 60)},
            r"is \(24, 60\), not \(24, 64\); pvt and blip_model_name",
        ),
        ({"visual_proj.bias": None}, r"visual_proj\.bias is missing"),
        ({"visual_proj.scale": (3,)}, r"visual_proj\.scale is unknown"),
        (
            {"text_decoder.bert.embeddings.word_embeddings.weight": None},
            r"bert\.embeddings\.word_embeddings\.weight is missing",
        ),
    ],
)
def test_misfits_are_named(
    changes: dict[str, tuple[int, ...] | None], named: str, tmp_path: Path
) -> None:
    state = small_published_state()
    for name, shape in changes.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    write_combined(tmp_path / "c.pth", state)
    with pytest.raises(CheckpointError, match=named) as caught:
        load(tmp_path / "c.pth")
    assert "\n" not in str(caught.value) and str(tmp_path / "c.pth") in str(caught.value)


class Payload:
    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def test_code_in_a_combined_file_is_not_run(tmp_path: Path) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "evil.pth"
    torch.save({"visual_proj.weight": Payload(evidence)}, path)
    with pytest.raises(CheckpointError, match="holds code; it was not loaded") as caught:
        load_combined_model(path)
    assert not evidence.exists() and "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("numbers", {"visual_proj.weight": 3}),
        ("half", small_published_state()),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
    checkpoints.save_checkpoint(tmp_path / "run.pth", Recipe(), {})
    whole = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    for name, says in (
        ("nowhere.pth", r"no file at .*nowhere\.pth; .*save_combined"),
        ("", r"is a folder, not a combined file; of a run, .*--checkpoint"),
        ("numbers.pth", "a dict of tensors alone"),
        ("run.pth", r"is a checkpoint of a run, not a combined file: .* --checkpoint \S+run\.pth"),
        ("half.pth", "is damaged"),
    ):
        with pytest.raises(CheckpointError, match=says):
            read_combined(tmp_path / name)


def test_a_run_becomes_a_file_in_full_precision(recipe: Recipe, tmp_path: Path) -> None:
    model, run = tiny_captioner(recipe), tmp_path / "run" / "checkpoints"
    trained = model.trained_state_dict()
    for name, weights in (
        (checkpoints.BEST_WEIGHTS, checkpoints.in_bfloat16(trained)),
        (checkpoints.LATEST, {name: tensor + 1 for name, tensor in trained.items()}),
        (checkpoints.BEST, trained),
    ):
        checkpoints.save_checkpoint(run / name, recipe, weights)
    assert equal(combine_checkpoint(tmp_path / "run"), combined.to_combined(model, "it"))
    assert equal(combine_checkpoint(run / checkpoints.BEST), combined.to_combined(model, "it"))


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
