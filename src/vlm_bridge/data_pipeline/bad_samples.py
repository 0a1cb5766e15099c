"""Samples that cannot be used: set aside, counted and listed; where they are too many, the work stops.

One damaged picture among a hundred thousand must not end a training, and a damaged disk must not go unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlm_bridge.durable_files import write_bytes_durably
from vlm_bridge.errors import DataError, on_one_line

MAX_BAD_SHARE = 0.01
"""Where nobody says otherwise."""
NUM_NAMED = 10
"""Of the samples set aside, how many a message names."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """What is set aside (a file, or "file:line"), and why."""

    where: str
    reason: str


@dataclass
class BadSamples:
    """What was set aside among ``total`` samples.

    Attributes:
        kind: what they are, for messages: "train pictures".
    """

    kind: str
    total: int = 0
    samples: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def set_aside(self, where: object, reason: str) -> None:
        self.samples.append(BadSample(str(where), reason))

    def check(self, max_share: float, *, listing: Path | None = None, setting: str | None = None) -> None:
        """Raise DataError where more than ``max_share`` of the samples are set aside; it names the first ten.

        Args:
            listing: the file that names all of them.
            setting: what the user can raise to go on all the same.
        """
        if len(self) > max_share * self.total:
            limit = f"{setting}={max_share:g}" if setting else f"{max_share:.3g} of them"
            way_out = f", or raise {setting}" if setting else ""
            raise DataError(
                f"{len(self):,} of {self.total:,} {self.kind} cannot be used, more than {limit}: "
                f"{self.summary(listing)}; mend or remove them{way_out}"
            )

    def summary(self, listing: Path | None = None) -> str:
        """The first ten on one line, and where the others are."""
        named = on_one_line("; ".join(f"{bad.where}: {bad.reason}" for bad in self.samples[:NUM_NAMED]))
        more = f"; and {len(self) - NUM_NAMED:,} more" if len(self) > NUM_NAMED else ""
        return named + more + (f" (all in {listing})" if listing is not None else "")


def write_listing(path: Path, parts: Sequence[BadSamples]) -> None:
    """Write every sample that is set aside as a line of JSON, or remove a listing of nothing."""
    records = [{"kind": part.kind, **asdict(bad)} for part in parts for bad in part.samples]
    if not records:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_durably(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
