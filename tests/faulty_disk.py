"""A disk on which one chosen operation goes wrong: calls that write below a folder are counted.

Python's own calls are replaced, in this process alone. ``fsync`` is counted and not carried out: a
power cut loses what no ``fsync`` came after.
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

DIES = ("stop", "power_cut")
FAULTS = {
    "open": ("ENOSPC", "EIO", *DIES),
    "write": ("ENOSPC", "EIO", *DIES),
    "fsync": ("ENOSPC", "EIO", *DIES),
    "rename": ("EIO", *DIES),
    "unlink": ("EIO", *DIES),
}
"""Faults of each kind of operation. The process ends at `stop` and `power_cut`."""


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
        self.not_on_disk: dict[int, Path] = {}

    @contextmanager
    def plugged_in(self) -> Iterator[FaultyDisk]:
        """Replace the calls inside this block."""
        self._real: dict[str, Callable[..., Any]] = {"open": io.open}
        self._real |= {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        with (
            mock.patch.object(io, "open", self._open),
            mock.patch.multiple(
                os,
                fsync=self._fsync,
                replace=self._replace,
                rename=self._replace,
                unlink=self._unlink,
            ),
        ):
            yield self

    def goes_wrong(self, kind: str) -> bool:
        """Count an operation; return whether the process is to end. Other faults are raised."""
        if self.is_dead:
            raise PowerCut
        self.operations.append(kind)
        if len(self.operations) - 1 != self.at:
            return False
        if self.fault in ("ENOSPC", "EIO"):
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))
        return True

    def die(self) -> None:
        """End the process; a power cut loses what is not on disk."""
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_dead = True
        if self.fault == "power_cut":
            for path in filter(Path.exists, self.not_on_disk.values()):
                os.truncate(path, 0)
        raise PowerCut

    def _count(self, kind: str) -> None:
        if self.goes_wrong(kind):
            self.die()

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and self.root in Path(path).absolute().parents

    def _open(self, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set("wax+") & set(mode) or not self._is_below(path):
            return self._real["open"](path, mode, *arguments, **named)
        assert "b" in mode, f"{path} is written as text, which this disk cannot count"
        self._count("open")
        raw = _File(self, Path(path), mode.replace("b", ""))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def _fsync(self, descriptor: int) -> None:
        self._count("fsync")
        self.not_on_disk.pop(os.fstat(descriptor).st_ino, None)

    def _replace(self, source: Any, target: Any) -> None:
        if self._is_below(target):
            self._count("rename")
        self._real["replace"](source, target)
        inode = Path(target).stat().st_ino
        if inode in self.not_on_disk:
            self.not_on_disk[inode] = Path(target)

    def _unlink(self, path: Any, **named: Any) -> None:
        if self._is_below(path):
            self._count("unlink")
        self._real["unlink"](path, **named)


class _File(io.FileIO):
    """The file below Python's buffer: its every write is an operation of the disk."""

    def __init__(self, disk: FaultyDisk, path: Path, mode: str):
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._disk.is_dead:  # what a buffer still holds is lost with the process
            return len(content)
        self._disk.not_on_disk[os.fstat(self.fileno()).st_ino] = self._path
        if self._disk.goes_wrong("write"):
            super().write(content[: len(content) // 2])
            self._disk.die()
        return super().write(content)
