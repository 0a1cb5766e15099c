"""Which split an image belongs to, decided by a seed, ids and films: never by the order or number of processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from vlm_bridge.errors import DataError, UsageError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

DUPLICATE_PRIORITY: tuple[SplitName, ...] = ("test", "val", "train")
"""An image found in several splits stays in the first of these: losing a training image costs least."""

SplitBy = Literal["hash", "image", "film"]
"""How images are dealt out; see :class:`SplitRule`."""

_HELD_OUT: tuple[SplitName, ...] = ("test", "val")

_SYNONYMS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def normalise_split(name: str) -> SplitName | None:
    """Return ours for any usual name of a split (``validation``, ``dev`` ...), None for an unknown one."""
    return _SYNONYMS.get(name.strip().lower())


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise UsageError unless both are in [0, 1) and leave something to train on."""
    for option, fraction in (("--val-fraction", val_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{option} must be at least 0 and below 1, not {fraction}")
    if val_fraction + test_fraction >= 1:
        raise UsageError(
            "--val-fraction and --test-fraction leave nothing to train on: their sum must be below 1"
        )


@dataclass(frozen=True)
class SplitRule:
    """How images are split whose dataset names no split.

    Attributes:
        by: ``hash`` looks at each id alone, so that adding images never moves the others, and shares are
            approximate. ``image`` gives exact shares. ``film`` keeps the images of a film together, as near to
            the shares as whole films allow. None is ``film`` where every id names one and ``image`` elsewhere.
        val_fraction, test_fraction: shares of those images, in [0, 1); the rest is for training.
        held_out_at_least: images that validation and testing get each, for shares made for large sets: a small set
            is dealt out in exact, larger shares, of a tenth at most. 0 keeps the shares as they are.

    Raises:
        UsageError: the fractions leave nothing to train on.
    """

    by: SplitBy | None = "hash"
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    held_out_at_least: int = 0

    def __post_init__(self) -> None:
        check_fractions(self.val_fraction, self.test_fraction)

    def resolve(self, films: Sequence[str | None]) -> SplitRule:
        """Return this rule with all decided for images of these films (None: the id names no film)."""
        if films and self.held_out_at_least > len(films) * min(
            self.val_fraction, self.test_fraction
        ):
            share = round(min(0.1, self.held_out_at_least / len(films)), 4)
            return SplitRule("image", max(self.val_fraction, share), max(self.test_fraction, share))
        if self.by is not None:
            return self
        by = "film" if films and all(film is not None for film in films) else "image"
        return SplitRule(by, self.val_fraction, self.test_fraction)

    def assign(
        self, image_ids: Sequence[str], films: Sequence[str | None], *, seed: int
    ) -> list[SplitName]:
        """Return the split of every image; the order of the images does not matter.

        Raises:
            DataError: by film, but an id names none, or there are fewer films than splits to fill.
        """
        match self.resolve(films).by:
            case "film":
                return self._assign_films(image_ids, films, seed)
            case "image":
                ranked = sorted(
                    image_ids, key=lambda image_id: (_position(image_id, seed), image_id)
                )
                sizes = self.sizes(len(ranked))
                dealt: list[SplitName] = [s for s in (*_HELD_OUT, "train") for _ in range(sizes[s])]
                split_of = dict(zip(ranked, dealt, strict=True))
                return [split_of[image_id] for image_id in image_ids]
            case _:
                fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
                return [assign_split(image_id, seed=seed, **fractions) for image_id in image_ids]

    def sizes(self, num_images: int) -> dict[SplitName, int]:
        """Return how many images each split gets: whole shares, then one more for the largest remainders.

        Equal remainders are served in the order train, val, test. 52,350 images at 80/5/15 are 41,880 / 2,618 / 7,852.
        """
        # Of the decimals as they were written: in binary, 1 - 0.05 - 0.15 is a little less than 0.8.
        val, test = Fraction(str(self.val_fraction)), Fraction(str(self.test_fraction))
        share_of: dict[SplitName, Fraction] = {"train": 1 - val - test, "val": val, "test": test}
        shares = {split: share * num_images for split, share in share_of.items()}
        sizes: dict[SplitName, int] = {split: int(shares[split]) for split in SPLITS}
        by_remainder = sorted(SPLITS, key=lambda split: sizes[split] - shares[split])
        for split in by_remainder[: num_images - sum(sizes.values())]:
            sizes[split] += 1
        return sizes

    def describe(self) -> str:
        """Return one line for the manifest."""
        shares = f"{self.val_fraction:g} val and {self.test_fraction:g} test"
        ways = {
            "hash": f"hash of (seed, image id), {shares}",
            "image": f"images in the order of a hash of (seed, id), exactly {shares}",
            "film": f"whole films, as near to {shares} as they allow",
        }
        return f"{ways[self.by or 'image']}, unless the source names a split"

    def _assign_films(
        self, image_ids: Sequence[str], films: Sequence[str | None], seed: int
    ) -> list[SplitName]:
        for image_id, film in zip(image_ids, films, strict=True):
            if film is None:
                raise DataError(
                    f"image id {image_id!r} names no film (tt and digits): use --split-by image"
                )
        images_of = Counter(film for film in films if film is not None)
        wanted = self.sizes(len(image_ids))
        to_fill: list[SplitName] = [split for split in _HELD_OUT if wanted[split]]
        if len(images_of) <= len(to_fill) and image_ids:
            raise DataError(
                f"{len(images_of)} film(s) cannot fill {len(to_fill) + 1} splits, and a film never spans two: "
                "use --split-by image"
            )
        remaining = sorted(images_of, key=lambda film: (_position(film, seed), film))
        split_of: dict[str, SplitName] = {}
        for number, split in enumerate(to_fill, start=1):
            chosen = nearest_subset(
                [images_of[film] for film in remaining],
                wanted[split],
                leave=len(to_fill) + 1 - number,
            )
            split_of |= {remaining[index]: split for index in chosen}
            remaining = [film for film in remaining if film not in split_of]
        return [split_of.get(film or "", "train") for film in films]


def nearest_subset(sizes: Sequence[int], target: int, *, leave: int) -> list[int]:
    """Return the indices of some ``sizes`` (all positive) whose sum is as near to ``target`` as any can be.

    At least one is chosen and at least ``leave`` are not. Of equally near sums the one wins that needs the fewest
    of the first sizes, so that their order (of a shuffle) decides.

    Subset-sum by dynamic programming: O(len(sizes) * (target + largest size)) time, the same in bytes.
    """
    # The best sum is below twice the target, or else a single size.
    limit = max(2 * target, *sizes)
    most = len(sizes) - leave
    # Per sum: the fewest sizes that make it. took[k][s]: the best way to s with sizes 0..k takes size k.
    fewest = np.full(limit + 1, most + 1)
    fewest[0] = 0
    took: list[np.ndarray] = []
    nearest: tuple[int, int] | None = None  # (distance, sum)
    through = 0
    distance = np.abs(np.arange(limit + 1) - target)
    for k, size in enumerate(sizes):
        with_k = fewest[: limit + 1 - size] + 1
        better = with_k < fewest[size:]
        fewest[size:][better] = with_k[better]
        took.append(np.concatenate((np.zeros(size, dtype=bool), better)))
        possible = np.flatnonzero((fewest <= most)[1:]) + 1
        if possible.size:
            best = int(possible[distance[possible].argmin()])
            if nearest is None or distance[best] < nearest[0]:
                nearest, through = (int(distance[best]), best), k
        if nearest is not None and nearest[0] == 0:
            break
    if nearest is None:
        raise ValueError(f"{len(sizes)} sizes cannot be chosen from while {leave} are left")
    chosen: list[int] = []
    rest = nearest[1]
    for k in range(through, -1, -1):
        if took[k][rest]:
            chosen.append(k)
            rest -= sizes[k]
    return chosen[::-1]


def assign_split(
    image_id: str, *, seed: int, val_fraction: float, test_fraction: float
) -> SplitName:
    """Return the split of an image: a hash of (seed, id), so adding images never moves the others."""
    position = _position(image_id, seed)
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def _position(name: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
