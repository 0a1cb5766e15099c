"""Training in several processes: the same steps, the same validation, and one end for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captioners import places_of_run, tiny_recipe
from logs import events
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints
from worlds import (
    ask_world,
    judgement_of,
    run_world,
    train_until,
    trained_weights,
)

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.timeout(900)  # several processes on a busy machine of one core
GONE = "PeerFailed: another process of this run is gone"


@pytest.fixture(scope="module")
def make_recipe(
    tmp_path_factory: pytest.TempPathFactory,
    drawn_caption_folder: Path,
    tiny_vit_dir: Path,
    tiny_llama_dir: Path,
) -> MakeRecipe:
    """24 images in batches of 5 rows, which 2 does not divide: 5 steps an epoch, the last of 4."""
    runs = tmp_path_factory.mktemp("runs")

    def make(*overrides: str) -> Recipe:
        places = places_of_run(runs, tmp_path_factory.mktemp("run").name, drawn_caption_folder)
        recipe = tiny_recipe(
            tiny_vit_dir, tiny_llama_dir, **places, device="cpu", learning_rate=1e-2, num_epochs=4,
            validate_every="2 epochs", batch_size=10, captions_per_image=2,
            early_stopping_patience=None, log_every_n_steps=1, save_every="5 steps",
            decode={"num_beams": 2, "max_new_tokens": 5},
        )  # fmt: skip
        return override_recipe(recipe, overrides)

    return make


@pytest.fixture(scope="module")
def runs(make_recipe: MakeRecipe) -> dict[int, Recipe]:
    """Recipes that 1 and 3 processes have trained."""
    recipes = {size: make_recipe() for size in (1, 3)}
    for size, recipe in recipes.items():
        trained(recipe, size)
    return recipes


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the answers of ``size`` processes."""
    outcomes = run_world(size, work, *arguments)
    assert [outcome.error for outcome in outcomes] == [None] * size
    return [outcome.returned for outcome in outcomes]


def trained(recipe: Recipe, size: int, resume: Path | None = None) -> list[dict[str, Any]]:
    """Train in ``size`` processes, which end with the same weights."""
    first, *others = results = together(size, trained_weights, recipe, resume)
    assert any(f", {size} processes" in line for line in first["lines"]) == (size > 1)
    assert all(same_weights(first, other) for other in others)
    return results


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    others = other["weights"]
    return all((tensor == others[name]).all() for name, tensor in one["weights"].items())


def step(recipe: Recipe, number: int) -> Path:
    return Path(recipe.checkpoint_dir, checkpoints.STEP.format(number))


def assert_same_numbers(
    some: list[dict[str, Any]], others: list[dict[str, Any]], *names: str
) -> None:
    assert [event["step"] for event in some] == [event["step"] for event in others]
    for event, other in zip(some, others, strict=True):
        for name in names:
            assert event[name] == pytest.approx(other[name], abs=1e-5)


def test_processes_exchange_numbers_objects_and_gradients() -> None:
    answers = together(3, ask_world)
    assert [list(answer.pop("share")) for answer in answers] == [[0, 3], [1, 4], [2]]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "interleaved": list("abcde"),
        "sum": [3, 3],
        "gathered": ["0", "1", "2"],
        "from_first": {"made by": 0},
        "gradient": [1, 1, 1],
        "unused": None,
        "loss": 3,
        "copied": [[0, 0], [0, 0]],
    }


def test_any_number_of_processes_takes_the_same_steps(runs: dict[int, Recipe]) -> None:
    alone, of_three = (events(runs[size], "train") for size in (1, 3))
    assert len(alone) == 20
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.02
    assert_same_numbers(alone, of_three, "loss", "learning_rate")
    validations = (events(runs[size], "validation") for size in (1, 3))
    assert_same_numbers(*validations, "loss", "visual_gain")

    # One process wrote, once.
    kept = {step(runs[3], number).name for number in (10, 15, 20)}
    names = {path.name for path in Path(runs[3].checkpoint_dir).iterdir()}
    assert names == {checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS, *kept}
    assert len(list(Path(runs[3].log_dir).glob("events.out.tfevents.*"))) == 1


def test_any_number_of_processes_judges_the_same_to_the_bit(runs: dict[int, Recipe]) -> None:
    of_run = runs[1], Path(runs[1].checkpoint_dir)
    (judgement,) = together(1, judgement_of, *of_run)
    assert together(2, judgement_of, *of_run) == [judgement] * 2


def test_three_processes_continue_as_two_and_these_as_one(
    runs: dict[int, Recipe], make_recipe: MakeRecipe
) -> None:
    as_two, as_one = make_recipe(), make_recipe()
    trained(as_two, 2, step(runs[3], 10))
    trained(as_one, 1, step(as_two, 15))
    alone = events(runs[1], "train")
    assert_same_numbers(alone[10:], events(as_two, "train"), "loss", "learning_rate")
    assert_same_numbers(alone[15:], events(as_one, "train"), "loss", "learning_rate")


@pytest.mark.parametrize("by", ["batch_size=4", "tokens_per_batch=60"])
def test_micro_batches_are_shared_and_some_shares_are_empty(
    make_recipe: MakeRecipe, by: str
) -> None:
    settings = (by, "gradient_accumulation_steps=3", "max_steps=3")
    alone, of_three = make_recipe(*settings), make_recipe(*settings)
    trained(alone, 1)
    trained(of_three, 3)
    assert_same_numbers(events(alone, "train"), events(of_three, "train"), "loss", "gradient_norm")


def test_processes_drop_out_differently_and_resume_to_the_bit(make_recipe: MakeRecipe) -> None:
    settings = ("bridge.dropout=0.3", "num_epochs=1", "save_every=2 steps")
    whole, resumed = make_recipe(*settings), make_recipe(*settings)
    first, second = trained(whole, 2)
    assert not set(first["seeds"]) & set(second["seeds"])
    assert same_weights(first, trained(resumed, 2, step(whole, 2))[1])


def test_averaged_weights_and_sampled_captions(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        "objective=scst", "scst_samples=2", "batch_size=6", "weight_averaging=0.9", "max_steps=3",
        "monitor=cider",
    )  # fmt: skip
    trained(recipe, 2)
    rewards = [event["reward"] for event in events(recipe, "train")]
    assert len(rewards) == 3 and all(0 <= reward <= 10 for reward in rewards)
    latest = checkpoints.load_checkpoint(Path(recipe.checkpoint_dir, checkpoints.LATEST))
    assert latest["training"]["live_weights"]


def test_a_failure_or_a_signal_in_one_process_ends_all(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("num_workers=2")
    own, *others = (run_world(3, train_until, recipe, 1, 3, "error")[rank] for rank in (1, 0, 2))
    assert own.error == "DataError: image 7 is a fake"
    assert all((other.error or "").startswith(GONE) for other in others)
    first, killed = run_world(2, train_until, recipe, 1, 3, "kill")
    assert (first.error or "").startswith(GONE)
    assert killed.error == "it ended without a word"

    latest = Path(recipe.checkpoint_dir, checkpoints.LATEST)
    outcomes = run_world(2, train_until, recipe, 1, 3, "signal")
    saved = f"Interrupted: interrupted; saved {latest}"
    assert [outcome.error for outcome in outcomes] == [saved] * 2
    assert checkpoints.load_checkpoint(latest)["training"]["progress"]["step"] == 4
