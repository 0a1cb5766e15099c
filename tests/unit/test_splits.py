"""Which split an image belongs to."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from vlm_bridge.data_pipeline.splits import SplitRule, nearest_subset, normalise_split
from vlm_bridge.errors import DataError, UsageError

BY_HASH = SplitRule("hash", val_fraction=0.2, test_fraction=0.1)
GROUNDCAP = SplitRule(None, val_fraction=0.05, test_fraction=0.15)


def splits_of(names: list[str], seed: int = 0) -> list[str]:
    return [*BY_HASH.assign(names, [None] * len(names), seed=seed)]


def test_shares_are_close_to_the_fractions() -> None:
    counts = Counter(splits_of([str(index) for index in range(20_000)]))
    assert counts["val"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert counts["test"] / 20_000 == pytest.approx(0.1, abs=0.01)


def test_this_id_stays_in_its_split_for_ever() -> None:
    # A changed hash would silently move test images into people's training data.
    expected = (
        "train train val train train val train train train val val train test train train train"
    )
    names = [*"ijklmnopqrstuvwx"]
    assert " ".join(splits_of(names)) == expected
    assert " ".join(splits_of(names, seed=1)) != expected


@pytest.mark.parametrize("fractions", [(-0.1, 0), (0, 1), (0.5, 0.5)])
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UsageError):
        SplitRule("hash", *fractions)


def test_usual_names_of_splits() -> None:
    names = ("Validation", "dev", " test ", "training", "fold1")
    assert [normalise_split(n) for n in names] == ["val", "val", "test", "train", None]


def test_the_published_numbers() -> None:
    assert GROUNDCAP.sizes(52_350) == {"train": 41_880, "val": 2_618, "test": 7_852}


@pytest.mark.parametrize("fractions", [(0.05, 0.15), (0.1, 0.1), (1 / 3, 1 / 3), (0, 0.5), (0, 0)])
def test_sizes_are_as_near_as_whole_images_allow(fractions: tuple[float, float]) -> None:
    for number in (0, 1, 2, 3, 7, 19, 20, 500, 9_999):
        sizes = SplitRule("image", *fractions).sizes(number)
        assert sum(sizes.values()) == number
        assert abs(sizes["val"] - fractions[0] * number) < 1
        assert abs(sizes["test"] - fractions[1] * number) < 1


def test_by_image_gives_exact_shares_in_any_order() -> None:
    ids = [str(index) for index in range(1000)]
    rule = SplitRule("image", 0.05, 0.15)
    splits = dict(zip(ids, rule.assign(ids, [None] * 1000, seed=3), strict=True))
    assert Counter(splits.values()) == {"train": 800, "val": 50, "test": 150}
    backwards = rule.assign(ids[::-1], [None] * 1000, seed=3)
    assert dict(zip(ids[::-1], backwards, strict=True)) == splits
    assert rule.assign(ids, [None] * 1000, seed=4) != list(splits.values())


def ids_of_films(sizes: list[int]) -> tuple[list[str], list[str | None]]:
    films: list[str | None] = [f"tt{n}" for n, size in enumerate(sizes) for _ in range(size)]
    return [f"{film}_{index}" for index, film in enumerate(films)], films


def test_a_film_never_spans_two_splits_and_counts_come_near() -> None:
    ids, films = ids_of_films([300 + 37 * film % 700 for film in range(77)])
    chosen = set()
    for seed in range(3):
        splits = GROUNDCAP.assign(ids, films, seed=seed)
        assert len(set(zip(films, splits, strict=True))) == 77
        assert Counter(splits) == GROUNDCAP.sizes(len(ids)), "77 films allow the exact numbers"
        chosen.add(frozenset(f for f, split in zip(films, splits, strict=True) if split == "test"))
    assert len(chosen) == 3, "the seed decides which films"


def test_few_films_fill_every_split_or_are_refused() -> None:
    for sizes in ([100, 100, 100], [1, 1, 100], [1000, *[1] * 20], [5, 5, 5, 5]):
        assert set(GROUNDCAP.assign(*ids_of_films(sizes), seed=0)) == {"train", "val", "test"}
    ids, films = ids_of_films([50, 50])
    with pytest.raises(DataError, match=r"2 film\(s\) cannot fill 3 splits.*--split-by image"):
        GROUNDCAP.assign(ids, films, seed=0)
    with pytest.raises(DataError, match="'x' names no film"):
        SplitRule("film").assign([*ids, "x"], [*films, None], seed=0)


def test_films_decide_only_where_every_id_names_one() -> None:
    assert GROUNDCAP.resolve(["tt1", "tt2"]).by == "film"
    assert GROUNDCAP.resolve(["tt1", None]).by == "image"
    assert GROUNDCAP.resolve([]).by == "image"
    assert SplitRule("hash").resolve(["tt1"]).by == "hash"


def test_the_nearest_subset_equals_trying_all() -> None:
    rng = random.Random(0)
    for _ in range(150):
        sizes = [rng.randint(1, 30) for _ in range(rng.randint(3, 8))]
        target, leave = rng.randint(1, 60), rng.randint(1, 2)
        chosen = nearest_subset(sizes, target, leave=leave)
        counts = range(1, len(sizes) - leave + 1)
        sums = [sum(some) for n in counts for some in itertools.combinations(sizes, n)]
        assert len(chosen) in counts and len(set(chosen)) == len(chosen)
        distances = [abs(total - target) for total in sums]
        assert abs(sum(sizes[k] for k in chosen) - target) == min(distances)
