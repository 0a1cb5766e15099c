"""Training in several processes: the same steps, the same validation, and one end for all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captioners import tiny_recipe
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints
from worlds import (
    ask_world,
    free_port,
    judgement_of,
    run_world,
    train_lines,
    train_otherwise,
    train_until,
    trained_weights,
)

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.timeout(900)  # four processes on a busy machine of one core


@pytest.fixture(scope="module")
def make_recipe(
    tmp_path_factory: pytest.TempPathFactory,
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
) -> MakeRecipe:
    """Recipes of 24 images in batches of 5 rows, which neither 2 nor 4 divide: 5 steps an epoch, the last of 4 rows."""

    def make(*overrides: str, bridge: str = "prefix") -> Recipe:
        folder = tmp_path_factory.mktemp("run")
        recipe = tiny_recipe(
            tiny_vit_dir,
            tiny_llama_dir,
            bridge,
            data_dir=str(drawn_caption_folder),
            checkpoint_dir=str(folder / "checkpoints"),
            log_dir=str(folder / "logs"),
            feature_cache=str(tmp_path_factory.getbasetemp() / "features"),
            device="cpu",
            learning_rate=5e-3,
            num_epochs=10,
            validate_every="5 epochs",
            batch_size=10,
            captions_per_image=2,
            early_stopping_patience=None,
            log_every_n_steps=1,
            save_every="10 steps",
            decode={"num_beams": 2, "max_new_tokens": 5},
        )
        return override_recipe(recipe, overrides)

    return make


@pytest.fixture(scope="module")
def runs(make_recipe: MakeRecipe) -> dict[int, Recipe]:
    """What 1, 2 and 4 processes were told to train, and have trained."""
    recipes = {size: make_recipe() for size in (1, 2, 4)}
    for size, recipe in recipes.items():
        lines = trained(recipe, size)
        assert any(f", {size} processes" in line for line in lines) == (size > 1)
    return recipes


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of ``size`` processes returned."""
    outcomes = run_world(size, work, *arguments)
    assert [outcome.error for outcome in outcomes] == [None] * size
    return [outcome.returned for outcome in outcomes]


def trained(recipe: Recipe, size: int, resume: Path | None = None) -> list[str]:
    """What the first of ``size`` processes said; the others said nothing."""
    first, *others = together(size, train_lines, recipe, resume)
    assert others == [[]] * (size - 1)
    return first


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    history = Path(recipe.log_dir, "history.jsonl").read_text(encoding="utf-8")
    return [event for event in map(json.loads, history.splitlines()) if event["event"] == kind]


def step(recipe: Recipe, number: int) -> Path:
    return Path(recipe.checkpoint_dir, checkpoints.STEP.format(number))


def assert_same_numbers(
    some: list[dict[str, Any]], others: list[dict[str, Any]], *names: str
) -> None:
    assert [event["step"] for event in some] == [event["step"] for event in others]
    for event, other in zip(some, others, strict=True):
        for name in names:
            assert event[name] == pytest.approx(other[name], abs=1e-5)


def test_what_processes_tell_each_other() -> None:
    answers = together(3, ask_world)
    assert [list(answer.pop("share")) for answer in answers] == [[0, 3], [1, 4], [2]]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "interleaved": list("abcde"),
        "sum": [3, 3],
        "largest": 20,
        "gathered": ["0", "1", "2"],
        "from_first": {"made by": 0},
        "gradient": [1, 1, 1],
        "unused": None,
        "loss": 3,
        "copied": [[0, 0], [0, 0]],
    }


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_takes_the_same_steps(runs: dict[int, Recipe], size: int) -> None:
    alone = events(runs[1], "train")
    assert len(alone) == 50
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.02
    assert_same_numbers(alone, events(runs[size], "train"), "loss", "learning_rate")
    validations = (events(runs[some], "validation") for some in (1, size))
    assert_same_numbers(*validations, "loss", "visual_gain")

    # One process wrote, once.
    kept = {step(runs[size], number).name for number in (30, 40, 50)}
    names = {path.name for path in Path(runs[size].checkpoint_dir).iterdir()}
    assert names == {checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS, *kept}
    assert len(list(Path(runs[size].log_dir).glob("events.out.tfevents.*"))) == 1


def test_any_number_of_processes_judges_the_same_to_the_bit(runs: dict[int, Recipe]) -> None:
    of_run = runs[1], Path(runs[1].checkpoint_dir)
    (judgement,) = together(1, judgement_of, *of_run)
    for size in (2, 4):
        assert together(size, judgement_of, *of_run) == [judgement] * size


def test_two_processes_continue_as_four_and_these_as_one(
    runs: dict[int, Recipe], make_recipe: MakeRecipe
) -> None:
    as_four, as_one = make_recipe(), make_recipe()
    trained(as_four, 4, step(runs[2], 30))
    trained(as_one, 1, step(as_four, 40))
    alone = events(runs[1], "train")
    assert_same_numbers(alone[30:], events(as_four, "train"), "loss", "learning_rate")
    assert_same_numbers(alone[40:], events(as_one, "train"), "loss", "learning_rate")


@pytest.mark.parametrize("by", ["batch_size=4", "tokens_per_batch=60"])
def test_micro_batches_are_shared_and_some_shares_are_empty(
    make_recipe: MakeRecipe, by: str
) -> None:
    alone, of_three = (
        make_recipe(by, "gradient_accumulation_steps=3", "max_steps=6") for _ in range(2)
    )
    trained(alone, 1)
    trained(of_three, 3)
    told, told_together = events(alone, "train"), events(of_three, "train")
    assert_same_numbers(told, told_together, "loss", "gradient_norm")


def test_processes_drop_out_differently_and_resume_to_the_bit(make_recipe: MakeRecipe) -> None:
    settings = (
        "bridge.dropout=0.3",
        "num_epochs=2",
        "save_every=2 steps",
        "gradient_accumulation_steps=2",
    )
    whole, resumed = make_recipe(*settings), make_recipe(*settings)
    first, second = together(2, trained_weights, whole)
    assert not set(first["seeds"]) & set(second["seeds"])
    assert same_weights(first, second)
    assert same_weights(first, together(2, trained_weights, resumed, step(whole, 2))[1])


def test_averaged_weights_and_sampled_captions(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        "objective=scst",
        "scst_samples=2",
        "batch_size=6",
        "weight_averaging=0.9",
        "max_steps=3",
        "monitor=cider",
    )
    first, second = together(2, trained_weights, recipe)
    assert same_weights(first, second)
    told = events(recipe, "train")
    assert len(told) == 3
    assert all(1 <= event["sample_length"] <= 5 for event in told)
    assert checkpoints.load_checkpoint(Path(recipe.checkpoint_dir, checkpoints.LATEST))["training"][
        "live_weights"
    ]


def test_caches_are_those_of_one_process(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    contents = []
    for size in (1, 3):
        caches = tmp_path / f"caches-{size}"
        trained(make_recipe(f"feature_cache={caches}", "max_steps=2"), size)
        files = caches.rglob("features.bin")
        contents.append({path.relative_to(caches): path.read_bytes() for path in files})
    assert len(contents[0]) == 2  # of two splits
    assert contents[0] == contents[1]


def test_what_fails_in_one_process_fails_in_all(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    outcomes = run_world(3, train_until, recipe, 1, 3, "error")
    own, *others = (outcomes[rank].error or "" for rank in (1, 0, 2))
    assert own == "DataError: image 7 is a fake"
    assert all(
        error.startswith("PeerFailed: another process of this run is gone") for error in others
    )
    first, killed = run_world(2, train_until, recipe, 1, 3, "kill")
    assert (first.error or "").startswith("PeerFailed: another process of this run is gone")
    assert killed.error == "it ended without a word"


def test_a_process_with_another_recipe_or_other_data_is_refused(
    make_recipe: MakeRecipe, drawn_caption_folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe("max_steps=1")
    _, other = run_world(2, train_otherwise, recipe, 1, "learning_rate=0.5", "num_workers=1")
    assert other.error is not None
    assert "process 1 of 2 has learning_rate=0.5, not 0.005 as the first one" in other.error

    elsewhere = shutil.copytree(
        drawn_caption_folder, tmp_path / "data", ignore=shutil.ignore_patterns(".*")
    )
    next((elsewhere / "train" / "images").iterdir()).write_bytes(b"no picture")
    lenient = override_recipe(recipe, ["max_bad_samples=0.5"])
    _, other = run_world(2, train_otherwise, lenient, 1, f"data_dir={elsewhere}")
    assert other.error is not None
    assert "captions in use" in other.error
    assert not Path(recipe.checkpoint_dir).exists()


def test_a_signal_to_one_process_ends_all_in_the_same_step(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("num_workers=2")
    latest = Path(recipe.checkpoint_dir, checkpoints.LATEST)
    outcomes = run_world(2, train_until, recipe, 1, 3, "signal")
    assert [outcome.error for outcome in outcomes] == [
        f"Interrupted: interrupted; saved {latest}"
    ] * 2
    assert checkpoints.load_checkpoint(latest)["training"]["progress"]["step"] == 4


def test_two_machines_train_as_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Imitated by two launchers, each with a process of its own, that meet at an address."""
    alone, of_two = make_recipe("max_steps=4"), make_recipe("max_steps=4")
    trained(alone, 1)
    config = tmp_path / "recipe.yaml"
    config.write_text(of_two.to_yaml(), encoding="utf-8")
    meet_at = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        *meet_at,
    ]
    command = ["-m", "vlm_bridge", "train", "--config", str(config)]
    launchers = [
        subprocess.Popen(
            [*launch, "--node-rank", str(machine), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in (0, 1)
    ]
    try:
        (said, complaints), (said_elsewhere, _) = (
            run.communicate(timeout=600) for run in launchers
        )
    finally:
        for launcher in launchers:
            launcher.terminate()  # and with it its process
    assert [launcher.returncode for launcher in launchers] == [0, 0], complaints
    assert "done: 4 steps" in said
    assert said_elsewhere == ""
    assert_same_numbers(events(alone, "train"), events(of_two, "train"), "loss", "learning_rate")


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights, others = one["weights"], other["weights"]
    return weights.keys() == others.keys() and all(
        (weights[name] == others[name]).all() for name in weights
    )
