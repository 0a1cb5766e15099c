"""Objectives: self-critical training, averaged weights, and a start from another run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from captioners import generated, toy_captioner
from logs import events, saved
from same import assert_same_checkpoints
from vlm_bridge.configuration import DecodeSettings, Recipe
from vlm_bridge.data_pipeline.caption_folder import open_data_folder
from vlm_bridge.errors import CheckpointError, ConfigurationError
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.data import TrainingData
from vlm_bridge.training_strategy.distributed import World
from vlm_bridge.training_strategy.objectives import SelfCritical, others_mean
from vlm_bridge.training_strategy.trainer import train
from vlm_bridge.training_strategy.validation import batch_loss

MakeRecipe = Callable[..., Recipe]
SCST = ("objective=scst", "scst_samples=4", "batch_size=24", "decode.max_new_tokens=8")


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start takes longer than these runs."""
    monkeypatch.setenv("PATH", "")


def test_samples_follow_the_models_own_distribution() -> None:
    """Each first token comes as often as it is likely; at a low temperature, the likeliest."""
    model = toy_captioner("prefix")
    features, start = torch.randn(2, 2, 4), model.language_model.start_id
    draw = DecodeSettings(num_beams=1, max_new_tokens=6, do_sample=True, seed=3)
    samples, _ = generated(model, features, [start], draw, 400)
    assert len(samples) == 800
    eos = model.language_model.eos_id
    assert not any(eos in ids for ids in samples)
    assert max(map(len, samples)) == 6
    with torch.no_grad():
        logits = model(torch.full((2, 1), start), model.image_inputs(features))[:, -1]
    for image, probabilities in enumerate(logits.softmax(-1)):
        drawn = [[*ids, eos][0] for ids in samples[image * 400 : (image + 1) * 400]]
        shares = torch.bincount(torch.tensor(drawn), minlength=7) / 400
        assert (shares - probabilities).abs().max() < 0.1
    cold, _ = generated(model, features, [start], draw.replace(temperature=1e-4), 4)
    greedy, _ = generated(model, features, [start], DecodeSettings(num_beams=1, max_new_tokens=6))
    assert cold == [ids for ids in greedy for _ in range(4)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=10", "scst_samples=4"),
        ("scst_samples=1", "equal to 2"),
        ("tokens_per_batch=80", "tokens_per_batch"),
        ("label_smoothing=0.1", "label_smoothing"),
        ("label_smoothing=1", "less than 1"),
        ("weight_averaging=1", "less than 1"),
    ],
)
def test_wrong_settings_are_refused(make_recipe: MakeRecipe, override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_recipe("run", *SCST, override)


def test_others_mean_leaves_each_sample_out() -> None:
    rewards = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    np.testing.assert_allclose(others_mean(rewards), [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]])


def test_the_loss_is_the_policy_gradient_of_a_reward_that_wants_an_end(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe("run", *SCST)
    model, world = build_captioner(recipe).eval(), World(torch.device("cpu"))
    data = TrainingData.open(open_data_folder(recipe.data_dir), model, recipe, world)
    critic = SelfCritical(model, recipe, data.format, data.train, nullcontext)
    (images, *_), *_ = data.steps(critic.load, 0, 0)
    batch = critic.captions(images, step=0, number=0)
    packed, weights = batch.packed, batch.weights
    assert weights is not None and not model.training
    assert (len(packed.image_indices), packed.num_captions) == (6, 24)
    loss = batch_loss(model, batch)
    torch.testing.assert_close(critic.loss(batch), loss.total)
    torch.testing.assert_close(loss.total, (weights * loss.token_losses).sum())
    # Every token of a caption has its weight; those of an image add up to nothing.
    segments = packed.segments.ravel()[packed.supervised]
    captions = 4 * (packed.supervised // packed.segments.shape[1]) + segments - 1
    of_caption = np.array([weights.numpy()[captions == n][0] for n in range(24)])
    np.testing.assert_allclose(of_caption[captions], weights)
    np.testing.assert_allclose(of_caption.reshape(6, 4).sum(1), 0, atol=1e-5)
    assert torch.equal(critic.captions(images, step=0, number=0).weights, weights)

    words = model.language_model.encode(data.train.images[0].captions[0])
    ended, cut = critic._rewards(np.array([0]), [[*words, data.format.eos_id], words], [{}])[0]
    assert ended > cut > 0


def test_training_raises_the_reward(make_recipe: MakeRecipe) -> None:
    # The decoder learns too: one that is frozen at random weights says nothing worth a reward.
    both = ("trainable.language_model.*=null", "validate_every=99 epochs", "num_epochs=8")
    train(start := make_recipe("start", *both))
    scst = (*SCST, f"start_from={start.checkpoint_dir}", "learning_rate=2e-3", "monitor=cider")
    recipe = make_recipe("scst", *both, *scst)
    result = train(recipe)
    assert result.steps == 32
    assert result.decoded is not None
    rewards = [event["reward"] for event in events(recipe, "train")]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.05


def test_a_run_continues_inside_an_epoch_to_the_bit(make_recipe: MakeRecipe) -> None:
    settings = ("weight_averaging=0.9", "save_every=1 step", "max_steps=4", "bridge.dropout=0.2")
    train(whole := make_recipe("whole", *SCST, *settings, "num_workers=2"))
    inside = Path(whole.checkpoint_dir) / checkpoints.STEP.format(2)
    assert checkpoints.load_checkpoint(inside)["training"]["progress"]["step_in_epoch"] == 2
    train(resumed := make_recipe("resumed", *SCST, *settings), resume=inside)
    ends = (Path(recipe.checkpoint_dir, checkpoints.LATEST) for recipe in (whole, resumed))
    assert_same_checkpoints(*ends)


def test_averaged_weights_are_what_is_validated_and_saved(make_recipe: MakeRecipe) -> None:
    train(plain := make_recipe("plain"))
    train(averaged := make_recipe("averaged", "weight_averaging=0.9"))
    one, other = saved(plain), saved(averaged)
    live = other["training"]["live_weights"]
    for name, tensor in live.items():  # averaging changes nothing of the training itself
        assert torch.equal(tensor, one["weights"][name]), name
    assert any(not torch.equal(live[name], other["weights"][name]) for name in live)
    losses = [events(recipe, "validation")[-1]["loss"] for recipe in (plain, averaged)]
    assert losses[0] != losses[1]
    best = saved(averaged, checkpoints.BEST_WEIGHTS)["weights"]
    for name in live:
        torch.testing.assert_close(best[name].float(), other["weights"][name], atol=1e-2, rtol=1e-2)


def test_a_run_starts_from_another_and_smoothing_is_of_the_training_loss_alone(
    make_recipe: MakeRecipe,
) -> None:
    train(first := make_recipe("first"))
    start = f"start_from={first.checkpoint_dir}/{checkpoints.LATEST}"
    still = (start, "learning_rate=0", "min_lr=0", "weight_decay=0")
    train(plain := make_recipe("plain", *still))
    train(smoothed := make_recipe("smoothed", *still, "label_smoothing=0.3"))
    assert events(plain, "validation")[-1]["loss"] == events(smoothed, "validation")[-1]["loss"]
    assert events(plain, "train")[0]["loss"] != events(smoothed, "train")[0]["loss"]
    for name, tensor in saved(first)["weights"].items():
        assert torch.equal(tensor, saved(plain)["weights"][name]), name
    assert saved(plain)["training"]["progress"]["step"] == 6
    with pytest.raises(CheckpointError, match=r"bridge\.num_queries"):
        train(make_recipe("other", start, "bridge.num_queries=4"))
