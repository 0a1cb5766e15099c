"""Checkpoints of the original project: names, numbers and function, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captioners import random_features, randomise, tiny_captioner, tiny_recipe
from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import Recipe, override_recipe, recipe_from_dict
from vlm_bridge.errors import CheckpointError
from vlm_bridge.formats import dinov2_gemma
from vlm_bridge.model_architecture.bridges import TextShape, build_bridge
from vlm_bridge.model_architecture.captioner import CaptionModel
from vlm_bridge.training_strategy import checkpoint as checkpoints

HEADS = 4


class OriginalBlock(nn.Module):
    """The published block as its checkpoints describe it, with attention written out."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.vision_projection = nn.Linear(vision_dim, text_dim)
        self.ln1, self.ln2 = nn.LayerNorm(text_dim), nn.LayerNorm(text_dim)
        self.cross_attention = nn.ModuleDict(
            {f"w_{n}": nn.Linear(text_dim, text_dim) for n in "qkvo"}
        )
        self.ffn = nn.Sequential(
            nn.Linear(text_dim, 4 * text_dim),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * text_dim, text_dim),
            nn.Dropout(0.1),
        )

    def forward(self, features_bnd: torch.Tensor, text_bth: torch.Tensor) -> torch.Tensor:
        seen = self.vision_projection(features_bnd)
        project = self.cross_attention
        queries, keys, values = (
            project[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, x in (("w_q", self.ln1(text_bth)), ("w_k", seen), ("w_v", seen))
        )
        scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
        attended = (F.softmax(scores, dim=-1) @ values).transpose(1, 2).flatten(2)
        text_bth = text_bth + project["w_o"](attended)
        return text_bth + self.ffn(self.ln2(text_bth))

    def checkpoint(self) -> dict[str, Any]:
        """What the original project saves after an epoch."""
        return {
            "epoch": 3,
            "model_state_dict": {
                f"bridge_module.{name}": t for name, t in self.state_dict().items()
            },
            "optimizer_state_dict": torch.optim.AdamW(self.parameters()).state_dict(),
            "best_val_loss": 2.5,
            "config": {"learning_rate": 1e-5, "num_epochs": 12, "device": None},
            "scheduler_state_dict": {"T_max": 10, "last_epoch": 3},
            "early_stopping_counter": 1,
        }


def original_block(vision_dim: int = 32, text_dim: int = 32) -> OriginalBlock:
    block = OriginalBlock(vision_dim, text_dim).eval()
    randomise(block)
    return block


def published(recipe: Recipe) -> Recipe:
    return override_recipe(
        recipe, [f"bridge.num_heads={HEADS}", "bridge.standardize_features=false"]
    )


@pytest.fixture
def recipe(tiny_dinov2_dir: Path, tiny_gemma2_dir: Path) -> Recipe:
    return published(tiny_recipe(tiny_dinov2_dir, tiny_gemma2_dir, "cross_attention"))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "original" / "latest_checkpoint.pth"
    path.parent.mkdir()
    torch.save(original_block().checkpoint(), path)
    return path


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items()
    )


def test_the_published_bridge_has_the_published_names_and_size() -> None:
    config = recipe_from_dict({"bridge": {"kind": "cross_attention"}}).bridge
    bridge = build_bridge(config, 1024, TextShape(2304, 26, 4, 256), 257, meta=True)
    weights = {f"bridge.{name}": tensor for name, tensor in bridge.state_dict().items()}
    state = dinov2_gemma.to_original(weights, "it")
    with torch.device("meta"):
        published = OriginalBlock(1024, 2304).checkpoint()["model_state_dict"]
    assert {name: t.shape for name, t in state.items()} == {
        name: t.shape for name, t in published.items()
    }
    assert sum(tensor.numel() for tensor in state.values()) == 66_092_544
    half = checkpoints.stored_as(weights, "bfloat16")
    assert sum(tensor.numel() * tensor.element_size() for tensor in half.values()) == 132_185_088


def original_logits(
    block: OriginalBlock, model: CaptionModel, features: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The published formula: the block edits embeddings, and Gemma multiplies by sqrt(H) after."""
    causal_lm: Any = model.language_model.causal_lm
    rows = causal_lm.get_input_embeddings().weight[ids]
    scale = rows.shape[-1] ** 0.5 if causal_lm.config.model_type == "gemma2" else 1.0
    return causal_lm(inputs_embeds=scale * block(features, rows)).logits


@pytest.mark.parametrize("language_model", ["gemma2", "llama"])
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_published_formula(
    language_model: str, tiny_dinov2_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    decoder = request.getfixturevalue(f"tiny_{language_model}_dir")
    recipe = published(tiny_recipe(tiny_dinov2_dir, decoder, "cross_attention"))
    model = tiny_captioner(recipe)
    features = random_features(model, 2)
    weights = {"weights": model.trained_state_dict()}
    dinov2_gemma.save_original(tmp_path / "c.pth", recipe, weights, "it")
    state = torch.load(tmp_path / "c.pth", weights_only=True)["model_state_dict"]
    block = OriginalBlock(32, 32).eval()
    block.load_state_dict({n.removeprefix("bridge_module."): x for n, x in state.items()})

    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = original_logits(block, model, features, ids)
    image = model.image_inputs(features)
    torch.testing.assert_close(model(ids, image), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, model.language_model.causal_lm(ids).logits, atol=0.1)

    labels = ids[:, 1:]
    losses = model.caption_loss(ids[:, :-1], labels, torch.ones_like(labels), image).token_losses
    by_torch = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels.flatten())
    assert losses.mean().item() == pytest.approx(by_torch.item(), rel=1e-5)


def test_a_checkpoint_from_before_embeddings_were_edited_unscaled_is_refused(
    recipe: Recipe, tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Where a model scales its embeddings, such weights mean something else."""
    llama = tiny_recipe(tiny_vit_dir, tiny_llama_dir, "cross_attention")
    for name, of in (("gemma2", recipe), ("llama", llama)):
        model = tiny_captioner(of)
        path, mean = tmp_path / f"{name}.pth", tmp_path / f"{name}-mean.pth"
        checkpoints.save_checkpoint(path, of, model.trained_state_dict(), format_version=1)
        checkpoints.save_average(mean, [path, path])  # of the same version
        for old in (path, mean):
            content = checkpoints.load_checkpoint(old)
            if name == "llama":
                checkpoints.restore(model, content, old)
                continue
            with pytest.raises(CheckpointError, match=r"had scaled them.*train it again"):
                checkpoints.restore(model, content, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_round_trips_are_bit_equal(recipe: Recipe, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        name: t.to(dtype) for name, t in original_block().checkpoint()["model_state_dict"].items()
    }
    weights = dinov2_gemma.from_original(state, "it")
    assert equal(dinov2_gemma.to_original(weights, "it"), state)

    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    checkpoints.save_checkpoint(ours, recipe, weights)
    dinov2_gemma.save_original(theirs, recipe, checkpoints.load_checkpoint(ours), ours)
    published = torch.load(theirs, weights_only=True)
    assert equal(published["model_state_dict"], state)
    assert published["config"]["learning_rate"] == recipe.learning_rate
    assert equal(checkpoints.load_checkpoint(theirs)["weights"], weights)
    # What we wrote knows its recipe, whatever the layout.
    assert checkpoints.recipe_of(checkpoints.load_checkpoint(theirs), theirs) == recipe


def test_an_original_checkpoint_captions_with_a_recipe(original: Path, recipe: Recipe) -> None:
    model = Captioner.from_pretrained(original, "cpu", recipe=recipe).model
    state = torch.load(original, weights_only=True)["model_state_dict"]
    assert equal(dinov2_gemma.to_original(model.trained_state_dict(), "it"), state)
    with pytest.raises(CheckpointError, match=r"names no recipe: convert it once with `vlm-bridge"):
        Captioner.from_pretrained(original, "cpu")


def test_a_recipe_of_another_bridge_is_refused_by_name(original: Path, recipe: Recipe) -> None:
    names = Path(recipe.vision_encoder.name), Path(recipe.language_model.name)
    standardized, narrow = (
        override_recipe(recipe, [f"bridge.{change}"])
        for change in ("standardize_features=true", "feed_forward_multiplier=2")
    )
    for other, named in (
        (standardized, "bridge.standardize_features=False, wanted is True"),
        (narrow, "bridge.feed_forward_multiplier=4, wanted is 2"),
        (tiny_recipe(*names, "prefix"), r"bridge\.kind=cross_attention, wanted is prefix"),
    ):
        with pytest.raises(CheckpointError, match=named):
            Captioner.from_pretrained(original, "cpu", recipe=other)
    wide = original_block(vision_dim=48, text_dim=64).checkpoint()
    torch.save(wide, path := original.with_name("wide.pth"))
    with pytest.raises(CheckpointError, match=r"another architecture: bridge\.\S+ is \(64,\)"):
        Captioner.from_pretrained(path, "cpu", recipe=recipe)


def test_other_blocks_are_refused_by_name(tmp_path: Path) -> None:
    content = original_block().checkpoint()
    state = content["model_state_dict"]
    del state["bridge_module.ln2.bias"]
    for name, says in (
        (
            "blocks.0.ln.weight",
            r"ln2\.bias is missing; bridge_module\.blocks\.0\.ln\.weight is unkn",
        ),
        (
            "bridge_blocks.0.self_attention.w_q.weight",
            r"Bridge-Lite.* 2dd2199.*self-attention reads",
        ),
    ):
        state[f"bridge_module.{name}"] = torch.ones(2)
        torch.save(content, tmp_path / "later.pth")
        with pytest.raises(CheckpointError, match=says):
            checkpoints.load_checkpoint(tmp_path / "later.pth")


def test_other_bridges_are_not_written(
    tiny_vit_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for bridge in ("prefix", "cross_attention"):  # the latter with feature statistics
        recipe = tiny_recipe(tiny_vit_dir, tiny_llama_dir, bridge)
        weights = {"weights": tiny_captioner(recipe).trained_state_dict()}
        with pytest.raises(CheckpointError, match=r"in the original layout.* is (missing|unknown)"):
            dinov2_gemma.save_original(tmp_path / "c.pth", recipe, weights, "it")
    assert not list(tmp_path.iterdir())

    below = published(recipe)
    above = override_recipe(below, ["bridge.enter_at_layer=1"])
    content = {"weights": tiny_captioner(below).trained_state_dict()}
    with pytest.raises(CheckpointError, match=r"original layout.* bridge\.enter_at_layer=1"):
        dinov2_gemma.save_original(tmp_path / "above.pth", above, content, "it")
    dinov2_gemma.save_original(tmp_path / "below.pth", below, content, "it")
    content = checkpoints.load_checkpoint(tmp_path / "below.pth")
    content.pop("recipe")  # which the original does not write
    with pytest.raises(CheckpointError, match=r"bridge\.enter_at_layer"):
        checkpoints.check_architecture(content, above, "it")
