"""Where captioned images come from: a class for each dataset's layout, and a line for it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS, CaptionStyle
from vlm_bridge.data_pipeline.splits import SplitName, SplitRule
from vlm_bridge.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image
    from pyarrow.parquet import ParquetFile

    from vlm_bridge.data_pipeline.samples import ImageFile, SkippedSample

# An image file, the bytes of one, or a function that draws the image.
RawImage: TypeAlias = "ImageFile | bytes | Callable[[], Image.Image]"

# Module and class, in the order in which a folder is recognized; imported when they are needed.
SOURCES = {
    "groundcap": "groundcap.GroundCap",
    "flickr8k": "flickr_coco.Flickr8k",
    "flickr30k": "flickr_coco.Flickr30k",
    "coco": "flickr_coco.Coco",
    "conceptual": "conceptual.Conceptual",
    "local": "local.LocalFolder",
    "scenes": "scenes.Scenes",
}

IMAGE_ROWS, TEXT_ROWS = 16, 4096  # of a parquet file, held at a time: a few megabytes


class ParquetImage(NamedTuple):
    """A row of a column of images, structs ``{bytes, path}`` as Hugging Face datasets have."""

    file: Path
    row: int
    column: str = "image"


@dataclass(slots=True)
class SourceItem:
    """One image with its captions as found.

    Attributes:
        split: None where the dataset does not decide it.
        image: a file, a row of a parquet file, or a picklable function that draws it. Rows come in
            the order of their files.
        film: the film that the image is a frame of, if its id names one.
    """

    image_id: str
    captions: list[str]
    split: SplitName | None
    image: ImageFile | ParquetImage | Callable[[], Image.Image]
    film: str | None = None


@dataclass
class Source:
    """A dataset in its own layout.

    Attributes:
        finds_near_duplicates: whether perceptual hashes tell its images apart.
        default_split_rule: for images whose split the dataset does not decide.
        split_rule: how the dataset decides its splits; None where it leaves images to a rule.
        rejected: what ``items`` skipped.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    licence_note: ClassVar[str]
    default_caption_style: ClassVar[CaptionStyle] = "sentence"
    finds_near_duplicates: ClassVar[bool] = True
    needs_input_dir: ClassVar[bool] = True

    default_split_rule: SplitRule = field(default=SplitRule(), init=False)
    split_rule: str | None = field(default=None, init=False)
    rejected: list[SkippedSample] = field(default_factory=list, init=False)

    @classmethod
    def recognize(cls, folder: Path) -> str | None:
        """Return the name of the file by which a folder is recognized as this dataset, or None."""
        return None

    def items(self) -> list[SourceItem]:
        """Read the dataset. Raises DataError, with file and line, where it is malformed."""
        raise NotImplementedError


def source_class(name: str) -> type[Source]:
    """Return the class of a source; UsageError where there is none of that name."""
    if name not in SOURCES:
        raise UsageError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    module, _, kind = SOURCES[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)


def make_source(
    name: str, input_dir: Path | None = None, captions_file: Path | None = None, **options: Any
) -> Source:
    """Return the source called ``name``, with those of the options that it has.

    Raises UsageError or DataError if a name is unknown, or a folder or file is not there.
    """
    kind = source_class(name)
    if input_dir is None and kind.needs_input_dir:
        raise UsageError(f"source {name} needs --input-dir")
    if input_dir is not None and not input_dir.exists():
        raise DataError(f"no such folder: {input_dir} (--input-dir)")
    if captions_file is not None and not captions_file.is_file():
        raise DataError(f"no such caption file: {captions_file} (--captions-file)")
    options |= {"input_dir": input_dir, "captions_file": captions_file}
    known = {field.name for field in fields(kind) if field.init}
    return kind(**{name: value for name, value in options.items() if name in known})


def find_source(
    input_dir: Path | None = None, captions_file: Path | None = None
) -> tuple[str, str]:
    """Return the name of the source that reads a folder or file, and the file that shows it.

    Raises:
        DataError: no such folder, or nothing in it shows what it is.
    """
    if input_dir is None:
        return ("groundcap", "the hub") if captions_file is None else ("local", "")
    if input_dir.is_file():
        return "groundcap", input_dir.name
    if not input_dir.is_dir():
        raise DataError(f"no such folder: {input_dir} (--input-dir)")
    if captions_file is not None:
        name = captions_file.stem.removeprefix("dataset_")  # as Karpathy's files are called
        return name if name in ("coco", "flickr30k") else "local", captions_file.name
    for name in SOURCES:
        if file := source_class(name).recognize(input_dir):
            return name, file
    raise DataError(
        f"no captions found in {input_dir}: no caption file, text files beside images, parquet "
        "file or shards; write a captions.csv there with the columns image,caption, name yours "
        "with --captions-file, or the dataset with --source"
    )


def open_source(
    folder: str | Path,
    name: str | None = None,
    captions_file: str | Path | None = None,
    **options: Any,
) -> Source:
    """Return the source in a folder: the one called ``name``, or the one that its files show.

    Raises UsageError or DataError as `make_source` and `find_source`.
    """
    folder, file = Path(folder), None if captions_file is None else Path(captions_file)
    return make_source(name or find_source(folder, file)[0], folder, file, **options)


def iter_images(items: Iterable[SourceItem]) -> Iterator[RawImage | None]:
    """Yield the image of each item, None where a parquet file holds none for it.

    Raises DataError if a parquet file is missing or damaged.
    """
    images = (item.image for item in items)
    for is_row, group in groupby(images, key=lambda image: isinstance(image, ParquetImage)):
        if is_row:
            yield from _stored_images(row for row in group if isinstance(row, ParquetImage))
        else:
            yield from (image for image in group if not isinstance(image, ParquetImage))


def _stored_images(images: Iterable[ParquetImage]) -> Iterator[bytes | None]:
    for (path, column), of_file in groupby(images, key=lambda image: (image.file, image.column)):
        with _opened(path) as file:
            # One thread: decoding images is what takes time, and other processes do that.
            batches = file.iter_batches(IMAGE_ROWS, columns=[f"{column}.bytes"], use_threads=False)
            rows = enumerate(row for batch in batches for row in batch.column(0).field("bytes"))
            for image in of_file:
                yield next((content.as_py() for row, content in rows if row == image.row), None)


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of ``columns`` of every row of a parquet file.

    A text too long for a caption is cut, and still too long. Raises DataError if the file is
    damaged.
    """
    from pyarrow import types

    # As dictionaries: a text that the file holds once may stand in a million rows.
    texts = [f.name for f in schema_of(path) if f.name in columns and types.is_string(f.type)]
    with _opened(path, texts) as file:
        for batch in file.iter_batches(TEXT_ROWS, columns=list(columns), use_threads=False):
            for values in zip(*map(_values, batch.columns), strict=True):
                yield dict(zip(batch.schema.names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    if not isinstance(column, pa.DictionaryArray):
        return column.to_pylist()
    texts = [text and text[: MAX_CAPTION_CHARACTERS + 1] for text in column.dictionary.to_pylist()]
    return [None if index is None else texts[index] for index in column.indices.to_pylist()]


def schema_of(path: Path) -> pa.Schema:
    """Return the columns of a parquet file; DataError as :func:`read_rows`."""
    with _opened(path) as file:
        return file.schema_arrow


@contextmanager
def _opened(path: Path, texts: Sequence[str] = ()) -> Iterator[ParquetFile]:
    """Open a parquet file; a failure to read it within the block is a DataError."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        # With a buffer of 1 MiB; else, pyarrow loads all images of a row group at once.
        options = {"buffer_size": 1 << 20, "pre_buffer": False}
        with ParquetFile(path, read_dictionary=[*texts], **options) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or no parquet file ({why}): get it again") from None
