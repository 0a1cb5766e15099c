"""Bridges by themselves: the published size, the promised length, one position at a time."""

from __future__ import annotations

import pytest
import torch

from captioners import what_is_read
from vlm_bridge.configuration import recipe_from_dict
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture.bridges import BRIDGES, TextShape, build_bridge


def bridge_of(
    kind: str,
    vision_dim: int = 12,
    text_dim: int = 32,
    num_tokens: int = 6,
    *,
    meta: bool = False,
    **options,
):
    recipe = recipe_from_dict({"bridge": {"kind": kind, **options}})
    text = TextShape(
        text_dim, num_layers=6, num_key_value_heads=2, head_dim=8, cross_attention_width=24
    )
    return build_bridge(recipe.bridge, vision_dim, text, num_tokens, meta=meta)


def test_cross_attention_has_the_published_number_of_parameters() -> None:
    bridge = bridge_of("cross_attention", 1024, 2304, meta=True)
    assert all(parameter.is_meta for parameter in bridge.parameters())
    assert sum(parameter.numel() for parameter in bridge.parameters()) == 66_092_544


@torch.no_grad()
def test_cross_attention_starts_as_the_identity() -> None:
    bridge = bridge_of("cross_attention").eval()
    text = torch.randn(2, 5, 32)
    edit = bridge.encode(torch.randn(2, 7, 12)).edit
    assert edit is not None
    assert torch.equal(edit(text), text)


@torch.no_grad()
@pytest.mark.parametrize("kind", BRIDGES)
def test_images_of_a_batch_do_not_meet(kind: str) -> None:
    bridge = bridge_of(kind).eval()
    features = torch.randn(3, 6, 12)
    together = what_is_read(bridge.encode(features))
    for index in range(3):
        alone = what_is_read(bridge.encode(features[index : index + 1]))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", BRIDGES)
def test_dropout_acts_in_training_only(kind: str, dropout: float) -> None:
    bridge = bridge_of(kind, dropout=dropout)
    for parameter in bridge.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    features = torch.randn(1, 6, 12)

    def outputs() -> torch.Tensor:
        return what_is_read(bridge.encode(features))

    assert torch.equal(bridge.eval() and outputs(), outputs())
    bridge.train()
    assert torch.equal(outputs(), outputs()) == (dropout == 0)


@torch.no_grad()
def test_an_untrained_deep_prefix_adds_no_values() -> None:
    one, other = bridge_of("deep_prefix").encode(torch.randn(2, 6, 12)).key_value_prefix.states
    # Keys differ, or no gradient would tell queries apart.
    assert not torch.allclose(one[:, 0], other[:, 0])
    assert not one[:, 1].any()


@torch.no_grad()
def test_prefix_starts_at_the_size_of_text_embeddings() -> None:
    bridge = bridge_of("prefix", text_dim=64)
    bridge.set_output_scale(0.05)
    assert what_is_read(bridge.encode(torch.randn(4, 9, 12))).std().item() == pytest.approx(
        0.05, rel=0.1
    )


@torch.no_grad()
def test_only_position_embeddings_tell_the_prefix_where_things_are() -> None:
    features = torch.randn(1, 6, 12)
    both = torch.cat((features, features.flip(1)))
    one, mirrored = what_is_read(bridge_of("prefix", position_embeddings=False).encode(both))
    torch.testing.assert_close(one, mirrored, atol=1e-5, rtol=1e-5)
    one, mirrored = what_is_read(bridge_of("prefix", position_embeddings=True).encode(both))
    assert not torch.allclose(one, mirrored, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cross_attention", {"num_heads": 5}, "bridge.num_heads=5 does not divide"),
        ("prefix", {"num_heads": 5}, "bridge.num_heads=5 does not divide"),
        ("prefix", {"num_heads": 0}, "bridge.num_heads"),
        ("cross_attention", {"num_heads": 0}, "bridge.num_heads"),
        ("prefix", {"num_queries": 0}, "bridge.num_queries"),
        ("prefix", {"depth": 0}, "bridge.depth"),  # it would never look at the image
        ("prefix", {"width": -8}, "bridge.width"),
        ("cross_attention", {"feed_forward_multiplier": 0}, "bridge.feed_forward_multiplier"),
        ("prefix", {"dropout": 1.0}, "bridge.dropout"),
        ("cross_attention", {"dropout": -0.1}, "bridge.dropout"),
        ("projection", {"dropout": 1.0}, "bridge.dropout"),
    ],
)
def test_impossible_options_are_named(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace(".", r"\.")):
        bridge_of(kind, meta=True, **options)


def projection_of(
    vision_dim: int, width: int, num_tokens: int, projection: str, *, meta: bool = True
):
    recipe = recipe_from_dict({"bridge": {"kind": "projection", "projection": projection}})
    text = TextShape(768, 12, 12, 64, cross_attention_width=width)
    return build_bridge(recipe.bridge, vision_dim, text, num_tokens, meta=meta)


@pytest.mark.parametrize(
    ("projection", "vision_dim", "parameters"),
    [
        ("conv3x3", 512, 3_539_712),  # PVTv2-B1: the published 3.5 M
        ("linear", 256, 256 * 768 + 768),  # PVTv2-B0
        ("mlp", 512, 512 * 768 + 768 + 768 * 768 + 768),
    ],
)
def test_projections_have_the_published_sizes(
    projection: str, vision_dim: int, parameters: int
) -> None:
    bridge = projection_of(vision_dim, 768, 144, projection)
    assert sum(parameter.numel() for parameter in bridge.parameters()) == parameters
    if projection == "linear":
        assert bridge.projection.weight.shape == (768, 256)
        assert bridge.projection.bias.shape == (768,)


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "mlp", "conv3x3"])
def test_a_projection_gives_one_encoder_state_a_token(projection: str) -> None:
    bridge = projection_of(12, 24, 9, projection, meta=False)
    features = torch.randn(2, 9, 12)
    inputs = bridge.encode(features)
    states = inputs.encoder_hidden_states
    assert states.shape == (2, 9, 24)
    assert inputs.soft_tokens is inputs.key_value_prefix is None
    # Which states feel a change of the first token: itself, or its neighbours on the 3x3 grid.
    changed = features.clone()
    changed[:, 0] += 1
    felt = (what_is_read(bridge.encode(changed)) - states).abs().amax((0, 2)) > 1e-6
    expected = {0, 1, 3, 4} if projection == "conv3x3" else {0}
    assert set(felt.nonzero().flatten().tolist()) == expected


@torch.no_grad()
def test_the_convolution_is_that_of_the_feature_map() -> None:
    bridge = projection_of(4, 6, 16, "conv3x3", meta=False)
    grid = torch.randn(2, 4, 4, 4)
    convolution = torch.nn.Conv2d(4, 6, 3, padding=1)
    convolution.load_state_dict(bridge.projection.state_dict())
    expected = convolution(grid)
    found = what_is_read(bridge.encode(grid.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(found.transpose(1, 2).unflatten(2, (4, 4)), expected)


def test_the_convolution_refuses_what_is_no_grid() -> None:
    for num_tokens in (17, 145, 2):
        with pytest.raises(
            ConfigurationError, match=f"not {num_tokens} .a class token has no place on a grid."
        ):
            projection_of(12, 24, num_tokens, "conv3x3")
