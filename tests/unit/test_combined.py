"""Combined files: every bit comes back, what does not fit is named with its shape, and nothing in them is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
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

from captioners import tiny_captioner, tiny_recipe
from tiny_models import seeded
from vlm_bridge.configuration import Recipe, recipe_from_dict
from vlm_bridge.errors import CheckpointError, ModelError
from vlm_bridge.finetuning import combine_checkpoint
from vlm_bridge.formats import pvt_blip as combined
from vlm_bridge.formats import pvt_blip_sizes
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
    return recipe_from_dict(
        {
            **tiny_recipe(tiny_pvt_v2_dir, tiny_blip_dir, "projection").to_dict(),
            "bridge": plain,
            "trainable": {"bridge.*": None, "language_model.*": None},
        }
    )


@pytest.fixture
def state(tiny_pvt_v2_dir: Path, tiny_blip_dir: Path) -> Tensors:
    """What a combined file of the tiny models holds."""
    return combine_models(str(tiny_pvt_v2_dir), str(tiny_blip_dir), "linear")


def small_published_state(kind: combined.ProjectionKind = "linear", first: bool = False) -> Tensors:
    """Of models that are shaped as published, but thin: the tensors tell all of their sizes."""
    with seeded():
        pvt = (
            PvtModel(PvtConfig(image_size=64, hidden_sizes=[8, 16, 40, 64]))
            if first
            else PvtV2Model(PvtV2Config(hidden_sizes=[8, 16, 40, 64], depths=[1, 2, 1, 1]))
        )
        text = BlipTextConfig(
            vocab_size=50, hidden_size=128, encoder_hidden_size=24, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=20,
        )  # fmt: skip
        blip = BlipTextLMHeadModel(text)
        proj = combined.new_projection(kind, 64, 24)
    return dict(PvtBlip(pvt, blip, proj, None).state_dict())


def load(path: Path) -> combined.CombinedModel:
    """Load a file whose decoder is smaller than the published one."""
    return load_combined_model(path, blip_model_name=None)


def test_a_round_trip_through_a_captioner_is_bit_equal(recipe: Recipe, tmp_path: Path) -> None:
    model = tiny_captioner(recipe)
    write_combined(tmp_path / "a" / "c.pth", combined.to_combined(model, "it"))
    read = read_combined(tmp_path / "a" / "c.pth")
    assert equal(combined.from_combined(read, "it"), dict(model.state_dict()))
    fresh = build_captioner(recipe)
    fresh.load_state_dict(combined.from_combined(read, "it"))
    assert equal(combined.to_combined(fresh, "it"), read)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c.pth"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [False, True], ids=["pvt_v2", "pvt"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_round_trip_through_modules_is_bit_equal(
    kind: combined.ProjectionKind, first: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small_published_state(kind, first).items()}
    write_combined(tmp_path / "c.pth", state)
    write_combined(tmp_path / "again.pth", load(tmp_path / "c.pth").blip.state_dict())
    assert equal(read_combined(tmp_path / "again.pth"), state)


def test_a_head_with_weights_of_its_own_keeps_them(tmp_path: Path) -> None:
    state = small_published_state()
    head = "text_decoder.cls.predictions.decoder.weight"
    state[head] = state[head] + 1
    write_combined(tmp_path / "c.pth", state)
    assert equal(load(tmp_path / "c.pth").blip.state_dict(), state)


def test_the_layout_is_the_guides() -> None:
    """PVTv2-B0 and a linear projection to BLIP's 768; the decoder is transformers' own."""
    with torch.device("meta"):
        pvt, blip = (
            PvtV2Model(PvtV2Config()),
            BlipTextLMHeadModel(BlipTextConfig(num_attention_heads=12)),
        )
        published = [
            PvtBlip(pvt, blip, combined.new_projection(kind, width, 768), None).state_dict()
            for kind, width in (("linear", 256), ("conv3x3", 512))
        ]
    linear, conv = (
        {n: tuple(t.shape) for n, t in s.items() if n.startswith("visual_proj.")} for s in published
    )
    assert linear == {"visual_proj.weight": (768, 256), "visual_proj.bias": (768,)}
    assert conv == {"visual_proj.weight": (768, 512, 3, 3), "visual_proj.bias": (768,)}
    assert (
        sum(t.numel() for n, t in published[1].items() if n.startswith("visual_proj.")) == 3_539_712
    )
    names = {name.partition(".")[0] for name in published[0]}
    assert names == {"visual_encoder", "text_decoder", "visual_proj"}


def test_loading_is_loading_the_state_dict_by_hand(
    state: Tensors, tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    write_combined(tmp_path / "c.pth", state)
    pvt, blip, proj = load_combined_model(
        tmp_path / "c.pth", "cpu", str(tiny_blip_dir), str(tiny_pvt_v2_dir)
    )
    by_hand = (
        PvtV2Model(AutoConfig.from_pretrained(tiny_pvt_v2_dir)),
        BlipTextLMHeadModel(AutoConfig.from_pretrained(tiny_blip_dir).text_config),
        nn.Linear(32, 24),
    )
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    for prefix, module in zip(
        ("visual_encoder.", "text_decoder.", "visual_proj."), by_hand, strict=True
    ):
        module.load_state_dict(
            {n.removeprefix(prefix): t for n, t in content.items() if n.startswith(prefix)}
        )
        module.eval()
    start = blip.text_decoder.config.bos_token_id
    pixels, ids = torch.randn(2, 3, 64, 64), torch.tensor([[start, 7, 9], [start, 11, 5]])

    def logits(pvt, blip, proj) -> torch.Tensor:
        tokens = pvt(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return blip(ids, encoder_hidden_states=proj(tokens), is_decoder=True).logits

    with torch.no_grad():
        ours, theirs = logits(pvt, blip.text_decoder, proj), logits(*by_hand)
    assert torch.equal(ours, theirs)
    assert not any(part.training for part in (pvt, blip, proj))
    decoder = blip.text_decoder
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("OpenGVLab/pvt_v2_b0", 3_409_760),
        ("OpenGVLab/pvt_v2_b1", 13_496_000),
        ("Zetatech/pvt-tiny-224", None),
    ],
)
def test_tensors_tell_the_sizes_of_published_encoders(name: str, number: int | None) -> None:
    published = known_architecture(name)
    assert published is not None
    with torch.device("meta"):
        model = (PvtModel if published.config.model_type == "pvt" else PvtV2Model)(published.config)
    read = pvt_blip_sizes.pvt_config(model.state_dict()).to_dict()
    assert read == published.config.to_dict()
    assert number in (None, sum(parameter.numel() for parameter in model.parameters()))


def test_tensors_tell_the_sizes_of_the_published_decoder() -> None:
    published = known_architecture("Salesforce/blip-image-captioning-base")
    assert published is not None
    with torch.device("meta"):
        model = BlipTextLMHeadModel(published.config.text_config)
    assert (
        pvt_blip_sizes.text_config(model.state_dict()).to_dict()
        == published.config.text_config.to_dict()
    )


def test_heads_that_no_tensor_tells_are_asked_for(
    state: Tensors, tiny_pvt_v2_dir: Path, tmp_path: Path
) -> None:
    write_combined(tmp_path / "c.pth", state)
    with pytest.raises(CheckpointError, match=r"heads of a PVT of widths \[8, 16, 24, 32\].*--pvt"):
        load(tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"heads of a text decoder of width 32.*--blip"):
        load_combined_model(tmp_path / "c.pth", blip_model_name=None, pvt=str(tiny_pvt_v2_dir))


def test_names_of_other_models_are_refused(
    state: Tensors, tiny_blip_dir: Path, tmp_path: Path
) -> None:
    write_combined(tmp_path / "c.pth", state)
    with pytest.raises(ModelError, match="is a blip, not a pvt or pvt_v2"):
        load_combined_model(tmp_path / "c.pth", pvt=str(tiny_blip_dir))
    with pytest.raises(ModelError, match="cannot read the configuration of 'nobody/nothing'"):
        load_combined_model(tmp_path / "c.pth", pvt="nobody/nothing")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"visual_proj.weight": (24, 60)}, r"visual_proj\.weight is \(24, 60\), not \(24, 64\)"),
        ({"visual_proj.weight": (24,)}, r"visual_proj\.weight \(24,\) is of no projection"),
        ({"visual_proj.bias": None}, r"visual_proj\.bias \(24,\) is missing"),
        ({"visual_proj.scale": (3,)}, r"visual_proj\.scale \(3,\) is unknown"),
        ({"text_proj.weight": (4, 2)}, r"text_proj\.weight \(4, 2\) is of no part"),
        (
            {"visual_encoder.encoder.layers.1.blocks.1.attention.key.bias": (9,)},
            r"visual_encoder\.encoder\.layers\.1\.blocks\.1\.attention\.key\.bias is \(9,\), not \(16,\)",
        ),
        (
            {"text_decoder.bert.encoder.layer.1.crossattention.self.value.weight": (128, 25)},
            r"crossattention\.self\.value\.weight is \(128, 25\), not \(128, 24\)",
        ),
        (
            {"text_decoder.bert.embeddings.word_embeddings.weight": None},
            r"lacks bert\.embeddings\.word_embeddings\.weight, or has other names than transformers",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(
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


def test_older_state_dicts_load(tmp_path: Path) -> None:
    """Those with the buffers that transformers computes itself now, and without the second name of a tied tensor."""
    state = small_published_state()
    older = dict(state)
    older["text_decoder.bert.embeddings.position_ids"] = torch.arange(20)[None]
    del (
        older["text_decoder.cls.predictions.decoder.weight"],
        older["text_decoder.cls.predictions.decoder.bias"],
    )
    write_combined(tmp_path / "c.pth", older)
    assert equal(load(tmp_path / "c.pth").blip.state_dict(), state)


class Payload:
    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def test_code_in_a_combined_file_is_not_run(tmp_path: Path) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "evil.pth"
    torch.save(
        {"visual_proj.weight": torch.zeros(2, 2), "visual_proj.bias": Payload(evidence)}, path
    )
    with pytest.raises(CheckpointError, match="holds code; it was not loaded") as caught:
        load_combined_model(path)
    assert not evidence.exists() and "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.pth; .*save_combined"):
        read_combined(tmp_path / "nowhere.pth")
    torch.save({"visual_proj.weight": 3}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="a dict of tensors alone"):
        read_combined(tmp_path / "numbers.pth")
    checkpoints.save_checkpoint(tmp_path / "run.pth", recipe, {})
    with pytest.raises(
        CheckpointError,
        match=r"is a checkpoint of a run, not a combined file: .* --checkpoint \S+run\.pth",
    ):
        read_combined(tmp_path / "run.pth")
    write_combined(tmp_path / "c.pth", small_published_state())
    whole = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_combined(tmp_path / "c.pth")


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pth"
    write_combined(path, {"visual_proj.bias": torch.zeros(1)})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_combined(path, {"visual_proj.bias": torch.ones(1)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_a_run_becomes_a_file_in_full_precision(recipe: Recipe, tmp_path: Path) -> None:
    model, run = tiny_captioner(recipe), tmp_path / "run" / "checkpoints"
    trained = model.trained_state_dict()
    checkpoints.save_checkpoint(
        run / checkpoints.BEST_WEIGHTS, recipe, checkpoints.in_bfloat16(trained)
    )
    checkpoints.save_checkpoint(
        run / checkpoints.LATEST, recipe, {n: t + 1 for n, t in trained.items()}
    )
    checkpoints.save_checkpoint(run / checkpoints.BEST, recipe, trained)
    assert equal(combine_checkpoint(tmp_path / "run"), combined.to_combined(model, "it"))
    assert equal(combine_checkpoint(run / checkpoints.BEST), combined.to_combined(model, "it"))


def test_captioners_that_have_no_place_in_it_are_refused(
    tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, tiny_vit_dir: Path, tiny_bert_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"feature_scale\.mean \(32,\) has no place"):
        combined.to_combined(
            tiny_captioner(tiny_recipe(tiny_pvt_v2_dir, tiny_blip_dir, "projection")), "it"
        )
    for vision, text in ((tiny_vit_dir, tiny_blip_dir), (tiny_pvt_v2_dir, tiny_bert_dir)):
        with pytest.raises(CheckpointError, match="holds a PVT and BLIP's text decoder: it has"):
            combined.to_combined(tiny_captioner(tiny_recipe(vision, text, "projection")), "it")


def test_the_projection_starts_from_its_seed(
    tiny_pvt_v2_dir: Path, tiny_blip_dir: Path, state: Tensors
) -> None:
    names = str(tiny_pvt_v2_dir), str(tiny_blip_dir)
    assert equal(combine_models(*names, "linear", seed=0), state)
    other = combine_models(*names, "linear", seed=1)
    changed = {name for name in state if not torch.equal(state[name], other[name])}
    assert changed == {"visual_proj.weight", "visual_proj.bias"}
