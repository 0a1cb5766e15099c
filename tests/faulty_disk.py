"""A disk on which one chosen operation goes wrong: calls that write below a folder are counted.

Python's own calls are replaced, in this process alone. ``fsync`` is counted and not carried out.
"""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

FULL = ("ENOSPC", "EIO", "stop")
FAULTS = {"open": FULL, "write": FULL, "fsync": FULL, "rename": FULL[1:], "unlink": FULL[1:]}
"""Faults of each kind of operation. The process ends at `stop`."""


class PowerCut(BaseException):
    """The process is no more. Nothing that it still tries reaches the disk."""


class FaultyDisk:
    """The disk below ``root``.

    Args:
        at: the operation that goes wrong, counted from 0; None lets all of them succeed.
        fault: how, see `FAULTS`; `kill` is a `stop` by SIGKILL.

    Attributes:
        operations: the kinds of all operations so far.
    """

    def __init__(self, root: Path, at: int | None = None, fault: str = ""):
        self.root = root.resolve()
        self.at, self.fault = at, fault
        self.operations: list[str] = []
        self.is_dead = False

    @contextmanager
    def plugged_in(self) -> Iterator[FaultyDisk]:
        """Replace the calls inside this block."""
        self._open_really = io.open
        counted = {
            "fsync": lambda descriptor: self.count("fsync"),
            "replace": self._counting("rename", os.replace),
            "rename": self._counting("rename", os.rename),
            "unlink": self._counting("unlink", os.unlink),
        }
        with mock.patch.object(io, "open", self._open), mock.patch.multiple(os, **counted):
            yield self

    def count(self, kind: str, before_the_end: Callable[[], object] = lambda: None) -> None:
        """Count an operation. Raises OSError or PowerCut where it is the one that goes wrong."""
        if self.is_dead:
            raise PowerCut
        self.operations.append(kind)
        if len(self.operations) - 1 != self.at:
            return
        if self.fault in ("ENOSPC", "EIO"):
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))
        before_the_end()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_dead = True
        raise PowerCut

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and self.root in Path(path).absolute().parents

    def _counting(self, kind: str, really: Callable[..., None]) -> Callable[..., None]:
        def call(*paths: Any, **named: Any) -> None:
            if self._is_below(paths[-1]):
                self.count(kind)
            really(*paths, **named)

        return call

    def _open(self, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set("wax+") & set(mode) or not self._is_below(path):
            return self._open_really(path, mode, *arguments, **named)
        assert "b" in mode, f"{path} is written as text, which this disk cannot count"
        self.count("open")
        raw = _File(self, Path(path), mode.replace("b", ""))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)


class _File(io.FileIO):
    """The file below Python's buffer: its every write is an operation of the disk."""

    def __init__(self, disk: FaultyDisk, path: Path, mode: str):
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._disk.is_dead:  # what a buffer still holds is lost with the process
            return len(content)
        write = super().write
        self._disk.count("write", lambda: write(content[: len(content) // 2]))
        return write(content)
