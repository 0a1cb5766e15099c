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
    text_width: int = 32,
    num_tokens: int = 6,
    cross: int = 24,
    **options,
):
    meta = options.pop("meta", False)
    recipe = recipe_from_dict({"bridge": {"kind": kind, **options}})
    text = TextShape(text_width, 6, num_key_value_heads=2, head_dim=8, cross_attention_width=cross)
    return build_bridge(recipe.bridge, vision_dim, text, num_tokens, meta=meta)


@pytest.mark.parametrize(
    ("sizes", "options", "parameters"),
    [
        ((1024, 2304), {"kind": "cross_attention"}, 66_092_544),
        # PVTv2-B1: the published 3.5 M; PVTv2-B0.
        ((512, 768, 144, 768), {"kind": "projection", "projection": "conv3x3"}, 3_539_712),
        ((256, 768, 144, 768), {"kind": "projection", "projection": "linear"}, 257 * 768),
        ((512, 768, 144, 768), {"kind": "projection", "projection": "mlp"}, (513 + 769) * 768),
    ],
)
def test_bridges_have_the_published_sizes(sizes: tuple, options: dict, parameters: int) -> None:
    options = dict(options)
    bridge = bridge_of(options.pop("kind"), *sizes, meta=True, **options)
    assert all(parameter.is_meta for parameter in bridge.parameters())
    assert sum(parameter.numel() for parameter in bridge.parameters()) == parameters


@torch.no_grad()
def test_untrained_bridges_leave_the_text_alone() -> None:
    text, features = torch.randn(2, 5, 32), torch.randn(2, 6, 12)
    assert torch.equal(bridge_of("cross_attention").eval().encode(features).edit(text), text)
    one, other = bridge_of("deep_prefix").encode(features).key_value_prefix.states
    # Keys differ, or no gradient would tell queries apart.
    assert not torch.allclose(one[:, 0], other[:, 0])
    assert not one[:, 1].any()
    prefix = bridge_of("prefix", text_width=64)
    prefix.set_output_scale(0.05)  # soft tokens start at the size of text embeddings
    soft = what_is_read(prefix.encode(torch.randn(4, 9, 12)))
    assert soft.std().item() == pytest.approx(0.05, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", BRIDGES)
def test_images_do_not_meet_and_dropout_acts_in_training_only(kind: str) -> None:
    features = torch.randn(3, 6, 12)
    for dropout in (0.0, 0.5):
        bridge = bridge_of(kind, dropout=dropout).eval()
        for parameter in bridge.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        together = what_is_read(bridge.encode(features))
        for index in range(3):
            alone = what_is_read(bridge.encode(features[index : index + 1]))
            torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)
        bridge.train()
        one, other = (what_is_read(bridge.encode(features)) for _ in range(2))
        assert torch.equal(one, other) == (dropout == 0)


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
        ("prefix", {"depth": 0}, "bridge.depth"),  # it would never look at the image
        ("cross_attention", {"enter_at_layer": 6}, "bridge.enter_at_layer=6 is beyond"),
        ("deep_prefix", {"enter_at_layer": 6}, "bridge.enter_at_layer=6 is beyond"),
    ],
)
def test_impossible_options_are_named(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace(".", r"\.")):
        bridge_of(kind, meta=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "mlp", "conv3x3"])
def test_a_projection_gives_one_encoder_state_a_token(projection: str) -> None:
    bridge = bridge_of("projection", num_tokens=9, projection=projection)
    features = torch.randn(2, 9, 12)
    states = bridge.encode(features).encoder_hidden_states
    assert states.shape == (2, 9, 24)
    # Which states feel a change of the first token: itself, or its neighbors on the 3x3 grid.
    changed = features.clone()
    changed[:, 0] += 1
    felt = (what_is_read(bridge.encode(changed)) - states).abs().amax((0, 2)) > 1e-6
    expected = {0, 1, 3, 4} if projection == "conv3x3" else {0}
    assert set(felt.nonzero().flatten().tolist()) == expected
    for num_tokens in (17, 145, 2) if projection == "conv3x3" else ():
        with pytest.raises(ConfigurationError, match=f"not {num_tokens} .a class token has no pl"):
            bridge_of("projection", num_tokens=num_tokens, projection="conv3x3")
