"""Rows and images of parquet files, as Hugging Face datasets store them, a few at a time.

An image column is a struct ``{bytes, path}``; its bytes are read when their turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS
from vlm_bridge.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

IMAGE_ROWS = 16  # rows of images held at a time: a few megabytes
TEXT_ROWS = 4096
_READ_AHEAD = 1 << 20  # bytes; without it, pyarrow loads the images of a whole row group at once


class ParquetImage(NamedTuple):
    """Where an image lies: ``row`` counts within its row group."""

    file: Path
    row_group: int
    row: int
    column: str = "image"


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (row group, row within it, values of ``columns``) for every row, in order.

    A text too long for a caption is cut, and still too long. Raises DataError if the file is
    damaged.
    """
    from pyarrow import types

    # As dictionaries: a text that the file holds once may stand in a million rows.
    texts = [f.name for f in schema_of(path) if f.name in columns and types.is_string(f.type)]
    with _opened(path, texts) as file:
        for group in range(file.num_row_groups):
            row = 0
            for batch in _batches(file, group, columns, TEXT_ROWS):
                for values in zip(*map(_values, batch.columns), strict=True):
                    yield group, row, dict(zip(batch.schema.names, values, strict=True))
                    row += 1


def read_images(images: Iterable[ParquetImage]) -> Iterator[bytes | None]:
    """Yield the bytes of each image, None where its row holds none.

    ``images`` stand in the order of their files; row groups that none of them is in are not read.
    Raises DataError if a file is missing or damaged.
    """
    for path, of_file in groupby(images, key=lambda image: image.file):
        with _opened(path) as file:
            for (group, column), of_group in groupby(of_file, lambda i: (i.row_group, i.column)):
                batches = _batches(file, group, [f"{column}.bytes"], IMAGE_ROWS)
                contents = (value for batch in batches for value in batch.column(0).field("bytes"))
                rows = enumerate(contents)
                for image in of_group:
                    yield next((value.as_py() for row, value in rows if row == image.row), None)


def schema_of(path: Path) -> pa.Schema:
    """Return the columns of a parquet file; DataError as :func:`read_rows`."""
    with _opened(path) as file:
        return file.schema_arrow


def _values(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    if not isinstance(column, pa.DictionaryArray):
        return column.to_pylist()
    texts = [text and text[: MAX_CAPTION_CHARACTERS + 1] for text in column.dictionary.to_pylist()]
    return [None if index is None else texts[index] for index in column.indices.to_pylist()]


@contextmanager
def _opened(path: Path, texts: Sequence[str] = ()) -> Iterator[ParquetFile]:
    """Open a file; a failure to read it within the block is a DataError."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        options = {"buffer_size": _READ_AHEAD, "pre_buffer": False}
        with ParquetFile(path, read_dictionary=[*texts], **options) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or no parquet file ({why}): get it again") from None


def _batches(
    file: ParquetFile, group: int, columns: Sequence[str], rows: int
) -> Iterator[pa.RecordBatch]:
    # One thread: decoding images is what takes time, and the other processes do that.
    return file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)
