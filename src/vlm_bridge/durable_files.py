"""Files that outlive a full disk, a kill and a power cut: written beside their name, brought to disk, checked, named.

Under its name there is either the old file or the whole new one, whatever is broken off and wherever. What a killed
process leaves is a hidden file ending in `.tmp`, which nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


def write_durably(
    path: Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], object],
    *,
    keep_previous: bool = False,
) -> None:
    """Write a file that takes the place of ``path`` once it is on disk and was read back.

    Args:
        write: puts the content into an open file.
        check: raises OSError unless a file holds that content; it reads from the disk, not from the memory before it.
        keep_previous: give the old file a second name (`previous_of`) while the new one takes its place, for file
            systems that rename less atomically than they should. It is gone when all went well.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            write(file)
            bring_to_disk(file)
        check(unfinished)
        with _kept(path) if keep_previous else contextlib.nullcontext():
            take_name(unfinished, path)
    except OSError as error:
        if error.filename is None:  # of a write, the system names no file
            error.filename = str(path)
        raise
    finally:
        _remove(unfinished)


def write_bytes_durably(path: Path, content: bytes) -> None:
    """`write_durably` of bytes at hand. Raises OSError."""

    def check(written: Path) -> None:
        if written.read_bytes() != content:
            raise not_as_written(path)

    write_durably(path, lambda file: file.write(content), check)


def append_line(path: Path, line: bytes) -> None:
    """Append to a file a whole line or nothing; without the line, a new file is not left. Raises OSError."""
    size = path.stat().st_size if path.exists() else None
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError:
        with contextlib.suppress(OSError):
            if size is None:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, size)
        raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; those that are new and empty go again where the block raises OSError."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError:
        with contextlib.suppress(OSError):
            for place in new:
                place.rmdir()
        raise


def bring_to_disk(file: IO[bytes]) -> None:
    """Flush a file to its disk and forget it in memory, so that who reads it next reads the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def take_name(file: Path, path: Path) -> None:
    """Rename a file that is on disk, and bring the change to disk too. Raises OSError."""
    written = file.stat()
    file.replace(path)
    named = path.stat()
    # Another process may have given the name to a file of its own meanwhile, which is its to check.
    if named.st_ino == written.st_ino and named.st_size != written.st_size:
        raise not_as_written(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where the system can (Windows cannot). Raises OSError."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems
            raise
    finally:
        os.close(descriptor)


def not_as_written(path: Path) -> OSError:
    """The error of a file that does not hold what was written to it."""
    return OSError(errno.EIO, "what the disk gives back is not what was written", str(path))


def previous_of(path: Path) -> Path:
    """The second name that the old file has while a new one takes its place."""
    return path.with_name(f".{path.name}.previous")


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Whatever happens to ``path`` inside this block, its old content can be found, and comes back on an error."""
    previous, before = previous_of(path), _identity(path)
    is_new = before is not None and not previous.exists()
    if is_new:
        # Where there are no hard links, the change of names alone has to do. One that is there already was left by a
        # kill in this very block and may be the only sound one: it stays until the new file has its name.
        with contextlib.suppress(OSError):
            os.link(path, previous)
    try:
        yield
    except OSError:
        if _identity(path) != before:
            with contextlib.suppress(FileNotFoundError):
                previous.replace(path)
        elif is_new:
            _remove(previous)
        raise
    _remove(previous)


def _remove(path: Path) -> None:
    """Delete a file that is needed no more; if it stays, the next one who comes by deletes it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size
