"""A small GroundCap in the schema that the dataset publishes: parquet files of drawn film frames."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BOX = pa.struct(dict.fromkeys("xywh", pa.float32()))
DETECTION = pa.struct({"id": pa.int32(), "label": pa.string(), "score": pa.float32(), "box": BOX})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "detections": pa.list_(DETECTION),
        "caption": pa.string(),
        "human_annotated": pa.bool_(),
    }
)
SCENES = (
    ("person", "the man", "walk", "walks", "road", "on the road"),
    ("dog", "a dog", "sleep", "sleeps", "couch", "on the couch"),
    ("car", "a car", "stop", "stops", "building", "by a building"),
)


def write_groundcap(
    root: Path, *, train: int = 400, test: int = 100, films: int = 20, side: int = 48
) -> Path:
    """Write two files ``data/train-*.parquet`` and one ``data/test-*.parquet``; return ``root``.

    The frames of each film are spread over both parts, as in the published dataset. With
    ``films=0`` ids name none.
    """
    order = random.Random(0).sample(range(train + test), train + test)
    half = -(-train // 2)
    files = {
        "train-00000-of-00002": order[:half],
        "train-00001-of-00002": order[half:train],
        "test-00000-of-00001": order[train:],
    }
    (root / "data").mkdir(parents=True)
    for name, indices in files.items():
        if indices:
            rows = [make_row(index, films, side) for index in indices]
            write_rows(root / "data" / f"{name}.parquet", rows)
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a parquet file with the dataset's schema, 50 rows a group."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=50)


def make_row(index: int, films: int = 20, side: int = 48) -> dict[str, Any]:
    """Return a row: a frame whose colors are its own, and a caption with every kind of tag."""
    label, thing, verb, does, place, where = SCENES[index % len(SCENES)]
    caption = (
        f'<gdo class="{label}" {label}-0>{thing.capitalize()}</gdo> '
        f'<gda class="{verb}" {label}-0>{does}</gda> '
        f'<gdl class="{place}" {place}-0>{where}</gdl>, in frame {index} &amp; alone.'
    )
    name = f"tt{1000000 + index % films}_{index:06d}" if films else f"frame_{index:06d}"
    box = {"x": 1.0, "y": 2.0, "w": 20.0, "h": 10.0}
    return {
        "id": name,
        "image": {"bytes": frame(index, side), "path": f"{name}.jpg"},
        "detections": [
            {"id": 0, "label": name, "score": 0.9, "box": box} for name in (label, place)
        ],
        "caption": caption,
        "human_annotated": index % 10 == 0,
    }


def frame(index: int, side: int = 48) -> bytes:
    """Return a JPEG of four colored fields, different for every index."""
    field = Image.frombytes("RGB", (2, 2), random.Random(index).randbytes(12))
    buffer = io.BytesIO()
    field.resize((side, side * 2 // 3), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
