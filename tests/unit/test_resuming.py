"""Signals at any moment, `auto`, and what may change between the parts of a run."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logs import events, saved
from same import assert_same_checkpoints
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.errors import CheckpointError
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy import resume, validation
from vlm_bridge.training_strategy.resume import AUTO, Interrupted, find_run, resumed_recipe
from vlm_bridge.training_strategy.trainer import train

MakeRecipe = Callable[..., Recipe]
BY_STEPS = ("validate_every=2 steps", "num_decoded_images=3", "monitor=cider")


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vlm_bridge")


@pytest.fixture
def make_run(make_recipe: MakeRecipe) -> MakeRecipe:
    """Recipes of two epochs of three steps, with dropout and averaged weights."""
    common = (
        "num_epochs=2", "batch_size=16", "bridge.dropout=0.1", "weight_averaging=0.9",
        "num_validation_samples=1", "decode.max_new_tokens=4",
    )  # fmt: skip
    return lambda name, *overrides: make_recipe(name, *common, *overrides)


def assert_same_end(one: Recipe, other: Recipe) -> None:
    """Two runs ended with the same weights, optimizer, randomness and position."""
    for name in (checkpoints.LATEST, checkpoints.BEST):
        first, second = (Path(recipe.checkpoint_dir, name) for recipe in (one, other))
        assert_same_checkpoints(first, second)


@pytest.mark.parametrize(
    ("owner", "moment"), [(validation, "validate"), (validation.Validator, "decode")]
)
def test_a_validation_that_was_cut_off_is_done_again(
    make_run: MakeRecipe, monkeypatch: pytest.MonkeyPatch, owner: Any, moment: str
) -> None:
    whole, recipe = (make_run(name, *BY_STEPS) for name in ("whole", "run"))
    train(whole)

    def cut_off(*_: Any, **__: Any) -> Any:
        torch.rand(3)  # is taken back
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    progress = saved(recipe)["training"]["progress"]
    assert (progress["step"], progress["validated_step"]) == (2, 0)

    result = train(recipe, resume=AUTO)
    assert result.steps == 6
    assert result.decoded is not None
    assert_same_end(whole, recipe)
    for run in (whole, recipe):
        assert [event["step"] for event in events(run, "decoded")] == [2, 4, 6]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_ctrl_c_ends_at_once_but_no_echo_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    with resume.Interruption().watched() as interruption:
        signal.raise_signal(signal.SIGINT)
        now[0] += resume.ECHO_SECONDS / 2
        signal.raise_signal(signal.SIGINT)  # what a launcher passes on
        now[0] += resume.ECHO_SECONDS
        signal.raise_signal(signal.SIGTERM)  # what a container adds
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_auto_starts_anew_resumes_and_skips_damaged_checkpoints(
    make_run: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    whole, recipe = (make_run(name, "save_every=1 step") for name in ("whole", "run"))
    train(whole, resume=AUTO)
    assert f"no checkpoint to resume from in {whole.checkpoint_dir}" in caplog.text
    folder = shutil.copytree(whole.checkpoint_dir, recipe.checkpoint_dir)
    for name in (checkpoints.LATEST, checkpoints.BEST, "step_00000006.pth", "step_00000005.pth"):
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-1000])
    caplog.clear()
    train(recipe, resume=AUTO)
    broken = [line for line in caplog.messages if line.startswith("skipping damaged checkpoint: ")]
    assert len(broken) == 4
    assert all("is damaged" in line for line in broken)
    assert "step_00000004.pth at step 4 of 6" in caplog.text
    assert_same_end(whole, recipe)
    # Once more: there is nothing to do, and nothing is done.
    before = Path(folder, checkpoints.LATEST).read_bytes()
    caplog.clear()
    assert train(recipe, resume=AUTO).steps == 6
    assert "nothing is left to train" in caplog.messages
    assert Path(folder, checkpoints.LATEST).read_bytes() == before


def test_batches_by_tokens_resume_inside_an_epoch(make_run: MakeRecipe) -> None:
    changes = ("tokens_per_batch=60", "save_every=2 steps", "max_steps=6")
    whole, recipe = (make_run(name, *changes) for name in ("whole", "run"))
    train(whole)
    train(recipe, resume=Path(whole.checkpoint_dir, "step_00000002.pth"))
    assert_same_end(whole, recipe)


def test_a_run_that_stopped_early_stays_stopped(
    make_run: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    still = ("early_stopping_patience=1", "learning_rate=0", "min_lr=0", "num_epochs=4")
    recipe = make_run("run", *still)
    assert train(recipe).steps == 6
    assert "early stopping: no improvement in 1 validations" in caplog.messages
    assert train(recipe, resume=AUTO).steps == 6
    patient = override_recipe(recipe, ["early_stopping_patience=9"])
    assert train(patient, resume=AUTO, force=True).steps == 12


def test_a_folder_means_its_newest_checkpoint(make_run: MakeRecipe) -> None:
    recipe = make_run("run", "save_every=2 steps")
    train(recipe)
    folder = Path(recipe.checkpoint_dir)
    for given in (folder, folder.parent):
        assert find_run(given)[0] == folder / checkpoints.LATEST
    assert resumed_recipe(folder).resume_from_checkpoint == str(folder)
    assert find_run(folder / checkpoints.STEP.format(4))[0].name == checkpoints.STEP.format(4)
    for name in (checkpoints.LATEST, checkpoints.BEST):
        (folder / name).unlink()
    assert find_run(folder)[0] == folder / checkpoints.STEP.format(6)


def test_the_latest_is_saved_every_so_many_minutes(
    make_run: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    save = checkpoints.save_checkpoint

    def watched(path: Path, recipe: Recipe, weights: Any, training: Any = None, **named: Any):
        save(path, recipe, weights, training, **named)
        if path.name == checkpoints.LATEST:
            steps.append(training["progress"]["step"])

    monkeypatch.setattr(checkpoints, "save_checkpoint", watched)
    train(make_run("often", "save_every=0 minutes"))
    train(make_run("seldom", "save_every=9 minutes"))
    assert steps == [1, 2, 3, 4, 5, 6, 6, 3, 6, 6]


def test_other_settings_are_named_field_by_field_and_need_force(
    make_run: MakeRecipe,
    drawn_caption_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = make_run("run", "num_epochs=1", "save_every=2 steps")
    train(recipe)
    changed = shutil.copytree(drawn_caption_folder, tmp_path / "other")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "sha256:other"}))
    overrides = ["learning_rate=0.5", "num_epochs=2", "bridge.dropout=0.3", "num_workers=1"]
    other = override_recipe(recipe, [*overrides, f"data_dir={changed}"])
    inside = Path(recipe.checkpoint_dir) / checkpoints.STEP.format(2)
    with pytest.raises(CheckpointError) as caught:
        train(other, resume=inside)
    message = str(caught.value)
    changes = (
        "learning_rate=0.5, was 0.01", "num_epochs=2, was 1", "bridge.dropout=0.3, was 0.1",
        "data fingerprint=sha256:other, was sha256:",
    )  # fmt: skip
    assert all(change in message for change in changes)
    assert message.count(", was ") == 4
    assert "--force" in message and "\n" not in message

    caplog.clear()
    assert train(other, resume=inside, force=True).steps == 6
    assert "changed by --force: learning_rate=0.5, was 0.01" in caplog.messages


def test_a_state_that_no_training_saves_is_one_line(make_run: MakeRecipe) -> None:
    recipe = make_run("run", "max_steps=1")
    train(recipe)
    path = Path(recipe.checkpoint_dir) / checkpoints.LATEST
    sound = checkpoints.read_file(path)
    for changes in (
        {"progress": {"step": -1}},
        {"optimizer": {"param_groups": [{}], "state": []}},
        {"random_state": torch.zeros(3, dtype=torch.uint8)},
        {"early_stopping": [1]},
    ):
        torch.save({**sound, "training": {**sound["training"], **changes}}, path)
        expected = rf"{path} has a state that this training cannot continue .*start_from="
        with pytest.raises(CheckpointError, match=expected):
            train(recipe, resume=path)


def test_a_checkpoint_of_an_early_version_continues_behind_its_epoch(
    make_run: MakeRecipe,
) -> None:
    """There, a step at the end of an epoch was saved before the epoch counted."""
    whole, recipe = (make_run(name, "save_every=3 steps") for name in ("whole", "run"))
    train(whole)
    path = Path(whole.checkpoint_dir) / checkpoints.STEP.format(3)
    content = checkpoints.read_file(path)
    progress = content["training"]["progress"]
    del progress["validated_step"]
    progress |= {"epoch": 0, "step_in_epoch": 3, "owes_decoding": False}
    torch.save(content, path)
    assert train(recipe, resume=path).steps == 6
    assert_same_end(whole, recipe)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_of_an_interrupted_training_names_its_signal(number: int, code: int) -> None:
    assert Interrupted(number, Path("latest.pth")).exit_code == code
