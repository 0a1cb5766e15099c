"""An image inside a tar, by its place; it replaces a path wherever images are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from vlm_bridge.errors import DataError, ImageError


@dataclass(frozen=True, slots=True)
class TarPicture:
    """Where a picture lies in an uncompressed tar: ``offset`` and ``size`` in bytes.

    It answers as a `Path` does, as far as pictures need that; as text it is ``train/00000.tar/000010015.jpg``.

    Attributes:
        member: its name in the tar. It names the picture in messages and never leads anywhere.
    """

    file: Path
    offset: int
    size: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.file}/{self.member or self.offset}"

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2] or str(self.offset)

    def is_file(self) -> bool:
        """Whether the tar is there and reaches as far as the picture."""
        return self.file.is_file() and self.file.stat().st_size >= self.offset + self.size

    def resolve(self) -> TarPicture:
        return replace(self, file=self.file.resolve())

    def stat(self) -> os.stat_result:
        """Of the tar: the picture is what it was while its tar is. Raises OSError."""
        return self.file.stat()

    def read_bytes(self) -> bytes:
        """The picture's file, as it was put into the tar.

        Raises:
            ImageError: the tar is gone, cannot be read, or is shorter than it was.
        """
        try:
            with self.file.open("rb") as file:
                content = read_at(file, self.offset, self.size)
        except OSError as error:
            raise ImageError(
                self, f"its shard cannot be read ({error.strerror or error})"
            ) from None
        if len(content) < self.size:
            raise ImageError(
                self, "its shard became shorter after it was indexed: fetch the shard again"
            )
        return content

    @classmethod
    def read_in_order(cls, pictures: Iterable[TarPicture]) -> Iterator[bytes]:
        """Yield the bytes of each picture; a tar is opened once for all of its pictures that follow each other.

        Raises:
            DataError: a tar is gone, or shorter than it was.
        """
        for path, of_file in groupby(pictures, key=lambda picture: picture.file):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                raise DataError(f"no such file: {path}") from None
            with file:
                for picture in of_file:
                    content = read_at(file, picture.offset, picture.size)
                    if len(content) < picture.size:
                        raise DataError(
                            f"{path} became shorter while it was read: run the same command again"
                        )
                    yield content


PictureFile = Path | TarPicture
"""Where a picture is: a file of its own, or part of a tar."""


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Up to ``size`` bytes of an open file from ``offset`` on. Raises OSError."""
    file.seek(offset)
    return file.read(size)
