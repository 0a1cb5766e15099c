"""Images in parquet files, as Hugging Face datasets store them: read in order, a few at a time.

An image column is a struct ``{bytes, path}``. A plan of many thousand images names each by file, row
group and row; the bytes are read when their turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_bridge.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

PICTURE_ROWS = 16
"""Rows of pictures held at a time: a few megabytes."""

TEXT_ROWS = 4096
"""Rows of everything else held at a time."""

_READ_AHEAD = 1 << 20  # bytes; without it, pyarrow loads the pictures of a whole row group at once


@dataclass(frozen=True, slots=True)
class ParquetPicture:
    """Where a picture lies: ``row`` counts within its row group."""

    file: Path
    row_group: int
    row: int
    column: str = "image"

    @classmethod
    def read_in_order(cls, pictures: Iterable[ParquetPicture]) -> Iterator[bytes | None]:
        """As :func:`read_pictures`."""
        return read_pictures(pictures)


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (row group, row within it, values of ``columns``) for every row of a parquet file, in order.

    A text that is not UTF-8 is None.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    import pyarrow.types as types

    # As dictionaries, and a row at a time: a text that the file holds once may stand in every row.
    is_text = {
        field.name
        for field in schema_of(path)
        if types.is_string(field.type) or types.is_large_string(field.type)
    }
    with _opened(path, read_dictionary=[name for name in columns if name in is_text]) as file:
        for row_group in range(file.num_row_groups):
            row = 0
            for batch in _batches(file, row_group, columns, TEXT_ROWS, path):
                for values in zip(*batch.columns, strict=True):
                    yield (
                        row_group,
                        row,
                        dict(zip(batch.schema.names, map(_plain, values), strict=True)),
                    )
                    row += 1


def read_pictures(pictures: Iterable[ParquetPicture]) -> Iterator[bytes | None]:
    """Yield the bytes of each picture, None where its row holds none.

    ``pictures`` stand in the order of their files; row groups that none of them is in are not read.

    Raises:
        DataError: pyarrow is not installed, or a file is missing or damaged.
    """
    for path, of_file in groupby(pictures, key=lambda picture: picture.file):
        with _opened(path) as file:
            for (row_group, column), wanted in groupby(
                of_file, key=lambda p: (p.row_group, p.column)
            ):
                rows = _picture_rows(file, row_group, column, path)
                position, content = -1, None
                for picture in wanted:
                    if picture.row <= position:
                        raise ValueError("pictures must be asked for in the order of their file")
                    while position < picture.row:
                        position, content = next(rows, (picture.row, None))
                    yield content


def schema_of(path: Path) -> pa.Schema:
    """Return the columns of a parquet file; DataError as :func:`read_rows`."""
    with _opened(path) as file:
        return file.schema_arrow


def count_rows(path: Path) -> int:
    """Return the number of rows, from the file's footer alone; DataError as :func:`read_rows`."""
    with _opened(path) as file:
        return file.metadata.num_rows


def _picture_rows(
    file: ParquetFile, row_group: int, column: str, path: Path
) -> Iterator[tuple[int, bytes | None]]:
    row = 0
    for batch in _batches(file, row_group, [f"{column}.bytes"], PICTURE_ROWS, path):
        for value in batch.column(0).field("bytes"):
            yield row, value.as_py()
            row += 1


def _plain(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _opened(path: Path, *, read_dictionary: Sequence[str] | None = None) -> ParquetFile:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(
            path,
            buffer_size=_READ_AHEAD,
            pre_buffer=False,
            read_dictionary=list(read_dictionary or ()),
        )
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from None


def _batches(
    file: ParquetFile, row_group: int, columns: Sequence[str], rows: int, path: Path
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        # One thread: decoding pictures is what takes time, and the other processes do that.
        yield from file.iter_batches(
            rows, row_groups=[row_group], columns=list(columns), use_threads=False
        )
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged or no parquet file ({' '.join(str(error).split())}): get it again"
    )
