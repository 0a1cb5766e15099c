"""A disk on which one chosen operation goes wrong: the calls that write below a folder are counted, and one is failed.

Python's own calls are replaced, in this process alone; the code under test knows nothing of it. ``fsync`` is counted
and not carried out, since no test can pull the plug: what `power_cut` loses is what no ``fsync`` came after.
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

DIES = ("stop", "power_cut")
FAULTS = {
    "open": ("ENOSPC", "EIO", *DIES),
    "write": ("ENOSPC", "EIO", *DIES),
    "fsync": ("ENOSPC", "EIO", *DIES),
    "rename": ("EIO", *DIES),
    "unlink": ("EIO", *DIES),
}
"""What can go wrong in each kind of operation. With `stop` and `power_cut` the process ends in the middle, and loses
nothing, or all that was not brought to disk."""


class PowerCut(BaseException):
    """The process is no more. Nothing that it still tries reaches the disk."""


class FaultyDisk:
    """What happens below ``root``, and what goes wrong there.

    Args:
        at: the operation that goes wrong, counted from 0; None lets all of them succeed.
        fault: how, see `FAULTS`; `kill` is a `stop` by SIGKILL.

    Attributes:
        operations: the kinds of all operations so far.
        is_dead: the process is meant to be no more.
    """

    def __init__(self, root: Path, at: int | None = None, fault: str = ""):
        self.root = root.resolve()
        self.at, self.fault = at, fault
        self.operations: list[str] = []
        self.is_dead = False
        self._not_on_disk: dict[int, Path] = {}

    @contextmanager
    def plugged_in(self) -> Iterator[FaultyDisk]:
        """Replace the calls inside this block."""
        patched = [
            (io, "open", self._open),
            *((os, name, getattr(self, f"_{name}")) for name in _OF_OS),
        ]
        originals = [(module, name, getattr(module, name)) for module, name, _ in patched]
        self._real: dict[str, Callable[..., Any]] = {name: call for _, name, call in originals}
        for module, name, call in patched:
            setattr(module, name, call)
        try:
            yield self
        finally:
            for module, name, call in originals:
                setattr(module, name, call)

    def goes_wrong(self, kind: str) -> bool:
        """Count an operation; whether a silent fault is due. Others are raised, or end the process."""
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
        """End the process, or lose what is not on disk."""
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_dead = True
        if self.fault == "power_cut":
            for path in filter(Path.exists, self._not_on_disk.values()):
                os.truncate(path, 0)
        raise PowerCut

    def wrote(self, inode: int, path: Path) -> None:
        self._not_on_disk[inode] = path

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and self.root in Path(path).absolute().parents

    def _open(self, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set("wax+") & set(mode) or not self._is_below(path):
            return self._real["open"](path, mode, *arguments, **named)
        assert "b" in mode, f"{path} is written as text, which this disk cannot count"
        if self.goes_wrong("open"):
            self.die()
        raw = _File(self, Path(path), mode.replace("b", ""))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def _fsync(self, descriptor: int) -> None:
        if self.goes_wrong("fsync"):
            self.die()
        self._not_on_disk.pop(os.fstat(descriptor).st_ino, None)

    def _replace(self, source: Any, target: Any) -> None:
        if not self._is_below(target):
            return self._real["replace"](source, target)
        if self.goes_wrong("rename"):
            self.die()
        self._real["replace"](source, target)
        inode = Path(target).stat().st_ino
        if inode in self._not_on_disk:
            self._not_on_disk[inode] = Path(target)

    def _rename(self, source: Any, target: Any) -> None:
        self._replace(source, target)

    def _unlink(self, path: Any, **named: Any) -> None:
        self._count_only("unlink", path)
        self._real["unlink"](path, **named)

    def _count_only(self, kind: str, path: Any) -> None:
        if self._is_below(path) and self.goes_wrong(kind):
            self.die()


_OF_OS = ("fsync", "replace", "rename", "unlink")


class _File(io.FileIO):
    """The file below Python's buffer: its every write is an operation of the disk."""

    def __init__(self, disk: FaultyDisk, path: Path, mode: str):
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._disk.is_dead:  # what a buffer still holds is lost with the process
            return len(content)
        self._disk.wrote(os.fstat(self.fileno()).st_ino, self._path)
        if not self._disk.goes_wrong("write"):
            self._whole(content)
        else:
            self._whole(content[: len(content) // 2])
            self._disk.die()
        return len(content)

    def _whole(self, content: bytes) -> None:
        assert super().write(content) == len(content), "the disk of this test is really full"
