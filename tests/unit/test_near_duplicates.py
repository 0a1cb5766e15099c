"""Pairs of images that look alike: the same as comparing all with all."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from vlm_bridge.data_pipeline import near_duplicates as module
from vlm_bridge.data_pipeline.near_duplicates import near_duplicates, near_pairs


def planted(seed: int, count: int, changed_bits: int) -> np.ndarray:
    """Random hashes, and for each another one with so many bits changed, at most."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    bits = random.integers(0, 64, (count, changed_bits), dtype=np.uint64)
    return np.concatenate([hashes, hashes ^ np.bitwise_or.reduce(np.uint64(1) << bits, axis=1)])


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 12, 13, 64])
def test_pairs_are_those_of_brute_force(distance: int) -> None:
    hashes = np.unique(planted(distance, 150, max(1, distance + distance // 4)))
    pairs, bits = near_pairs(hashes, distance)
    expected = {
        (i, j): differing
        for i, j in combinations(range(len(hashes)), 2)
        if (differing := int(hashes[i] ^ hashes[j]).bit_count()) <= distance
    }
    found = zip(map(tuple, pairs.tolist()), bits.tolist(), strict=True)
    assert dict(found) == expected and len(pairs) == len(expected)
    assert bool(expected) == (distance > 0)


@pytest.mark.parametrize("limit", [5, 1000])
def test_the_report_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", limit)
    random = np.random.default_rng(0)
    looks = np.concatenate([planted(1, 30, 4), np.full(40, 7), planted(2, 5, 1).repeat(4)])
    looks = random.permutation(looks.astype(np.uint64)).tolist()
    splits = random.choice(["train", "val", "test"], len(looks)).tolist()
    names = [f"{split}/{n}" for n, split in enumerate(splits)]
    pairs = sorted(
        (splits[i] == splits[j], differing, i, j)
        for i, j in combinations(range(len(looks)), 2)
        if (differing := (looks[i] ^ looks[j]).bit_count()) <= 4
    )
    report = near_duplicates(looks, splits, names, 4)
    assert report["pairs"] == len(pairs)
    assert report["pairs_across_splits"] == sum(not is_within for is_within, *_ in pairs)
    shown = [{"images": [names[i], names[j]], "distance": n} for _, n, i, j in pairs[:limit]]
    assert report["listed"] == shown


def test_many_equal_images_and_none() -> None:
    report = near_duplicates([7] * 20_000, ["train"] * 20_000, ["x"] * 20_000, 4)
    assert report["pairs"] == 20_000 * 19_999 // 2 and len(report["listed"]) == module.MAX_LISTED
    assert near_duplicates([], [], [], 4)["pairs"] == 0
