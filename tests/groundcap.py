"""A small GroundCap in the schema that the dataset publishes: parquet files of drawn film frames."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "detections": pa.list_(
            pa.struct(
                {
                    "id": pa.int32(),
                    "label": pa.string(),
                    "score": pa.float32(),
                    "box": pa.struct(dict.fromkeys("xywh", pa.float32())),
                }
            )
        ),
        "caption": pa.string(),
        "human_annotated": pa.bool_(),
    }
)
FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "detections": {
        "_type": "List",
        "feature": {
            "id": {"dtype": "int32", "_type": "Value"},
            "label": {"dtype": "string", "_type": "Value"},
            "score": {"dtype": "float32", "_type": "Value"},
            "box": {axis: {"dtype": "float32", "_type": "Value"} for axis in "xywh"},
        },
    },
    "caption": {"dtype": "string", "_type": "Value"},
    "human_annotated": {"dtype": "bool", "_type": "Value"},
}
SCENES = (
    ("person", "the man", "walk", "walks", "road", "on the road"),
    ("dog", "a dog", "sleep", "sleeps", "couch", "on the couch"),
    ("car", "a car", "stop", "stops", "building", "by a building"),
)


def write_groundcap(
    root: Path,
    *,
    train: int = 400,
    test: int = 100,
    films: int = 20,
    side: int = 48,
    row_group: int = 50,
    files: int = 2,
) -> Path:
    """Write ``data/train-*.parquet`` (``files`` of them) and ``data/test-*.parquet``; return ``root``.

    The frames of each film are spread over both parts, as they are in the published dataset. With ``films=0``
    ids name none.
    """
    total = train + test
    rng = random.Random(0)
    order = rng.sample(range(total), total)
    parts = [("train", chunk) for chunk in _chunks(order[:train], files)]
    parts += [("test", order[train:])] if test else []
    (root / "data").mkdir(parents=True)
    for number, (part, indices) in enumerate(parts):
        of = files if part == "train" else 1
        path = root / "data" / f"{part}-{number if part == 'train' else 0:05d}-of-{of:05d}.parquet"
        write_rows(path, (make_row(index, films, side) for index in indices), row_group)
    return root


def write_rows(path: Path, rows: Iterable[dict[str, Any]], row_group: int = 50) -> Path:
    """Write one parquet file with the dataset's schema, ``row_group`` rows at a time."""
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    schema = SCHEMA.with_metadata(metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in _chunks_of(rows, row_group):
            writer.write_table(pa.Table.from_pylist(chunk, schema))
    return path


def make_row(index: int, films: int = 20, side: int = 48) -> dict[str, Any]:
    """One row: a frame whose colours are its own, and a caption with every kind of tag."""
    label, thing, verb, does, place, where = SCENES[index % len(SCENES)]
    caption = (
        f'<gdo class="{label}" {label}-0>{thing.capitalize()}</gdo> <gda class="{verb}" {label}-0>{does}</gda> '
        f'<gdl class="{place}" {place}-0>{where}</gdl>, in frame {index} &amp; alone.'
    )
    name = f"tt{1000000 + index % films}_{index:06d}" if films else f"frame_{index:06d}"
    box = {"x": 1.0, "y": 2.0, "w": 20.0, "h": 10.0}
    return {
        "id": name,
        "image": {"bytes": frame(index, side), "path": f"{name}.jpg"},
        "detections": [
            {"id": 0, "label": label, "score": 0.9, "box": box},
            {"id": 0, "label": place, "score": 0.8, "box": box},
        ],
        "caption": caption,
        "human_annotated": index % 10 == 0,
    }


def frame(index: int, side: int = 48) -> bytes:
    """A JPEG of four coloured fields, different for every index."""
    rng = random.Random(index)
    field = Image.frombytes("RGB", (2, 2), rng.randbytes(12))
    buffer = io.BytesIO()
    field.resize((side, side * 2 // 3), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _chunks(items: list[int], number: int) -> list[list[int]]:
    size = -(-len(items) // number) or 1
    return [items[start : start + size] for start in range(0, len(items), size)]


def _chunks_of(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
