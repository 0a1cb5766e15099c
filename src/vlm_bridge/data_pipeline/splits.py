"""Assign images to train, val and test by a seed and their ids, in any order of the images."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from vlm_bridge.errors import DataError, UsageError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SplitBy = Literal["hash", "image", "film"]
# A duplicate stays in the first of these: losing a training image costs least.
DUPLICATE_PRIORITY: tuple[SplitName, ...] = ("test", "val", "train")
_SYNONYMS: dict[str, SplitName] = {"training": "train"}
_SYNONYMS |= dict.fromkeys(("valid", "validation", "dev"), "val")


def normalise_split(name: str) -> SplitName | None:
    """Return our name of a split, such as ``val`` for ``dev``; None for an unknown one."""
    name = name.strip().lower()
    return name if name in SPLITS else _SYNONYMS.get(name)


@dataclass(frozen=True)
class SplitRule:
    """Assigns images to splits where the dataset does not.

    Attributes:
        by: ``hash`` uses each id alone: new images never move the others, and shares are
            approximate. ``image`` gives exact shares. ``film`` keeps the images of a film together,
            as near to the shares as possible. None is ``film`` where every id names one and
            ``image`` elsewhere.
        val_fraction, test_fraction: shares of those images, in [0, 1); the rest is for training.

    Raises:
        UsageError: the fractions leave nothing to train on.
    """

    by: SplitBy | None = "hash"
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        shares = self.val_fraction, self.test_fraction
        if min(shares) < 0 or sum(shares) >= 1:
            raise UsageError(
                "--val-fraction and --test-fraction must be at least 0 and leave something to "
                f"train on: {shares[0]} and {shares[1]} do not"
            )

    def resolve(self, films: Sequence[str | None]) -> SplitRule:
        """Return the rule with ``by`` decided for these films (None: the id names no film)."""
        have_films = len(films) > 0 and None not in films
        return replace(self, by=self.by or ("film" if have_films else "image"))

    def assign(
        self, image_ids: Sequence[str], films: Sequence[str | None], *, seed: int
    ) -> list[SplitName]:
        """Return the split of every image; the order of the images does not matter.

        Raises:
            DataError: by film, but an id names none, or there are fewer films than splits to fill.
        """
        by = self.resolve(films).by
        if by == "film":
            return self._assign_films(image_ids, films, seed)
        if by == "hash":
            ends = [self.test_fraction, self.test_fraction + self.val_fraction]
            places = (bisect_right(ends, _position(image_id, seed)) for image_id in image_ids)
            return [DUPLICATE_PRIORITY[place] for place in places]
        sizes = self.sizes(len(image_ids))
        splits: list[SplitName] = [s for s in DUPLICATE_PRIORITY for _ in range(sizes[s])]
        split_of = dict(zip(_shuffled(image_ids, seed), splits, strict=True))
        return [split_of[image_id] for image_id in image_ids]

    def sizes(self, num_images: int) -> dict[SplitName, int]:
        """Return the number of images of each split: 41,880, 2,618 and 7,852 of 52,350."""
        # Decimals as they were written: in binary, 1 - 0.05 - 0.15 is a little less than 0.8.
        val, test = Fraction(str(self.val_fraction)), Fraction(str(self.test_fraction))
        of_val, held_out = (int(share * num_images + Fraction(1, 2)) for share in (val, val + test))
        return {"train": num_images - held_out, "val": of_val, "test": held_out - of_val}

    def describe(self) -> str:
        """Return one line for the manifest."""
        shares = f"{self.val_fraction:g} val and {self.test_fraction:g} test"
        ways = {
            "hash": f"hash of (seed, image id), {shares}",
            "film": f"whole films, as near to {shares} as they allow",
        }
        by_image = f"images in the order of a hash of (seed, id), exactly {shares}"
        return f"{ways.get(self.by or '', by_image)}, unless the source names a split"

    def _assign_films(
        self, image_ids: Sequence[str], films: Sequence[str | None], seed: int
    ) -> list[SplitName]:
        if None in films:
            name = image_ids[films.index(None)]
            raise DataError(f"image id {name!r} names no film (tt...): use --split-by image")
        num_images = Counter(film for film in films if film is not None)
        wanted = self.sizes(len(image_ids))
        to_fill: list[SplitName] = [split for split in ("test", "val") if wanted[split]]
        if len(num_images) <= len(to_fill) and image_ids:
            raise DataError(
                f"{len(num_images)} film(s) cannot fill {len(to_fill) + 1} splits, and a film "
                "never spans two: use --split-by image"
            )
        remaining = _shuffled(num_images, seed)
        split_of: dict[str | None, SplitName] = {}
        for left, split in zip(range(len(to_fill), 0, -1), to_fill, strict=True):
            sizes = [num_images[film] for film in remaining]
            chosen = nearest_subset(sizes, wanted[split], leave=left)
            split_of |= {remaining[index]: split for index in chosen}
            remaining = [film for film in remaining if film not in split_of]
        return [split_of.get(film, "train") for film in films]


def nearest_subset(sizes: Sequence[int], target: int, *, leave: int) -> list[int]:
    """Return indices of ``sizes`` (positive) whose sum is as near to ``target`` as possible.

    At least one is chosen, and at least ``leave`` are not. Among equally near sums, that of the
    fewest leading sizes wins, so a shuffle decides. Time is O(len(sizes) * target).
    """
    limit = max(2 * target, *sizes)  # a better sum is below twice the target, or a single size
    reached: dict[int, tuple[int, ...]] = {0: ()}  # each sum by the fewest sizes
    nearest, chosen = limit + 1, ()
    for index, size in enumerate(sizes):
        for total, before in list(reached.items()):
            new = total + size
            if new > limit or len(before) == len(sizes) - leave:
                continue
            if new not in reached or len(before) + 1 < len(reached[new]):
                reached[new] = (*before, index)
        distance, best = min((abs(total - target), total) for total in reached if total)
        if distance < nearest:
            nearest, chosen = distance, reached[best]
        if nearest == 0:
            break
    return list(chosen)


def _position(name: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: (_position(name, seed), name))
