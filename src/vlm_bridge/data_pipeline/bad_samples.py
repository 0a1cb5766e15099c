"""Skipped samples: counted and listed; too many of them are an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlm_bridge.errors import DataError, on_one_line
from vlm_bridge.files import write_atomically

MAX_BAD_SHARE = 0.01
MIN_BAD_ROWS = 3
NUM_CAUSES = 5
"""Causes that a message names."""
NUM_NAMED = 3
"""Samples that a message names for each cause."""

# What differs from sample to sample within one cause: quoted names, numbers, paths.
_PARTICULARS = re.compile(r"'[^']*'|\d[\d,.]*|\S*/\S*")


@dataclass(frozen=True, slots=True)
class BadSample:
    """A skipped sample (a file, or "file:line") and the reason."""

    where: str
    reason: str


@dataclass
class BadSamples:
    """The skipped ones among ``total`` samples.

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

    def check(
        self,
        max_share: float,
        *,
        at_least: int = 1,
        listing: Path | None = None,
        setting: str | None = None,
    ) -> None:
        """Raise DataError if more than ``max_share`` of the samples are skipped; it names the causes.

        Args:
            at_least: fewer are no error, whatever their share.
            listing: the file that names all of them.
            setting: what the user can raise to go on all the same.
        """
        if len(self) >= at_least and len(self) > max_share * self.total:
            limit = f"{setting}={max_share:g}" if setting else f"{max_share:.3g} of them"
            way_out = f", or raise {setting}" if setting else ""
            raise DataError(
                f"{len(self):,} of {self.total:,} {self.kind} cannot be used, more than {limit}: "
                f"{self.summary(listing)}; mend or remove them{way_out}"
            )

    def summary(self, listing: Path | None = None) -> str:
        """Return the causes on one line, each with a count and a few samples."""
        causes = by_cause((bad.where, bad.reason) for bad in self.samples)
        named = on_one_line("; ".join(causes[:NUM_CAUSES]))
        more = f"; and {len(causes) - NUM_CAUSES:,} more causes" if len(causes) > NUM_CAUSES else ""
        return named + more + (f" (all in {listing})" if listing is not None else "")


def by_cause(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each cause, the most frequent first: count, reason, first samples.

    Args:
        skipped: (what, reason) of each; reasons that differ in numbers and names are one cause.
    """
    causes: dict[str, list[tuple[str, str]]] = {}
    for what, reason in skipped:
        causes.setdefault(_PARTICULARS.sub("", reason), []).append((what, reason))
    lines = []
    for found in sorted(causes.values(), key=len, reverse=True):
        (first, reason), names = found[0], ", ".join(what for what, _ in found[:NUM_NAMED])
        more = f" and {len(found) - NUM_NAMED:,} more" if len(found) > NUM_NAMED else ""
        lines.append(
            f"{first}: {reason}"
            if len(found) == 1
            else f"{len(found):,} times {reason}: {names}{more}"
        )
    return lines


def write_listing(path: Path, parts: Sequence[BadSamples]) -> None:
    """Write every skipped sample as a line of JSON, or remove a listing of nothing."""
    records = [{"kind": part.kind, **asdict(bad)} for part in parts for bad in part.samples]
    if not records:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
