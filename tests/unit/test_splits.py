"""Which split an image belongs to."""

from __future__ import annotations

from collections import Counter

import pytest

from vlm_bridge.data_pipeline.splits import assign_split, check_fractions, normalise_split
from vlm_bridge.errors import UsageError


def split_of(image_id: str, seed: int = 0) -> str:
    return assign_split(image_id, seed=seed, val_fraction=0.2, test_fraction=0.1)


def test_shares_are_close_to_the_fractions() -> None:
    counts = Counter(split_of(str(index)) for index in range(20_000))
    assert counts["val"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert counts["test"] / 20_000 == pytest.approx(0.1, abs=0.01)


def test_the_seed_matters_and_nothing_else_does() -> None:
    ids = [str(index) for index in range(200)]
    assert [split_of(i) for i in ids] == [split_of(i) for i in ids]
    assert [split_of(i) for i in ids] != [split_of(i, seed=1) for i in ids]


def test_this_id_stays_in_its_split_for_ever() -> None:
    # A changed hash would silently move test images into people's training data.
    expected = "train train val train train val train train train val val train test train train train"
    assert " ".join(split_of(name) for name in "ijklmnopqrstuvwx") == expected


def test_zero_fractions_leave_all_to_train() -> None:
    assert {assign_split(str(i), seed=0, val_fraction=0, test_fraction=0) for i in range(100)} == {"train"}


@pytest.mark.parametrize("fractions", [(-0.1, 0), (0, 1), (0.5, 0.5)])
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UsageError):
        check_fractions(*fractions)


def test_usual_names_of_splits() -> None:
    assert [normalise_split(n) for n in ("Validation", "dev", " test ", "fold1")] == [
        "val",
        "val",
        "test",
        None,
    ]
